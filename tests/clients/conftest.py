"""The table of clients: each test of one adds a row, `make clients` writes docs/clients.md of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import astuple, dataclass
from pathlib import Path

import pytest

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
