"""The command `python -m awq_onnx.kernels`: what other programs need to run models on the CUDA kernels."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from awq_onnx.errors import AwqOnnxError, OutputError, RecipeError

PROG = "python -m awq_onnx.kernels"
LIBRARY = "libawq_onnx.so"
INTERRUPTED = 130

EPILOG = f"""\
examples:
  {PROG} export kernels/                    the library and the kernels, for another program
  {PROG} adopt model.onnx -o ours.onnx      where the kernels serve not every MatMulNBits of a model

exit codes:
  0 done   2 an option cannot be used so   3 the model has nothing for the kernels, or cannot be read
  4 the output cannot be written   6 a package, a compiler or a GPU is missing   7 the kernels cannot be compiled
"""


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command and exit with its code."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except AwqOnnxError as error:
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        _fail("interrupted", INTERRUPTED)
    sys.exit(0)


def _fail(message: str, code: int) -> NoReturn:
    print(f"{PROG}: {message}", file=sys.stderr)
    sys.exit(code)


class _Parser(argparse.ArgumentParser):
    """An argument that cannot be used is told in one line, like every other mistake."""

    def error(self, message: str) -> NoReturn:
        self.exit(RecipeError.exit_code, f"{PROG}: {message}; see {PROG} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=PROG,
        description="Run quantised models on the CUDA kernels of awq-onnx, inside onnxruntime.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    export = commands.add_parser("export", help="write what another program needs: the library and the kernels")
    export.add_argument("folder", type=Path, help="where to; made if it is not there")
    export.add_argument(
        "--capability",
        type=int,
        action="append",
        metavar="XY",
        help="of the GPUs to compile for, 90 for 9.0; can be given again (default: 80 and 90)",
    )
    export.set_defaults(run=_export)
    adopt = commands.add_parser("adopt", help="move the nodes that the kernels serve to the domain awq_onnx")
    adopt.add_argument("model", type=Path, help="the quantised .onnx file; it is not changed")
    adopt.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="the file to write")
    adopt.add_argument("--force", action="store_true", help="overwrite the output if it exists")
    adopt.set_defaults(run=_adopt)
    return parser


def _export(arguments: argparse.Namespace) -> None:
    from awq_onnx.kernels import compile as compiler
    from awq_onnx.kernels import library

    folder: Path = arguments.folder
    source = library.path()
    try:
        written = compiler.write_cubins(folder, *(arguments.capability or compiler.CAPABILITIES))
        _copy_whole(source, folder / LIBRARY)
    except OSError as error:
        raise OutputError(f"cannot write {folder}: {error.strerror}") from error
    for path in (*written, folder / LIBRARY):
        print(path)


def _copy_whole(source: Path, target: Path) -> None:
    """A program that has the old one open keeps it."""
    unfinished = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        shutil.copy(source, unfinished)
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)


def _adopt(arguments: argparse.Namespace) -> None:
    from awq_onnx.adoption import adopt

    adoption = adopt(arguments.model, arguments.output, overwrite=arguments.force)
    print(f"{len(adoption.moved)} MatMulNBits moved to the domain awq_onnx, {len(adoption.left)} left to onnxruntime")
    for one in adoption.left:
        print(f"{one.name}: {one.reason}")


if __name__ == "__main__":
    main()
