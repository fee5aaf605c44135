"""Fill the disk in the middle of a run, and see that it ends in a sentence and goes on once there is room.

    sudo mount -t tmpfs -o size=160M none /mnt/small
    python benchmarks/full_disk.py /mnt/small [--times 5] [--model bert]

FOLDER lies on a file system of its own, with room for the output when the run begins. After a random number of seconds
another file takes all the room that is left. Checked each time: the exit code is 4, what is said is one sentence about
the disk, nothing at the output's place looks finished; and when the other file is gone, the same command goes on to the
bytes of an undisturbed run.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import time
from pathlib import Path

from common import RECIPES, trained_model
from interrupt import command, digest, outputs, run_to_the_end

FULL = 4  # exit code
PIECE = b"\0" * (1 << 16)


def fill(path: Path) -> None:
    """Write until there is no room for a byte."""
    with path.open("wb", buffering=0) as file:
        piece = PIECE
        while piece:
            try:
                file.write(piece)
            except OSError:
                piece = piece[: len(piece) // 2]


def one_round(model: Path, folder: Path, seconds: float, expected: str) -> str | None:
    """What the command said when the disk was full; None where it had ended before."""
    ballast = folder / "ballast"
    running = subprocess.Popen(
        command(model, folder / "out.onnx"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    time.sleep(seconds)
    fill(ballast)
    _, said = running.communicate()
    if running.returncode != 0:
        assert running.returncode == FULL, (running.returncode, said)
        assert said.startswith("awq-onnx: "), said
        assert said.count("\n") == 1, said
        assert not outputs(folder), outputs(folder)
    ballast.unlink()
    made = run_to_the_end(model, folder) if running.returncode else digest(outputs(folder))
    assert made == expected
    for path in outputs(folder):
        path.unlink()
    return said.strip() if running.returncode else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="on a small file system of its own")
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--model", choices=RECIPES, default="bert")
    arguments = parser.parse_args()
    model, folder = trained_model(arguments.model), arguments.folder
    assert not list(folder.iterdir()), f"{folder} is not empty"
    started = time.monotonic()
    expected = run_to_the_end(model, folder)
    whole_seconds = time.monotonic() - started
    for path in outputs(folder):
        path.unlink()
    chance = random.Random(0)
    told = [one_round(model, folder, chance.uniform(0, whole_seconds), expected) for _ in range(arguments.times)]
    for said in told:
        print(said or "had ended before the disk was full")
    print(f"{sum(one is not None for one in told)} of {arguments.times} runs met a full disk; all outputs identical")


if __name__ == "__main__":
    main()
