"""The page of examples/browser, in a real browser: onnxruntime-web writes with a model of ours."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from email.message import Message
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import urlopen

import npm
import pytest
import rows
from chromium import EXAMPLE, browse, served
from rows import Row
from trained import NEW_TOKENS, UNPACKED, WEB_MODEL, greedy_text

PROMPT = "A neural network is"  # what follows makes sense even after little calibration
SAME = "the text of plain onnxruntime"
PAGE = Path(__file__).with_name("page.cjs")
REFERENCE = re.compile(r'(?:(?:src=|href=|Worker\()"(?!data:)|"(?=\./))([^"]+)"')  # in HTML and in JavaScript


@pytest.mark.clients
def test_the_page_writes_the_sentence_of_plain_onnxruntime_on_webassembly(
    web_smollm2: Path, web_qdq_smollm2: Path, tmp_path: Path, row: Callable[[Row], None]
) -> None:
    """In both formats, which hold the same numbers and are both computed in floats there; one is much faster."""
    packed, unpacked = (written(folder, tmp_path) for folder in (web_smollm2, web_qdq_smollm2))
    plain = greedy_text(web_qdq_smollm2 / WEB_MODEL, web_qdq_smollm2, PROMPT, **UNPACKED)
    assert packed["written"] == unpacked["written"] == plain
    assert packed["device"] == unpacked["device"]
    assert packed["device"].startswith("CPU")
    if page := rows.page():
        shutil.copy(tmp_path / "wide-light.png", page.with_name("browser.png"))
    slow, fast = float(packed["speed"]), float(unpacked["speed"])
    assert fast > 2 * slow
    row(told("WebAssembly", f"{SAME} in floats, {NEW_TOKENS} tokens"))
    row(told("WebAssembly, `--format qdq`", f"the same text, {fast / slow:.0f} times as many tokens/s"))


@pytest.mark.clients
def test_the_page_writes_the_sentence_of_plain_onnxruntime_on_webgpu(
    web_smollm2: Path, tmp_path: Path, row: Callable[[Row], None]
) -> None:
    """A GPU in software is slow: a few words do."""
    shown = written(web_smollm2, tmp_path, gpu="software", tokens=3)
    assert shown["written"] == greedy_text(web_smollm2 / WEB_MODEL, web_smollm2, PROMPT, tokens=3)
    assert shown["device"] == "WebGPU"
    row(told("WebGPU (a GPU in software)", f"{SAME}, 3 tokens"))


def written(model: Path, pictures: Path, *, gpu: str = "none", tokens: int = NEW_TOKENS) -> dict[str, str]:
    """What the page shows in the end."""
    with served(model, npm.installed(npm.ORT_WEB, npm.TOKENIZERS)) as url:
        shown: dict[str, str] = browse(PAGE, gpu, url, PROMPT, tokens, pictures)
    assert not shown["problems"]
    assert len(list(pictures.glob("*.png"))) == 4
    return shown


def told(where: str, result: str) -> Row:
    return Row("onnxruntime-web", npm.version(npm.ORT_WEB), "SmolLM2-135M", f"examples/browser, {where}", result)


@pytest.mark.clients
def test_the_page_says_which_file_is_missing(tmp_path: Path) -> None:
    with served(tmp_path, npm.installed(npm.ORT_WEB, npm.TOKENIZERS)) as url:
        shown = browse(PAGE, "none", url, PROMPT, 1)
    assert shown["problem"] == "model/tokenizer.json: 404 File not found"


def test_the_page_takes_files_of_its_own_folder_and_of_its_packages_alone() -> None:
    needed = json.loads((EXAMPLE / "package.json").read_text())["dependencies"]
    named = [
        one
        for page in ("index.html", "main.js", "worker.js")
        for one in REFERENCE.findall((EXAMPLE / page).read_text())
    ]
    packaged = [one for one in named if any(one.startswith(f"./node_modules/{name}/") for name in needed)]
    assert len(packaged) == 3
    assert sorted(set(named) - set(packaged)) == ["main.js", "style.css", "worker.js"]
    assert "//" not in (EXAMPLE / "style.css").read_text()


def test_the_page_needs_the_packages_that_are_tested() -> None:
    needed = json.loads((EXAMPLE / "package.json").read_text())["dependencies"]
    assert sorted(f"{name}@{version}" for name, version in needed.items()) == [npm.TOKENIZERS, npm.ORT_WEB]


def test_the_server_lets_the_page_use_threads(tmp_path: Path) -> None:
    (tmp_path / "ort.mjs").write_text("")
    (tmp_path / "ort.wasm").write_bytes(b"")
    with served(tmp_path, tmp_path) as url:
        page, script, binary = (opened(url + path) for path in ("", "node_modules/ort.mjs", "model/ort.wasm"))
    assert page["Cross-Origin-Opener-Policy"] == "same-origin"
    assert page["Cross-Origin-Embedder-Policy"] == "require-corp"
    assert script["Content-Type"] == "text/javascript"
    assert binary["Content-Type"] == "application/wasm"


@pytest.mark.parametrize("path", ["model/../secret", "model/%2e%2e/secret", "../secret", "model//../../secret"])
def test_the_server_gives_nothing_outside_its_folders(tmp_path: Path, path: str) -> None:
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "model").mkdir()
    with served(tmp_path / "model", tmp_path / "model") as url:
        connection = HTTPConnection(urlsplit(url).netloc)
        connection.request("GET", "/" + path)
        assert connection.getresponse().status == 404
        connection.close()


def opened(url: str) -> Message:
    with urlopen(url) as response:
        headers: Message = response.headers
    return headers
