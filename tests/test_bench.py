"""The benchmark runs every contender on the same files and prints ratios from one run."""

import json
from pathlib import Path

from tests.conftest import run_ok


def test_loader(shards: Path, tmp_path: Path) -> None:
    """Three rows, positive rates, a ratio each; rows on disk tell commit, hardware and versions."""
    out = tmp_path / "rows.jsonl"
    text = run_ok(
        "tools/bench.py", "loader", shards, "--seconds", "0.2", "--repeats", "2", "--batch-size", "32", "--out", out
    )
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["contender"].split()[0] for row in rows] == ["libjpeg-turbo", "DALI", "loader"]
    for row in rows:
        assert (
            row["median"] > 0
            and len(row["values"]) == 2
            and row["versions"]["dali"]
            and row["cpu"]
            and row["contender"] in text
        )
    assert "1.00" in text
