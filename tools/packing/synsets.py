"""Read the devkit's `meta.mat` from standard input and write the classes as JSON.

A process of its own for `tools/packing/ilsvrc.py`: scipy's reader is compiled code, which damaged bytes make end the
process that it is in (one wrong byte in four does), or ask for all of the memory.
"""

import io
import json
import resource
import sys

from scipy.io import loadmat

MEMORY_BYTES = 2**29
"""Room for libraries and a table of some ten thousand rows, none for what damage makes of one."""


def main() -> None:
    """Write [[ILSVRC2012_ID, WNID, words, num_children], ...]; what is odd raises."""
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
    synsets = loadmat(io.BytesIO(sys.stdin.buffer.read()), squeeze_me=True)["synsets"]
    rows = [
        [int(row["ILSVRC2012_ID"]), str(row["WNID"]), str(row["words"]), int(row["num_children"])] for row in synsets
    ]
    sys.stdout.write(json.dumps(rows))


if __name__ == "__main__":
    main()
