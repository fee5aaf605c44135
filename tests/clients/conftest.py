"""Models that several clients open, and the rows that their tests add to the table."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import rows
from rows import Row
from trained import LITTLE, trained

import awq_onnx

ROWS = pytest.StashKey[list[Row]]()


@pytest.fixture
def row(request: pytest.FixtureRequest) -> Callable[[Row], None]:
    """Called at the end of a test, with what is to stand in the table."""
    return request.config.stash.setdefault(ROWS, []).append


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The original in float32, in its folder."""
    return trained("smollm2.py")


@pytest.fixture(scope="session")
def int4_smollm2(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """SmolLM2 in 4 bits, its weights in a file of their own."""
    with removed(tmp_path_factory.mktemp("int4")) as folder:
        yield Path(awq_onnx.quantize(smollm2, folder / "model_int4.onnx", LITTLE).output)


@pytest.fixture(scope="session")
def web_smollm2(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with SmolLM2 in 4 bits, as browsers load it."""
    with removed(tmp_path_factory.mktemp("web")) as folder:
        awq_onnx.quantize(smollm2, folder, replace(LITTLE, target="web"))
        yield folder


@pytest.fixture(scope="session")
def web_qdq_smollm2(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The same in standard ONNX."""
    with removed(tmp_path_factory.mktemp("web_qdq")) as folder:
        awq_onnx.quantize(smollm2, folder, replace(LITTLE, target="web", format="qdq"))
        yield folder


@contextmanager
def removed(folder: Path) -> Iterator[Path]:
    """A folder that is gone afterwards: pytest keeps those of several runs, and these are large."""
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those that need large models, other programs or a browser run with `make clients`."""
    if os.environ.get("AWQ_ONNX_CLIENTS"):
        return
    for item in items:
        if item.get_closest_marker("clients"):
            item.add_marker(pytest.mark.skip(reason="a real client with a real model: make clients"))


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A test that failed, or was skipped because something is not installed, would lack its row: nothing is written."""
    made, page = session.config.stash.get(ROWS, []), rows.page()
    terminal = session.config.pluginmanager.get_plugin("terminalreporter")
    if page and made and not exitstatus and not terminal.stats.get("skipped"):
        rows.write(made, page)
