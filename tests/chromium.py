"""A browser without a window, which scripts of tests/clients drive, and the page of examples/browser for it."""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import npm
import pytest
from browser import chromium
from trained import ROOT

EXAMPLE = ROOT / "examples" / "browser"
SERVE = runpy.run_path(str(EXAMPLE / "serve.py"))["server"]


def browse(script: Path, *arguments: object, timeout: float = 600) -> Any:
    """What a script that drives Chromium prints as JSON. Skips the test where there is no Chromium."""
    program = chromium()
    if program is None:
        pytest.skip("no Chromium: apt-get install chromium")
    return npm.run(script, program, *arguments, modules=npm.installed(npm.PLAYWRIGHT), timeout=timeout)


@contextmanager
def served(model: Path, modules: Path) -> Iterator[str]:
    """The address of the page, beside a folder with a model."""
    with SERVE(model, modules) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://localhost:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()
