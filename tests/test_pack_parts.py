"""Parts of a pack, and what packers find of each other: shards, notes, a plan and classes. All in this process; packers
in processes of their own are in tests/test_pack.py."""

from pathlib import Path

import pytest

from pipeline.files import read_json
from tests.helpers import files, tar_of, write
from tools.make_shards import pack
from tools.packing.plan import find_part


def test_parts_one_after_the_other(
    small: Path, clean: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each part packs its share; only the last one finds all shards there and writes the manifest."""
    for number, done in ((3, 3), (1, 7), (2, 10)):
        pack(small, tmp_path / "shards", samples_per_shard=9, workers=1, part=f"{number}/3", val_fraction=0)
        assert len(list((tmp_path / "shards").rglob("*.tar"))) == done
        assert (tmp_path / "shards" / "train" / "manifest.json").exists() == (done == 10)
        assert ("shards are left to other parts" in capsys.readouterr().out) == (done < 10)
    assert files(tmp_path / "shards") == clean


@pytest.mark.parametrize(
    ("part", "environment", "expected"),
    [
        (None, {}, (0, 1)),
        ("1/4", {}, (0, 4)),
        ("4/4", {}, (3, 4)),
        ("0/4", {}, (3, 4)),
        (None, {"RANK": "0", "WORLD_SIZE": "2"}, (0, 2)),
        (None, {"RANK": "1", "WORLD_SIZE": "2"}, (1, 2)),
        (None, {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "6"}, (5, 6)),
        (None, {"SLURM_PROCID": "0", "SLURM_NTASKS": "6"}, (0, 1)),  # a batch script, before any srun
        (None, {"RANK": "1", "WORLD_SIZE": "2", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, (1, 2)),
        ("1/1", {"RANK": "1", "WORLD_SIZE": "2"}, (0, 1)),
    ],
)
def test_parts_come_from_the_option_or_the_environment(
    part: str | None, environment: dict[str, str], expected: tuple[int, int]
) -> None:
    """Counted from 0 or from 1, n parts are n different ones."""
    assert find_part(part, environment)[:2] == expected


@pytest.mark.parametrize("part", ["5/4", "1/0", "x", "1/2/3", "-1/4", "a/b", "1/"])
def test_wrong_parts(part: str) -> None:
    """They are refused by name."""
    with pytest.raises(ValueError, match="--part"):
        find_part(part, {})


def test_damaged_notes_are_written_again(small: Path, clean: dict[str, bytes], tmp_path: Path) -> None:
    """A shard whose NAME.json is empty, cut or of another form is packed again."""
    shards = tmp_path / "shards"
    pack(small, shards, samples_per_shard=9, workers=1, part="1/2", val_fraction=0)
    tars = sorted(shards.rglob("*.tar"))
    for tar, note in zip(tars, (b"", b"[]", b"{}", b"[1]", b"x" * 99), strict=True):
        tar.with_suffix(".json").write_bytes(note)
    pack(small, shards, samples_per_shard=9, workers=1, val_fraction=0)
    assert files(shards) == clean


def test_a_split_without_its_plan_is_refused(small: Path, tmp_path: Path) -> None:
    """Nobody knows of what its shards are; with another seed half of them would be wrong."""
    shards = tmp_path / "shards"
    pack(small, shards, samples_per_shard=9, workers=1, part="1/2", val_fraction=0)
    (shards / "train" / "plan.json").unlink()
    before = files(shards)
    with pytest.raises(ValueError, match=r"expected plan\.json or manifest\.json"):
        pack(small, shards, samples_per_shard=9, workers=1, seed=1, val_fraction=0)
    assert files(shards) == before


def test_packers_share_the_work(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard that another packer has written since this one began is not written again."""
    from tools import make_shards

    shards = tmp_path / "shards"
    real, written = make_shards.run_jobs, []

    def run_jobs(*arguments: object) -> object:
        monkeypatch.setattr(make_shards, "run_jobs", real)
        pack(small, shards, samples_per_shard=9, workers=1, part="1/2", val_fraction=0)  # the other one
        written.append({path.name: path.stat().st_mtime_ns for path in shards.rglob("*.tar")})
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(make_shards, "run_jobs", run_jobs)
    pack(small, shards, samples_per_shard=9, workers=1, val_fraction=0)
    after = {path.name: path.stat().st_mtime_ns for path in shards.rglob("*.tar")}
    assert len(written[0]) == 5 and len(after) == 10 and written[0].items() <= after.items()


def test_two_packers_with_other_classes(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that comes second is refused, and classes.json is that of the first."""
    from tools import make_shards

    other = tmp_path / "other"
    for tar in small.glob("*.tar"):
        write(other / tar.name.replace("n0", "n1"), tar_of({f"{tar.stem}_1.JPEG": b"x"}))
    real = make_shards.claim_output

    def claim(shards: Path, *arguments: object) -> None:
        monkeypatch.setattr(make_shards, "claim_output", real)
        pack(small, shards, samples_per_shard=9, workers=1, val_fraction=0)
        real(shards, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(make_shards, "claim_output", claim)
    with pytest.raises(ValueError, match="other classes"):
        pack(other, tmp_path / "shards", samples_per_shard=9, workers=1, val_fraction=0)
    names = [row["wnid"] for row in read_json(tmp_path / "shards" / "classes.json")["classes"]]
    assert names == ["n00000011", "n00000022", "n00000033"]
