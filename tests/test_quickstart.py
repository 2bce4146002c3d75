"""`make quickstart` itself, on the demo: it learns what it promises, and shows it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT


@pytest.mark.slow
def test_quickstart(tmp_path: Path) -> None:
    """From nothing to at least 94 % ten-view top-1, with table and pictures; again, there is nothing to pack."""
    place = [f"BIN={Path(sys.executable).parent}", f"DEMO={tmp_path / 'a demo'}", f"RUN={tmp_path / 'a run'}"]
    command = ["make", "--assume-old=install", "quickstart", *place]
    for attempt in range(2):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        accuracy = re.search(r"^ten-view top-1 accuracy: +([\d.]+) %$", done.stdout, re.M)
        assert accuracy and float(accuracy[1]) >= 94
        for name in ("images", "shards", "centre top-1 accuracy", "training speed", "waiting for input"):
            assert re.search(rf"^{name}: ", done.stdout, re.M)
        for picture in ("curves", "kernels", "augmentation"):
            assert (tmp_path / "a run" / f"{picture}.png").is_file()
        assert (tmp_path / "a run" / "report.html").is_file() and "a run/report.html" in done.stdout
        assert done.stdout.count("nothing to do") == 3 * attempt
