"""The page of a quantisation in a real browser: it draws, asks for nothing, and fits a telephone."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from browser import Tab, chromium, tab
from builders import save, tiny_decoder
from rows import Row

import awq_onnx
from awq_onnx import Recipe, Report, page
from awq_onnx.page.content import Content
from awq_onnx.page.data import label
from awq_onnx.page.model import content_of

pytestmark = [pytest.mark.clients, pytest.mark.skipif(chromium() is None, reason="there is no Chromium")]
WIDE, NARROW = 1400, 390


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    folder = tmp_path_factory.mktemp("run")
    recipe = Recipe(samples=3, sequence_length=8)
    return awq_onnx.quantize(save(tiny_decoder(), folder / "model.onnx"), folder / "out.onnx", recipe)


@pytest.fixture
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with tab(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_it_draws_and_asks_for_nothing(tmp_path: Path, report: Report, browser: Tab, width: int, scheme: str) -> None:
    place = tmp_path / "report.html"
    page.write(place, Content.of(report))
    browser.open(place, width, scheme=scheme)
    assert browser.complaints == []
    assert browser.requests == [place.as_uri()]
    assert browser.evaluate("document.querySelectorAll('.chart svg').length") == 5
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    drawn = "[...document.querySelectorAll('.chart svg')].every(one => one.querySelectorAll('path').length > 3)"
    assert browser.evaluate(drawn)
    dark = browser.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
    assert dark == (scheme == "dark")


def test_the_reader_chooses_the_group_of_layers(tmp_path: Path, report: Report, browser: Tab) -> None:
    page.write(tmp_path / "report.html", Content.of(report))
    browser.open(tmp_path / "report.html", WIDE)
    browser.evaluate("document.getElementById('group').value = 1; group.dispatchEvent(new Event('change'))")
    salience = report.groups[1].salience
    assert salience is not None
    first = "document.querySelector('#loudest td').textContent"
    assert browser.evaluate(first) == str(salience.loudest[0].index)
    browser.evaluate("document.getElementById('next').click()")
    assert browser.evaluate("document.getElementById('group').value") == "2"
    assert browser.complaints == []


def test_the_overview_tells_what_is_pointed_at_and_a_click_chooses_it(
    tmp_path: Path, report: Report, browser: Tab
) -> None:
    page.write(tmp_path / "report.html", Content.of(report))
    browser.open(tmp_path / "report.html", WIDE, height=1200)
    place = "document.querySelector('#chart-overview .mark-symbol.role-mark path:nth-child(3)').getBoundingClientRect()"
    at = browser.evaluate(f"(r => ({{x: r.x + r.width / 2, y: r.y + r.height / 2}}))({place})")
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", **at)
    browser.wait("document.getElementById('vg-tooltip-element')?.classList.contains('visible')")
    told = browser.evaluate("document.getElementById('vg-tooltip-element').textContent")
    assert told.startswith(f"layers{label(report.groups[1].matmuls)}")
    for kind in ("mousePressed", "mouseReleased"):
        browser.call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **at)
    browser.wait("document.getElementById('group').value === '1'")


def test_the_page_of_a_model_file_draws(
    tmp_path: Path, report: Report, browser: Tab, row: Callable[[Row], None]
) -> None:
    page.write(tmp_path / "report.html", content_of(Path(report.output)))
    browser.open(tmp_path / "report.html", NARROW)
    assert browser.complaints == []
    assert browser.evaluate("document.querySelectorAll('.chart svg').length") == 2
    assert browser.evaluate("document.documentElement.scrollWidth") == NARROW
    version = browser.call("Browser.getVersion")["product"]
    found = re.search(r"/([0-9.]+)", version)
    row(
        Row(
            "Chromium, the report",
            found[1] if found else version,
            "a tiny decoder",
            "`--report`, `awq-onnx report`, wide and narrow, light and dark",
            "all charts drawn, nothing fetched",
        )
    )
