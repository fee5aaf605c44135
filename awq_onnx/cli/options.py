"""Arguments that several commands take, and how a wrong one is told."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from awq_onnx.errors import RecipeError
from awq_onnx.machine import CPU, DEVICES, Machine, size_bytes
from awq_onnx.recipe import (
    ACCURACY_LEVELS,
    LM_HEADS,
    METHODS,
    QUALITIES,
    SCALES_FROM,
    Recipe,
    help_of,
)
from awq_onnx.targets import BITS, BLOCK_SIZES, FORMATS, TARGETS

PROG = "awq-onnx"
NOTHING = "nothing was written"  # by a command that was interrupted
WIDTH = 80  # of what helps explain


class Parser(argparse.ArgumentParser):
    """An argument that cannot be used is told in one line, like every other mistake."""

    def __init__(self, prog: str, description: str, epilog: str = "") -> None:
        super().__init__(
            prog=prog,
            description=textwrap.fill(description, WIDTH),
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        self.exit(RecipeError.exit_code, f"{PROG}: {message}; see {self.prog} --help\n")


def size(text: str) -> int:
    """500MB as bytes."""
    try:
        return size_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """The options of a `Recipe`, but for those of its calibration data."""
    choice = parser.add_argument_group("which layers, and how")
    for name, metavar in (("include", "PATTERN"), ("exclude", "PATTERN"), ("override", "PATTERN:SETTINGS")):
        choice.add_argument(f"--{name}", action="append", default=[], metavar=metavar, help=help_of(name))
    add_choice(choice, "lm_head", LM_HEADS)
    add_choice(choice, "embedding", LM_HEADS)
    choice.add_argument("--allow-mul", action="store_true", help=help_of("allow_mul"))

    method = parser.add_argument_group("quality")
    add_choice(method, "quality", QUALITIES)
    add_choice(method, "method", METHODS)
    add_choice(method, "scale_from", SCALES_FROM)
    method.add_argument("--alpha", type=float, metavar="A", help=help_of("alpha"))

    format_group = parser.add_argument_group("format")
    add_choice(format_group, "target", tuple(TARGETS))
    add_choice(format_group, "format", FORMATS)
    add_number(format_group, "bits", BITS)
    add_number(format_group, "block_size", BLOCK_SIZES)
    format_group.add_argument("--target-bits", type=float, metavar="BITS", help=help_of("target_bits"))
    format_group.add_argument("--target-size", type=size, metavar="SIZE", help=help_of("target_size"))
    add_switch(format_group, "symmetric")
    add_switch(format_group, "explicit_zero_points")
    add_number(format_group, "accuracy_level", ACCURACY_LEVELS)


def recipe_of(arguments: argparse.Namespace) -> Recipe:
    """What the arguments say. Raises RecipeError, in the words of the command line."""
    values: dict[str, Any] = {
        name: getattr(arguments, name) for name in Recipe.__dataclass_fields__ if hasattr(arguments, name)
    }
    repeated = {name: tuple(values[name]) for name in ("include", "exclude", "override")}
    with settings():
        return Recipe(**(values | repeated))


def add_choice(group: Any, name: str, choices: Sequence[str]) -> None:
    """The option of a setting of the recipe that is one of several words."""
    option = f"--{name.replace('_', '-')}"
    default = Recipe.__dataclass_fields__[name].default
    group.add_argument(option, choices=choices, default=default, help=help_of(name))


def add_switch(group: Any, name: str) -> None:
    """The option of a setting of the recipe that is on or off, and where nothing is said by another setting."""
    option = f"--{name.replace('_', '-')}"
    group.add_argument(option, action=argparse.BooleanOptionalAction, default=None, help=help_of(name))


def add_number(group: Any, name: str, choices: Sequence[int] | None = None) -> None:
    """The option of a setting of the recipe that is a whole number."""
    metavar = "N" if choices is None else "{" + ",".join(map(str, choices)) + "}"
    group.add_argument(
        f"--{name.replace('_', '-')}",
        type=int,
        default=Recipe.__dataclass_fields__[name].default,
        choices=choices,
        metavar=metavar,
        help=help_of(name),
    )


def add_machine(parser: argparse.ArgumentParser, description: str, memory: str) -> None:
    """The options of a `Machine`; memory: the help text of its budget."""
    group = parser.add_argument_group("machine", description)
    group.add_argument(
        "--device",
        choices=DEVICES,
        default=CPU,
        help="what computes; cuda wants onnxruntime-gpu and cupy (default: cpu)",
    )
    group.add_argument("--threads", type=int, metavar="N", help="threads to compute with (default: all cores)")
    group.add_argument("--memory-budget", type=size, metavar="SIZE", help=memory)


def machine_of(arguments: argparse.Namespace) -> Machine:
    with settings():
        return Machine(device=arguments.device, threads=arguments.threads, memory_budget=arguments.memory_budget)


@contextmanager
def settings() -> Iterator[None]:
    """What is wrong with a setting, told of the option that it came from."""
    try:
        yield
    except RecipeError as error:
        name, told = str(error).split(" ", 1)
        raise RecipeError(f"--{name.replace('_', '-')} {told}") from None
