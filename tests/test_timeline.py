"""Busy and idle are what made-up intervals and traces give by hand."""

import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.profiler import record_function

from tools.benchmarks.timeline import STEP, WAIT, WINDOW, covered, read_timeline, traced


@pytest.mark.parametrize(
    ("intervals", "length"),
    [
        ([], 0),
        ([(2, 2)], 0),
        ([(12, 14), (11, 13)], 3),  # overlapping, out of order
        ([(11, 19), (12, 13), (14, 15)], 8),  # nested
        ([(11, 12), (12, 13), (15, 16)], 3),  # touching, and a gap
        ([(11, 12), (11, 12), (11, 15)], 4),  # the same twice, the same start
        ([(0, 11), (19, 30)], 2),  # cut off at both ends
        ([(0, 5), (25, 30)], 0),  # outside
        ([(0, 30)], 10),
    ],
)
def test_covered(intervals: list[tuple[float, float]], length: float) -> None:
    """Of the window from 10 to 20."""
    assert covered(intervals, (10, 20)) == length


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)).map(lambda pair: (min(pair), max(pair)))))
def test_covered_is_a_count_of_points(intervals: list[tuple[int, int]]) -> None:
    """Each unit of the window counts once if any interval has it."""
    points = [n for n in range(10, 30) if any(start <= n < end for start, end in intervals)]
    assert covered(intervals, (10, 30)) == len(points)


def event(cat: str, name: str, ts: float, dur: float, stream: int = 0) -> dict[str, Any]:
    """An event as Chrome traces have them."""
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "args": {"stream": stream}}


HOST = [
    event("user_annotation", WINDOW, 1000, 2000),
    event("user_annotation", WAIT, 500, 100),  # before the window
    event("user_annotation", WAIT, 1000, 300),
    event("user_annotation", STEP, 1300, 600),
    event("user_annotation", WAIT, 2000, 100),
    event("user_annotation", STEP, 2100, 800),
    {"ph": "M", "name": "process_name", "ts": 0},
]


def test_timeline() -> None:
    """By hand: 2 steps of 1 ms; kernels of torch's stream are the network's, whatever their name; those of others the
    input's; what overlaps counts once as busy."""
    host = {"host_wait_percent": 20, "host_step_percent": 70, "host_rest_percent": 10}
    assert read_timeline(HOST, 2) == (1.0, host)
    device = [
        event("kernel", "void at::native::vectorized_elementwise_kernel<4>", 1200, 100, 7),
        event("kernel", "sm90_xmma_fprop", 1300, 900, 7),
        event("kernel", "void dali::SliceFlipNormalize", 2100, 200, 21),  # half of it beside the network's
        event("kernel", "cub::DeviceScan", 2300, 100, 21),
        event("gpu_memcpy", "Memcpy HtoD", 2500, 60, 22),
        event("gpu_memset", "Memset", 2550, 50, 7),
        event("gpu_user_annotation", WINDOW, 1000, 2000, 7),  # is no work
        event("cuda_runtime", "cudaLaunchKernel", 1000, 2000),
    ]
    found = read_timeline(HOST + device, 2).percent
    gpu = {
        "busy_percent": 65,
        "network_kernels_percent": 50,
        "input_kernels_percent": 15,
        "copies_percent": 5,
    }
    assert found == pytest.approx(host | gpu | {"idle_percent": 35})


def test_a_real_trace(capsys: pytest.CaptureFixture[str]) -> None:
    """What the host marks comes out of torch's profiler with the times that it took."""

    def work() -> None:
        with record_function(WINDOW):
            for _ in range(2):
                with record_function(WAIT):
                    time.sleep(0.03)
                with record_function(STEP):
                    time.sleep(0.06)

    timeline = read_timeline(traced(work), 2)
    assert (
        timeline.step_ms >= 90
        and timeline.percent["host_step_percent"] > timeline.percent["host_wait_percent"]
    )
    assert timeline.percent["host_wait_percent"] * timeline.step_ms / 100 >= 30
    assert sum(timeline.percent.values()) == pytest.approx(100)
    timeline.show(2)
    assert capsys.readouterr().out.count("\nhost: ") == 3
