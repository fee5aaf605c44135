"""Kill runs of the command at random moments, and see that the same command goes on to the identical output.

    python benchmarks/interrupt.py [--kills 50] [--model bert] [--times 2]

Every round starts afresh, is killed with SIGKILL at random moments (`--times` of them), and then run to its end.
Checked each time: before the end nothing at the output's place looks finished; the output has the bytes of an
uninterrupted run; no work file is left; the model that is read has not changed.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import RECIPES, trained_model


def command(model: Path, output: Path) -> list[str]:
    return [sys.executable, "-m", "awq_onnx", str(model), "-o", str(output), "--quiet", "--samples", "16"]


def digest(paths: list[Path]) -> str:
    total = hashlib.blake2b()
    for path in paths:
        total.update(path.name.encode())
        total.update(path.read_bytes())
    return total.hexdigest()


def outputs(folder: Path) -> list[Path]:
    return sorted(folder.glob("out.onnx*"))


def run_to_the_end(model: Path, folder: Path) -> str:
    subprocess.run(command(model, folder / "out.onnx"), check=True, stdout=subprocess.DEVNULL)
    left = sorted(path.name for path in folder.iterdir())
    assert left == ["out.onnx", "out.onnx.data"], f"files are left: {left}"
    return digest(outputs(folder))


def kill_after(seconds: float, model: Path, folder: Path) -> bool:
    """Whether the run was killed before it came to its end."""
    running = subprocess.Popen(command(model, folder / "out.onnx"), stdout=subprocess.DEVNULL)
    try:
        running.wait(seconds)
        return False
    except subprocess.TimeoutExpired:
        running.send_signal(signal.SIGKILL)
        running.wait()
        return True


def main() -> None:
    parser = argparse.ArgumentParser(description="Interrupted runs against an uninterrupted one.")
    parser.add_argument("--model", choices=sorted(RECIPES), default="bert")
    parser.add_argument("--kills", type=int, default=50, help="rounds")
    parser.add_argument("--times", type=int, default=2, help="how often a round is killed before it may end")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    model, rng = trained_model(arguments.model), random.Random(arguments.seed)
    sources = sorted(model.parent.glob("model.onnx*"))
    before = digest(sources)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        start = time.perf_counter()
        wanted = run_to_the_end(model, folder)
        seconds = time.perf_counter() - start
        print(f"{arguments.model}: an uninterrupted run takes {seconds:.1f} s")
        killed = 0
        for round_number in range(arguments.kills):
            shutil.rmtree(folder)
            folder.mkdir()
            for _ in range(arguments.times):
                killed += kill_after(rng.uniform(0, seconds), model, folder)
                found = [path.name for path in outputs(folder)]
                assert found in ([], ["out.onnx.data"], ["out.onnx", "out.onnx.data"]), found
                if "out.onnx" in found:
                    assert digest(outputs(folder)) == wanted, f"round {round_number}: looks finished and is not"
                    for path in outputs(folder):
                        path.unlink()
            assert run_to_the_end(model, folder) == wanted, f"round {round_number}: another output"
    assert digest(sources) == before, "the model that is read has changed"
    print(f"{killed} kills in {arguments.kills} rounds: every output identical, nothing left, the model unchanged")


if __name__ == "__main__":
    main()
