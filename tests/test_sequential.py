"""Reading a source in order gives the shards that reading at random gives, within a bound of memory."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.files import open_locked, read_json, sha256, write_json
from tests.helpers import ROOT, files, start_python, wait_for
from tools.make_shards import pack
from tools.packing import sequential


@pytest.mark.parametrize("window", [10_000, 2**27])
def test_the_same_shards(
    small: Path,
    clean: dict[str, bytes],
    tmp_path: Path,
    window: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With windows much smaller and much larger than a shard; nothing is left of what was spilled."""
    monkeypatch.setattr(sequential, "WINDOW_BYTES", window)
    spilled = []
    real = sequential.spill_segment
    monkeypatch.setattr(sequential, "spill_segment", lambda work: spilled.append(len(work.samples)) or real(work))
    pack(small, tmp_path / "shards", samples_per_shard=9, workers=1, sequential_read=True, val_fraction=0)
    assert files(tmp_path / "shards") == clean
    assert sum(spilled) == 90 and (len(spilled) == 1) == (window > 10_000)


def test_skipped_and_noted_images_are_the_same_too(small: Path, tmp_path: Path) -> None:
    """What becomes of odd images does not depend on how they are read."""
    raw = tmp_path / "raw"
    raw.mkdir()
    for tar in small.glob("*.tar"):
        content = bytearray(tar.read_bytes())
        content[512:700] = bytes(188)  # the first image's headers
        content[30_000:30_010] = b"\xff\x55\x12" * 3 + b"\x12"  # the middle of another's data
        (raw / tar.name).write_bytes(content)
    options = {"samples_per_shard": 20, "workers": 1, "val_fraction": 0}
    for name, in_order in (("random", False), ("order", True)):
        pack(raw, tmp_path / name, on_bad="skip", sequential_read=in_order, **options)
    assert files(tmp_path / "order") == files(tmp_path / "random")
    manifest = read_json(tmp_path / "order" / "train" / "manifest.json")
    assert len(manifest["skipped"]) == 3 and len(manifest["repairs"]) >= 1


def test_killed_while_reading(
    small: Path,
    clean: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Finished segments survive: the second run reads what the first had not, and ends with the same bytes."""
    program = f"""
import sys
from pathlib import Path
from tools.packing import sequential
from tools.make_shards import pack
sequential.WINDOW_BYTES = 20_000
if __name__ == "__main__":
    options = dict(samples_per_shard=9, workers=1, sequential_read=True, val_fraction=0)
    pack(Path({str(small)!r}), Path({str(tmp_path / "killed")!r}), **options)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = start_python("-c", program, env=environment)
    train = tmp_path / "killed" / "train"
    wait_for(lambda: len(list(train.glob("spill-*/*.json"))) >= 5, process)
    process.kill()
    process.communicate()
    notes = sorted(train.glob("spill-*/*.json"))
    assert len(notes) >= 5 and not list(train.glob("*.tar"))
    notes[0].write_bytes(b"{")  # damage is found out and the segment read again
    with notes[1].with_suffix(".bin").open("r+b") as file:
        file.truncate(1000)
    monkeypatch.setattr(sequential, "WINDOW_BYTES", 20_000)
    pack(small, tmp_path / "killed", samples_per_shard=9, workers=1, sequential_read=True, val_fraction=0)
    assert files(tmp_path / "killed") == clean


def test_it_is_one_machines_work(small: Path, tmp_path: Path) -> None:
    """Each part would read the whole source; that is refused."""
    with pytest.raises(ValueError, match="cannot be shared out"):
        pack(small, tmp_path / "shards", workers=1, sequential_read=True, part="1/2", val_fraction=0)
    assert not (tmp_path / "shards").exists()


def test_two_at_a_time(small: Path, tmp_path: Path) -> None:
    """The second is refused, and leaves the first's work alone."""
    pack(small, tmp_path / "shards", samples_per_shard=9, workers=1, part="1/2", val_fraction=0)
    digest = read_json(tmp_path / "shards" / "train" / "plan.json")["plan"]
    spill = tmp_path / "shards" / "train" / f"spill-{digest[:16]}"
    spill.mkdir()
    with open_locked(spill / "lock", wait=False), pytest.raises(BlockingIOError):
        pack(small, tmp_path / "shards", samples_per_shard=9, workers=1, sequential_read=True, val_fraction=0)
    pack(small, tmp_path / "shards", samples_per_shard=9, workers=1, val_fraction=0)
    assert not spill.exists(), "what another pack spilled goes when the split is whole"


def test_spilled_images_of_another_pack_are_not_taken(small: Path, tmp_path: Path) -> None:
    """A spill that was left behind is known by its plan."""
    options = {"samples_per_shard": 9, "workers": 1}
    pack(small, tmp_path / "clean", seed=7, **options, val_fraction=0)  # type: ignore[arg-type]
    pack(small, tmp_path / "shards", part="1/2", **options, val_fraction=0)  # type: ignore[arg-type]
    digest = read_json(tmp_path / "shards" / "train" / "plan.json")["plan"]
    for path in (tmp_path / "shards" / "train").iterdir():
        path.unlink()
    spill = tmp_path / "shards" / "train" / f"spill-{digest[:16]}"
    spill.mkdir()
    for suffix in (".bin", ".npy"):
        (spill / f"segment-000000{suffix}").write_bytes(b"other")
    note = {"bin_bytes": 5, "npy_sha256": sha256(b"other"), "results_sha256": sha256(b"{}"), "results": {}}
    write_json(spill / "segment-000000.json", note)
    pack(small, tmp_path / "shards", seed=7, sequential_read=True, **options, val_fraction=0)  # type: ignore[arg-type]
    assert files(tmp_path / "shards") == files(tmp_path / "clean")


@pytest.mark.parametrize(
    ("suffix", "damage"),
    [
        (".npy", lambda data: data[:-8] + b"\xff" * 8),
        (".npy", lambda data: b"\x93NUMPY" + data[:-6]),
        (".json", lambda data: data.replace(b'"results": {}', b'"results": {"0": ["a", "b"], "1": [["c"]]}')),
        (".json", lambda data: b"[" * 10**5),
        (".json", lambda data: b"[]"),
    ],
)
def test_damaged_spills_are_written_again(
    small: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    suffix: str,
    damage: Callable[[bytes], bytes],
) -> None:
    """What a killed pack spilled and a disk damaged, even of the same length, is not merged."""
    options = {"samples_per_shard": 9, "workers": 1, "sequential_read": True}
    pack(small, tmp_path / "clean", **options, val_fraction=0)  # type: ignore[arg-type]

    def stop(work: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sequential, "merge_shards", stop)
        pack(small, tmp_path / "shards", **options, val_fraction=0)  # type: ignore[arg-type]
    (spilled,) = (tmp_path / "shards").glob(f"train/spill-*/segment-000000{suffix}")
    before = spilled.read_bytes()
    spilled.write_bytes(damage(before))
    assert spilled.read_bytes() != before
    pack(small, tmp_path / "shards", **options, val_fraction=0)  # type: ignore[arg-type]
    assert files(tmp_path / "shards") == files(tmp_path / "clean")
