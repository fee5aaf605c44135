"""The table of clients: each test of one adds a row, `make clients` writes docs/clients.md of them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from pathlib import Path

import pytest
from trained import trained
from web import write_web_folder

import awq_onnx
from awq_onnx import Recipe

TABLE = "AWQ_ONNX_CLIENTS_TABLE"  # in the environment: the page to write
BEGIN, END = "<!-- rows -->", "<!-- end of rows -->"  # in the page, around the table


@dataclass(frozen=True, order=True)
class Row:
    """What one client did with a model of ours."""

    client: str
    version: str
    model: str
    ran: str
    result: str


ROWS = pytest.StashKey[list[Row]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []


@pytest.fixture
def row(request: pytest.FixtureRequest) -> Callable[[Row], None]:
    """Called at the end of a test, with what is to stand in the table."""
    rows = request.config.stash.setdefault(ROWS, [])
    return rows.append


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The original in float32, in its folder."""
    return trained("smollm2.py")


@pytest.fixture(scope="session")
def int4_smollm2(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """SmolLM2 in 4 bits, its weights in a file of their own. Little calibration does for clients."""
    output = tmp_path_factory.mktemp("int4") / "model_int4.onnx"
    awq_onnx.quantize(smollm2, output, Recipe(quality="fast", samples=4, sequence_length=32))
    yield output
    for path in output.parent.iterdir():  # pytest keeps folders of several runs, and this one is large
        path.unlink()


@pytest.fixture(scope="session")
def web_smollm2(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with SmolLM2 in 4 bits as transformers.js wants it."""
    folder = tmp_path_factory.mktemp("web") / "smollm2"
    write_web_folder(smollm2, folder)
    yield folder
    shutil.rmtree(folder)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those that need large models, other programs or a browser run with `make clients`."""
    if os.environ.get("AWQ_ONNX_CLIENTS"):
        return
    for item in items:
        if item.get_closest_marker("clients"):
            item.add_marker(pytest.mark.skip(reason="a real client with a real model: make clients"))


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    rows, page = session.config.stash.get(ROWS, []), os.environ.get(TABLE)
    if page is None or exitstatus or not rows:
        return
    before, _, rest = Path(page).read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    lines = ["| client | version | model | what was run | result |", "|---|---|---|---|---|"]
    lines += ["| " + " | ".join(astuple(one)) + " |" for one in sorted(rows)]
    Path(page).write_text(f"{before}{BEGIN}\n\n" + "\n".join(lines) + f"\n\n{END}{after}")
