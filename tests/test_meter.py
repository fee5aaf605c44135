from __future__ import annotations

import numpy as np
import pytest

from awq_onnx.meter import SAMPLE_SECONDS, STATUS, Meter


def test_a_stage_that_runs_twice_adds_up() -> None:
    with Meter() as meter:
        with meter.stage("search"):
            pass
        once = meter.seconds["search"]
        with meter.stage("search"):
            pass
        with meter.stage("write"):
            pass
    assert set(meter.seconds) == {"search", "write"}
    assert meter.seconds["search"] > once
    assert meter.total_seconds >= sum(meter.seconds.values())


def test_a_stage_that_fails_is_timed_and_its_error_goes_on() -> None:
    with Meter() as meter, pytest.raises(ValueError, match="on purpose"), meter.stage("search"):
        raise ValueError("on purpose")
    assert "search" in meter.seconds


@pytest.mark.skipif(not STATUS.exists(), reason="memory is read from /proc")
def test_the_peak_counts_memory_that_is_given_back_before_the_end() -> None:
    size_bytes = 64 << 20
    with Meter() as meter:
        block = np.ones(size_bytes, np.uint8)
        for _ in range(200):
            if (meter.peak_private_bytes or 0) > size_bytes:
                break
            meter._done.wait(SAMPLE_SECONDS)
        del block
        meter._done.wait(5 * SAMPLE_SECONDS)
    assert meter.peak_private_bytes is not None
    assert meter.peak_resident_bytes is not None
    assert meter.peak_resident_bytes >= meter.peak_private_bytes > size_bytes


def test_the_sampling_thread_ends_with_the_meter() -> None:
    with Meter() as meter:
        pass
    assert not meter._sampler.is_alive()
