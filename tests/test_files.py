"""Files are whole or not there."""

import errno
import fcntl
import os
from pathlib import Path

import pytest

from pipeline.files import atomic_writer, check_writable, read_json, write_bytes
from tests.helpers import run_python, start_python


def test_whether_a_file_can_be_written(tmp_path: Path) -> None:
    """What keeps it from being written is raised with its name; what is there stays as it is."""
    path = tmp_path / "file"
    path.write_text("old")
    check_writable(path)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    check_writable(tmp_path / "new" / "folder" / "file")
    assert not list((tmp_path / "new" / "folder").iterdir())
    with pytest.raises(OSError, match="file"):
        check_writable(path / "in a file")
    with pytest.raises(OSError, match="/proc/file"):
        check_writable(Path("/proc/file"))


def test_two_writers_of_one_file(tmp_path: Path) -> None:
    """While another process writes a file, the second is refused or waits; the lock dies with a killed writer, whose
    half-written content does not stay."""
    path = tmp_path / "shard.tar"
    program = f"""
import time
from pathlib import Path
from pipeline.files import atomic_writer
with atomic_writer(Path({str(path)!r})) as file:
    file.write(b"half of a much longer content")
    file.flush()
    print("writing", flush=True)
    time.sleep(60)
"""
    other = start_python("-c", program)
    assert other.stdout is not None and other.stdout.readline() == "writing\n"
    with (
        pytest.raises(BlockingIOError, match="another process is writing it"),
        atomic_writer(path, wait=False),
    ):
        pass
    assert path.with_name("shard.tar.tmp").exists() and other.poll() is None
    other.kill()
    other.wait()
    with atomic_writer(path, wait=False) as file:
        file.write(b"whole")
    assert path.read_bytes() == b"whole" and list(tmp_path.iterdir()) == [path]


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some network disks have none: files are written all the same. Any other failure to lock is raised."""
    codes = iter([errno.ENOLCK, errno.EIO])

    def flock(*_: object) -> None:
        raise OSError(code := next(codes), os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    write_bytes(tmp_path / "file", b"content")
    assert (tmp_path / "file").read_bytes() == b"content"
    with pytest.raises(OSError, match="Input/output"):
        write_bytes(tmp_path / "other", b"content")


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    """A write that fails names the file, keeps the old one and leaves nothing half-written."""
    path = tmp_path / "file"
    path.write_text("old")
    program = f"""
import resource
from pathlib import Path
from pipeline.files import write_bytes
from train.cli import run_main
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
run_main(lambda: write_bytes(Path({str(path)!r}), bytes(100_000)))
"""
    done = run_python("-c", program)
    assert done.returncode == 2 and str(path) in done.stderr and "free some space" in done.stderr
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", [b"[" * 10**5, b"9" * 5000, b"\xff\xfe{"])
def test_damaged_json_is_named(tmp_path: Path, content: bytes) -> None:
    """Too deep, too long a number, of another encoding."""
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.json is not valid JSON"):
        read_json(tmp_path / "x.json")
