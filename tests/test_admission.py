"""What is admitted to a shard as it is, DALI decodes whole and in windows to libjpeg's pixels; and no JPEG, however it is
mutated, ends the packer or makes it write what depends on memory that nobody has written to.

Files are decoded in processes of their own, so that a crash is told with the number of its file;
`python -m tests.test_admission DEVICE FIRST LAST` repeats some.
"""

import collections
import io
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.files import read_json
from tests.helpers import files, run_python, tar_of, write
from tests.mutate_jpeg import corpus
from tools.packing.images import find_fault

FEW, MANY = 400, 3500


def windows_of(height: int, width: int) -> list[tuple[int, int, int, int]]:
    """(top, left, bottom, right) of the whole and of a window at each corner."""
    tall, wide = height // 2 + 1, width // 2 + 1
    corners = [(top, left) for top in (0, height - tall) for left in (0, width - wide)]
    return [(0, 0, height, width), *((top, left, top + tall, left + wide) for top, left in corners)]


def decode_admitted(device: str, first: int, last: int) -> None:
    """Decode what is admitted of a part of the corpus by DALI, and print how many that were; raises where DALI's pixels
    are not libjpeg's."""
    from nvidia.dali import fn, pipeline_def

    from pipeline.decode import Decoder, decode_graph

    @pipeline_def(batch_size=1, num_threads=1, device_id=None if device == "cpu" else 0, prefetch_queue_depth=1)
    def whole() -> object:
        return decode_graph(fn.external_source(name="encoded"), Decoder("cpu", True))

    @pipeline_def(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)
    def window() -> object:
        encoded, start, end = (fn.external_source(name=name) for name in ("encoded", "start", "end"))
        shape = fn.peek_image_shape(encoded, adjust_orientation=False)
        return fn.decoders.image_slice(
            encoded, device="cpu", adjust_orientation=False, start=start + 0 * shape[:2], end=end, axes=[0, 1]
        )

    pipes = whole(), window()
    admitted = 0
    for number, data in enumerate(corpus(last)):
        if number < first or find_fault(data):
            continue
        admitted += 1
        print(number, flush=True)
        encoded = [np.frombuffer(data, np.uint8)]
        expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
        for place in windows_of(*expected.shape[:2]):
            pass
    print(f"admitted {admitted}")
