"""Netron shows what awq-onnx says of a layer: its format, its scale, its error."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
import pytest
import rows
from chromium import browse
from rows import Row

pytestmark = pytest.mark.clients

SCRIPT = Path(__file__).with_name("netron.cjs")
LAYER = "/model/layers.0/mlp/gate_proj/MatMul"  # its scale went into the norm before it
VISIBLE_LINE = 70  # characters, in the column of properties


def test_netron_shows_format_scale_and_error_of_a_layer(
    int4_smollm2: Path, tmp_path: Path, row: Callable[[Row], None]
) -> None:
    netron = pytest.importorskip("netron")
    picture = tmp_path / "netron.png"
    with started(int4_smollm2) as url:
        shown = browse(SCRIPT, url, LAYER, picture)
    [node] = (node for node in onnx.load(int4_smollm2, load_external_data=False).graph.node if node.name == LAYER)
    assert shown["type"] == "MatMulNBits"
    assert shown["description"] == node.doc_string
    assert max(map(len, node.doc_string.splitlines())) <= VISIBLE_LINE
    for attribute in node.attribute:
        assert shown[attribute.name] == str(onnx.helper.get_attribute_value(attribute))
    assert node.metadata_props
    for one in node.metadata_props:
        assert shown[one.key] == one.value
    if page := rows.page():
        shutil.copy(picture, page.with_name("netron.png"))
    row(
        Row(
            client="Netron",
            version=netron.__version__,
            model="SmolLM2-135M",
            ran="a layer selected, in headless Chromium",
            result="attributes, description and metadata are shown",
        )
    )


@contextmanager
def started(model: Path) -> Iterator[str]:
    import netron

    host, port = netron.start(str(model), browse=False)
    try:
        yield f"http://{host}:{port}/"
    finally:
        netron.stop((host, port))
