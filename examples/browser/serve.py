"""Serve the page beside a model: http://localhost:8000 writes sentences with it, in the browser.

    npm install --ignore-scripts --prefix examples/browser
    awq-onnx model.onnx --target web -o web/           # without a GPU: --format qdq as well
    python examples/browser/serve.py web/

The folder has tokenizer.json, tokenizer_config.json and onnx/model_q4.onnx. Two headers make the difference to
`python -m http.server`: with them a page may use threads.
"""

from __future__ import annotations

import argparse
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

HERE = Path(__file__).resolve().parent


class Handler(SimpleHTTPRequestHandler):
    """The files of a few folders, by the first part of the path; others are the page's own."""

    folders: dict[str, Path]
    extensions_map = SimpleHTTPRequestHandler.extensions_map | {".mjs": "text/javascript", ".wasm": "application/wasm"}

    def translate_path(self, path: str) -> str:
        first, _, rest = unquote(urlsplit(path).path).lstrip("/").partition("/")
        root = self.folders.get(first)
        wanted = (root / rest if root else HERE / first / rest).resolve()
        return str(wanted if wanted.is_relative_to(root or HERE) else HERE / "missing")

    def end_headers(self) -> None:
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.send_header("Cache-Control", "no-cache")
        super().end_headers()


def server(model: Path, modules: Path, port: int = 0) -> ThreadingHTTPServer:
    """On this machine alone. port: 0 takes a free one, see server_port."""
    folders = {"model": model.resolve(), "node_modules": modules.resolve()}
    return ThreadingHTTPServer(("127.0.0.1", port), type("Served", (Handler,), {"folders": folders}))


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve the page beside a model.")
    parser.add_argument("model", type=Path, help="folder with tokenizer.json and onnx/model_q4.onnx")
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args()
    with server(arguments.model, HERE / "node_modules", arguments.port) as listening:
        print(f"http://localhost:{listening.server_port}")
        try:
            listening.serve_forever()
        except KeyboardInterrupt:
            print()


if __name__ == "__main__":
    main()
