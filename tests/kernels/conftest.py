from __future__ import annotations

import pytest
from gpus import Emulated, Gpu


@pytest.fixture(scope="session", params=["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Emulated | Gpu:
    """Every test that takes it runs on the emulated GPU, and on a real one where there is one."""
    made: Emulated | Gpu = request.getfixturevalue("emulated_gpu" if request.param == "emulated" else "real_gpu")
    return made
