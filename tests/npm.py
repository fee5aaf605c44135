"""npm packages, each set in a folder of its own that is kept in the cache, and scripts that node runs with them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest

from awq_onnx.kernels.compile import cache_folder

ORT_NODE = "onnxruntime-node@1.30.0"
ORT_WEB = "onnxruntime-web@1.30.0"
TRANSFORMERS = "@huggingface/transformers@4.3.2"
TOKENIZERS = "@huggingface/tokenizers@0.2.0"
PLAYWRIGHT = "playwright-core@1.65.1"


def version(package: str) -> str:
    return package.rpartition("@")[2]


def installed(*packages: str) -> Path:
    """The folder node_modules with exactly these versions. Skips the test where npm is missing or cannot get them."""
    folder = cache_folder() / "npm" / "+".join(sorted(package.replace("/", "-") for package in packages))
    if not folder.exists():
        _install(packages, folder)
    return folder / "node_modules"


def run(script: Path, *arguments: object, modules: Path, timeout: float = 300) -> Any:
    """What a script (.cjs: modules are looked for in NODE_PATH) prints as JSON. timeout: seconds."""
    command = ["node", str(script), *map(str, arguments)]
    environment = os.environ | {"NODE_PATH": str(modules)}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout, check=False)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


def _install(packages: tuple[str, ...], folder: Path) -> None:
    """Without the scripts of the packages, which would download from elsewhere."""
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".installing-", dir=folder.parent))
    try:
        command = [
            "npm",
            "install",
            "--prefix",
            str(work),
            "--ignore-scripts",
            "--no-audit",
            "--no-fund",
            "--save-exact",
        ]
        ended = subprocess.run([*command, *packages], cwd=work, capture_output=True, text=True, check=False)
        if ended.returncode:
            last = (ended.stderr.strip().splitlines() or ["no reason given"])[-1]
            pytest.skip(f"npm cannot install {', '.join(packages)}: {last}")
        work.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
