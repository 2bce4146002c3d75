import sys
from importlib.util import find_spec

if find_spec("jsonargparse") is None:
    sys.stderr.write(
        "error: this Python has no jsonargparse; run `make install` once, then .venv/bin/python -m train.run\n"
    )
    sys.exit(2)
