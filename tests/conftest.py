"""What all tests need of the process they run in."""

from __future__ import annotations

import signal

import pytest
from gpus import Emulated, Gpu, emulated, gpu


def pytest_configure() -> None:
    """A shell lets its background jobs ignore Ctrl-C, and with them the commands that tests start and interrupt."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def emulated_gpu(tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    return emulated(tmp_path_factory.mktemp("emulated_gpu"))


@pytest.fixture(scope="session")
def real_gpu() -> Gpu:
    return gpu()
