"""A report has every part, whatever becomes of one."""

import re
from pathlib import Path

import pytest
import torch

from pipeline.errors import DataError
from tools.benchmarks import report

PARTS = {
    "broken": ["-c", "1 / 0"],
    "fine": ["-c", "print(6 * 7)"],
    "slow": ["-c", "import time; print('begun', flush=True); time.sleep(60)"],
    "late": ["-c", "print(6 * 7)"],
}


def results(out: Path) -> dict[str, str]:
    """Of each part, from the page's table."""
    page = (out / "report.md").read_text()
    return dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \| \d+ \|$", page, re.MULTILINE))


def test_a_part_that_fails_or_hangs_leaves_the_others(tmp_path: Path) -> None:
    """The others are there with what they printed; an error names what failed, which running out of time is not."""
    with pytest.raises(DataError, match=r"^broken: failed"):
        report.run_parts(PARTS, tmp_path, minutes=0.03)
    assert list(results(tmp_path)) == list(PARTS)
    assert results(tmp_path)["fine"] == "ok" and results(tmp_path)["slow"].startswith("cut off")
    page = (tmp_path / "report.md").read_text()
    assert "ZeroDivisionError" in page and "\n42\n" in page and "\nbegun\n" in page


@pytest.mark.slow
def test_a_whole_report(tmp_path: Path) -> None:
    """It runs through, on a CPU, too, where it says what is left out; rows of the three benchmarks come with it."""
    report.write_report(tmp_path, minutes=10)
    assert set(results(tmp_path).values()) == {"ok"}
    assert {"loader.jsonl", "model.jsonl", "train.jsonl"} <= {path.name for path in tmp_path.iterdir()}
    assert ("left out: GPU tests" in (tmp_path / "report.md").read_text()) == (not torch.cuda.is_available())
