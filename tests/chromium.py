"""A browser without a window, which scripts of tests/clients drive."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import npm
import pytest


def browse(script: Path, *arguments: object, timeout: float = 600) -> Any:
    """What a script that drives Chromium prints as JSON. Skips the test where there is no Chromium."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("no Chromium: apt-get install chromium")
    return npm.run(script, program, *arguments, modules=npm.installed(npm.PLAYWRIGHT), timeout=timeout)
