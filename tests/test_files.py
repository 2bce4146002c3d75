"""Files are whole or not there."""

from pathlib import Path

import pytest

from pipeline.files import atomic_writer, read_json, write_json


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    """An exception in the middle keeps what was there and leaves no temporary file."""
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_writer(path) as file:
        file.write(b"half of the new")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_json_round_trip(tmp_path: Path) -> None:
    """Big integers and names beyond ASCII come back; damage is one sentence."""
    content = {"sum": 2**80, "words": "très", "list": [1.5, None]}
    write_json(tmp_path / "a.json", content)
    assert read_json(tmp_path / "a.json") == content
    (tmp_path / "b.json").write_bytes(b"\xff{")
    with pytest.raises(ValueError, match=r"b\.json is not valid JSON"):
        read_json(tmp_path / "b.json")
