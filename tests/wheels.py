"""Other versions of packages than the environment's, each in a folder of its own that is kept in the cache."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from awq_onnx.kernels.compile import cache_folder


def installed(requirement: str) -> Path:
    """The folder to put on the path. Skips the test where pip cannot get the package, which it does once."""
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    folder = cache_folder() / "wheels" / f"{requirement.replace('==', '-')}-{python}"
    if not folder.exists():
        _install(requirement, folder)
    return folder


def _install(requirement: str, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".installing-", dir=folder.parent))
    try:
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--no-compile",
            "--only-binary=:all:",
        ]
        ended = subprocess.run(
            [*command, "--target", str(work), requirement], capture_output=True, text=True, check=False
        )
        if ended.returncode:
            last = (ended.stderr.strip().splitlines() or ["no reason given"])[-1]
            pytest.skip(f"pip cannot install {requirement}: {last}")
        work.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
