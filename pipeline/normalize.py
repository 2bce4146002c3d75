"""CPU post-processing: flip uint8 crops, subtract the per-image mean, scale, write float32.

DALI's `crop_mirror_normalize`, which does it on a GPU, takes 0.15 ms a window there. Here a row of interleaved pixels
meets a row of repeated means, one window at a time while it is in the core's cache: 0.05 ms.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def normalize(
    windows_NHWC: torch.Tensor,
    mirrored_N: torch.Tensor | None,
    means_N3: torch.Tensor,
    divisor: float,
    offset_HWC: torch.Tensor | None,
    out_NHWC: torch.Tensor,
) -> None:
    """Write (windows, or their mirror images, - means - offset) / divisor to `out_NHWC`.

    Args:
        windows_NHWC: uint8 RGB, shape (N, height, width, 3).
        mirrored_N: which ones are flipped horizontally, shape (N,); None: none.
        means_N3: float32, shape (N, 3).
        divisor: What pixels are divided by, by way of its inverse.
        offset_HWC: float32, subtracted from every window, as it is; None: nothing.
        out_NHWC: float32, C-contiguous.
    """
    _, height, width, colours = windows_NHWC.shape
    rows = (height, width * colours)
    flags = [0] * len(windows_NHWC) if mirrored_N is None else mirrored_N.tolist()
    with one_thread():
        means = means_N3.repeat(1, width)
        for window, mirrored, mean, out in zip(windows_NHWC, flags, means, out_NHWC, strict=True):
            target = out.view(rows)
            target.copy_((window.flip(1) if mirrored else window).view(rows))
            target.sub_(mean)
            if offset_HWC is not None:
                target.sub_(offset_HWC.reshape(rows))
            if divisor != 1:
                target.mul_(1 / divisor)


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute in the calling thread alone: its others would spin for a while after each operation, on cores
    that DALI's threads want."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class BufferPool:
    """Memory for float32 batches that is used again as soon as nobody holds the batch: the page faults of new memory
    cost more than everything that is done to a window."""

    KEPT = 3
    """Free batches at most: what a trainer holds at a time, and one more."""

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []

    def acquire(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Uninitialized float32 memory; it counts as held while any view of it is."""
        memory = next((each for each in self._free if each.shape == shape), None)
        if memory is None:
            memory = np.empty(shape, np.float32)
        else:
            self._free = [each for each in self._free if each is not memory]
        owner = np.frombuffer(memory.data, np.float32)  # numpy makes it the base of every view of it
        weakref.finalize(owner, self._give_back, memory).atexit = False
        return torch.from_numpy(owner.reshape(shape))

    def _give_back(self, memory: np.ndarray) -> None:
        if len(self._free) < self.KEPT:
            self._free.append(memory)
