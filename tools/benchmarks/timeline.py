"""Where the time of training steps goes, from a trace of torch's profiler.

The host marks the window that counts, and in it the waits for input and the steps. On a GPU the trace has the kernels
and copies of the whole process, DALI's too (CUPTI sees them all; their `cat` is "kernel", "gpu_memcpy" or
"gpu_memset"): it is busy where any of them runs. The network's kernels are those on the streams where torch's own
(`at::native`) run; DALI has streams of its own. They run beside each other, so that the parts of "busy" may add up to
more.
"""

import json
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

WINDOW, WAIT, STEP = "steps that count", "waiting for input", "step"
"""Names of what the host marks with `torch.profiler.record_function`."""
TORCHS_OWN = "at::native"
LABELS = {
    "host_wait_percent": "host: waiting for input",
    "host_step_percent": "host: step, or queueing it",
    "host_rest_percent": "host: the rest",
    "busy_percent": "GPU: busy",
    "network_kernels_percent": "GPU: the network's kernels",
    "input_kernels_percent": "GPU: the input's kernels",
    "copies_percent": "GPU: copies",
    "idle_percent": "GPU: idle",
}
"""What `Timeline.percent` has, for people."""

Interval = tuple[float, float]
"""Start and end, in microseconds."""


class Timeline(NamedTuple):
    """Where the time of some steps goes."""

    step_ms: float
    """Of one step, by the host's clock."""
    percent: dict[str, float]
    """Of that, by the keys of `LABELS`; without those of the GPU where it did nothing."""

    def show(self, steps: int) -> None:
        """Print a line for each part."""
        width = max(map(len, LABELS.values()))
        print(f"{f'where {steps} training steps spend their time':<{width}} {'ms a step':>10} {'percent':>8}")
        for key, percent in self.percent.items():
            print(f"{LABELS[key]:<{width}} {percent / 100 * self.step_ms:>10.2f} {percent:>8.1f}")


def covered(intervals: Iterable[Interval], window: Interval) -> float:
    """Length of the part of `window` that lies in any of the intervals, which may overlap and come in any order."""
    total, reached = 0.0, window[0]
    for start, end in sorted(intervals):
        start, end = max(start, reached), min(end, window[1])
        if end > start:
            total, reached = total + end - start, end
    return total


def read_timeline(events: list[dict[str, Any]], steps: int) -> Timeline:
    """Where the time goes in the window, which holds so many steps.

    Args:
        events: `traceEvents` of a Chrome trace, as torch's profiler writes it; times in microseconds.
        steps: Number of steps in the window.
    """
    complete = [event for event in events if event.get("ph") == "X"]
    marked = [event for event in complete if event.get("cat") == "user_annotation"]
    (window,) = intervals_of(event for event in marked if event["name"] == WINDOW)
    whole = window[1] - window[0]

    def percent(chosen: Iterable[dict[str, Any]]) -> float:
        return 100 * covered(intervals_of(chosen), window) / whole

    waiting, stepping = (percent(event for event in marked if event["name"] == name) for name in (WAIT, STEP))
    parts = {"host_wait_percent": waiting, "host_step_percent": stepping}
    parts["host_rest_percent"] = 100 - waiting - stepping
    kernels = [event for event in complete if event.get("cat") == "kernel"]
    copies = [event for event in complete if event.get("cat") in ("gpu_memcpy", "gpu_memset")]
    if kernels or copies:
        networks = {event["args"]["stream"] for event in kernels if TORCHS_OWN in event["name"]}
        busy = percent(kernels + copies)
        parts |= {
            "busy_percent": busy,
            "network_kernels_percent": percent(
                event for event in kernels if event["args"]["stream"] in networks
            ),
            "input_kernels_percent": percent(
                event for event in kernels if event["args"]["stream"] not in networks
            ),
            "copies_percent": percent(copies),
            "idle_percent": 100 - busy,
        }
    return Timeline(whole / steps / 1e3, parts)


def intervals_of(events: Iterable[dict[str, Any]]) -> list[Interval]:
    """When events of a trace began and ended."""
    return [(float(event["ts"]), float(event["ts"]) + float(event["dur"])) for event in events]


def traced(work: Callable[[], None]) -> list[dict[str, Any]]:
    """Do something under torch's profiler, on host and device; returns the trace's events."""
    with torch.profiler.profile() as profile:
        work()
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch, "trace.json")
        profile.export_chrome_trace(str(file))
        events: list[dict[str, Any]] = json.loads(file.read_text())["traceEvents"]
    return events
