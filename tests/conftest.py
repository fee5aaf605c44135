"""What all tests need of the process they run in."""

from __future__ import annotations

import signal


def pytest_configure() -> None:
    """A shell lets its background jobs ignore Ctrl-C, and with them the commands that tests start and interrupt."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
