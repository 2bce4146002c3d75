"""Reading a source in order gives the shards that reading at random gives, within a bound of memory."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT, run_ok
from tests.test_pack import clean, files, small  # noqa: F401 (fixtures)
from tools import sequential
from tools.make_shards import pack


@pytest.mark.parametrize("window", [10_000, 2**27])
def test_the_same_shards(
    small: Path,  # noqa: F811
    clean: dict[str, bytes],  # noqa: F811
    tmp_path: Path,
    window: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With windows much smaller and much larger than a shard; nothing is left of what was spilled."""
    monkeypatch.setattr(sequential, "WINDOW_BYTES", window)
    spilled = []
    real = sequential.spill_segment
    monkeypatch.setattr(sequential, "spill_segment", lambda work: spilled.append(len(work.samples)) or real(work))
    pack(small, tmp_path / "shards", samples_per_shard=9, workers=1, sequential_read=True)
    assert files(tmp_path / "shards") == clean
    assert sum(spilled) == 90 and (len(spilled) == 1) == (window > 10_000)


def test_undecodable_images_are_the_same_too(raw: Path, tmp_path: Path) -> None:
    """Notes and skipped images come out as in a random pack (the demo has notes; one image is made undecodable)."""
    import tarfile

    source = tmp_path / "raw"
    source.mkdir()
    for path in raw.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    with tarfile.open(raw / "ILSVRC2012_img_val.tar") as tar:
        member = tar.getmembers()[7]
    with (source / "ILSVRC2012_img_val.tar").open("r+b") as file:
        file.seek(member.offset_data)
        file.write(bytes(member.size))
    for name, in_order in (("random", False), ("order", True)):
        pack(source, tmp_path / name, samples_per_shard=200, workers=2, on_bad="skip", sequential_read=in_order)
    assert files(tmp_path / "order") == files(tmp_path / "random")
    assert b'"skipped": [\n  {' in (tmp_path / "order" / "val" / "manifest.json").read_bytes()


def test_killed_while_reading(raw: Path, tmp_path: Path) -> None:
    """Finished segments survive: the second run reads what the first had not, and ends with the same bytes."""
    program = f"""
import sys
from pathlib import Path
from tools import sequential
from tools.make_shards import pack
sequential.WINDOW_BYTES = 500_000
if __name__ == "__main__":
    pack(Path({str(raw)!r}), Path({str(tmp_path / "killed")!r}), samples_per_shard=100, workers=1, sequential_read=True)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    spill = tmp_path / "killed" / "train" / "spill"
    while len(list(spill.glob("*.json"))) < 5:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {path.name: path.stat().st_mtime_ns for path in spill.glob("*.json")}
    assert len(kept) >= 5 and not list(spill.parent.glob("*.tar"))
    again = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert not spill.exists()
    run_ok("tools/make_shards.py", "pack", raw, tmp_path / "clean", "--samples-per-shard", "100")
    assert files(tmp_path / "killed") == files(tmp_path / "clean")


def test_it_is_one_machines_work(small: Path, tmp_path: Path) -> None:  # noqa: F811
    """Each part would read the whole source; that is refused."""
    with pytest.raises(ValueError, match="cannot be shared out"):
        pack(small, tmp_path / "shards", workers=1, sequential_read=True, part="1/2")
    assert not (tmp_path / "shards").exists()
