"""The table of clients: each test of one adds a row, `make clients` writes docs/clients.md of them."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import astuple, dataclass
from pathlib import Path

TABLE = "AWQ_ONNX_CLIENTS_TABLE"  # in the environment: the page to write
BEGIN, END = "<!-- rows -->", "<!-- end of rows -->"  # in the page, around the table
HEAD = ["| client | version | model | what was run | result |", "|---|---|---|---|---|"]


@dataclass(frozen=True, order=True)
class Row:
    """What one client did with a model of ours."""

    client: str
    version: str
    model: str
    ran: str
    result: str


def page() -> Path | None:
    """The page that this run writes; pictures lie beside it."""
    name = os.environ.get(TABLE)
    return Path(name) if name else None


def write(rows: Collection[Row], page: Path) -> None:
    """Puts the rows into the page, in the place of those that are there."""
    before, _, rest = page.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    lines = [*HEAD, *("| " + " | ".join(astuple(one)) + " |" for one in sorted(rows))]
    page.write_text(f"{before}{BEGIN}\n\n" + "\n".join(lines) + f"\n\n{END}{after}")
