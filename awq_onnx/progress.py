"""What the pipeline tells while it works, and to whom: an interface, so that only the command line prints."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Told what goes on. Fractions of one stage add up to 1."""

    def stage(self, title: str) -> None:
        """A stage begins; the one before it is done."""

    def advance(self, fraction: float) -> None:
        """So much more of the stage is done."""

    def note(self, line: str) -> None:
        """Something the user should know, not an error."""


def unheard(fraction: float) -> None:
    """What to call in the place of `advance` where nobody watches."""


class Silent:
    """Progress that nobody watches."""

    def stage(self, title: str) -> None:
        pass

    def advance(self, fraction: float) -> None:
        pass

    def note(self, line: str) -> None:
        pass
