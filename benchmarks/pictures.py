"""matplotlib, for the benchmarks that draw: without it they measure all the same."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any


def pyplot() -> Any:
    try:
        matplotlib = importlib.import_module("matplotlib")
    except ImportError:
        sys.exit("a picture needs matplotlib: pip install matplotlib, then make it from the figures that --json kept")
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "awq-onnx"  # the same figures, the same bytes
    return importlib.import_module("matplotlib.pyplot")


def save_picture(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
