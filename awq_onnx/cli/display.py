"""What a person sees: progress on stderr, results as two columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from awq_onnx.errors import OutputError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as RichBar


class CannotPrintError(OutputError):
    """stdout takes no more."""


def show(text: str) -> None:
    """Print a result, to the last byte. Raises CannotPrintError."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise CannotPrintError(f"cannot print the result: {error.strerror}") from error


def two_columns(rows: Sequence[tuple[str, str]]) -> str:
    """Labels and texts, a label only where it differs from the line before; with neither, an empty line."""
    width = max(len(label) for label, _ in rows)
    lines, last = [], ""
    for label, text in rows:
        lines.append(f"{label if label != last else '':<{width}}  {text}".rstrip())
        last = label
    return "\n".join(lines)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of as many cells each as lines: the second cell flush left, the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            f"{cell:{'<' if at == 1 else '>'}{width}}" for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


class Display:
    """Progress on stderr: on a terminal a bar for each stage, elsewhere a line."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: RichBar | None = None

    def __enter__(self) -> Display:
        if self._console.is_terminal and not self._console.quiet:
            from rich import progress

            self._bar = progress.Progress(
                progress.TextColumn("{task.description}", markup=False),
                progress.BarColumn(bar_width=24),
                progress.TaskProgressColumn(),
                progress.TimeElapsedColumn(),
                progress.TextColumn("left"),
                progress.TimeRemainingColumn(),
                console=self._console,
                transient=False,
            )
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._finish_task()
            self._bar.stop()

    def stage(self, title: str) -> None:
        if self._bar is None:
            self._console.print(f"{title} ...", highlight=False, markup=False, soft_wrap=True)
            return
        self._finish_task()
        self._task = self._bar.add_task(title, total=1.0)

    def advance(self, fraction: float) -> None:
        if self._bar is not None:
            self._bar.advance(self._task, fraction)

    def note(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _finish_task(self) -> None:
        """A stage that ended shows as full, whether or not it told its progress."""
        if self._bar is not None and self._bar.task_ids:
            self._bar.update(self._bar.task_ids[-1], completed=1.0)
