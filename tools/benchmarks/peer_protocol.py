"""Serve batches of a library that needs an environment of its own to `bench peers`. It does not import this project."""

import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

EPOCH = 200_000
"""Least images per epoch, as beginning one costs most on a small set."""


def serve(load: Callable[[dict[str, Any], Path], Iterator[tuple[Any, Any]]]) -> None:
    """Load a batch, print a line, and repeat this for each line on stdin, by `load(settings, folder to write into)`.

    The settings are the file of JSON named on the command line, and `numbers`, those of an epoch's images. With `show`
    each batch is saved as an `.npz` of images and labels before its line is printed.
    """
    warnings.simplefilter("ignore")
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # keep what libraries print out of the answers
    path = Path(sys.argv[1])
    settings = json.loads(path.read_text())
    numbers = np.arange(len(settings["files"]))
    settings["numbers"] = np.tile(numbers, 1 if settings["show"] else -(-EPOCH // len(numbers)))
    for images, labels in load(settings, path.parent):
        if settings["show"]:
            np.savez(path.with_suffix(".npz"), images=np.asarray(images), labels=np.asarray(labels))
        print("done", file=answers)
        if not sys.stdin.readline():
            break
    os._exit(0)  # the library's threads are still running
