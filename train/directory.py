"""A run's directory: whose it is, and that one run at a time writes to it."""

from pathlib import Path
from tempfile import TemporaryFile
from typing import BinaryIO

import yaml

from pipeline.files import open_locked, write_bytes
from train.checkpoint import find_checkpoint
from train.config import Config, is_run_config
from train.metrics import read_metrics

FILES, FOLDERS = ("config.yaml", "metrics.jsonl"), ("checkpoints", "tensorboard")


class RunDirectory:
    """Held by the first process of a run from its start to its end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: BinaryIO | None = None

    def claim(self) -> None:
        """Refuse a directory that holds something else, before anything is written, whose run goes on elsewhere, or
        where checkpoints are lost or cannot be written. Raises `ValueError` or `OSError`."""
        names = {each.name for each in self.path.iterdir()} if self.path.is_dir() else set()
        strangers = sorted(names - {"lock", "config.yaml.tmp"})  # of a run that was killed at once
        if (self.path.exists() and not self.path.is_dir()) or (strangers and not self._is_begun()):
            held = f" ({strangers[0]})" if strangers else ""
            raise ValueError(
                f"{self.path} holds something else{held}; give a --run.dir that is new, empty or an earlier run's"
            )
        if self.path.is_dir():
            self._check_kinds()
            self._hold()
            self._check_checkpoints()

    def _check_kinds(self) -> None:
        """Refuse folders in place of files, and the reverse; a link that leads nowhere is neither."""
        for path in (self.path / name for name in (*FILES, *FOLDERS)):
            sound, kind = (path.is_file(), "file") if path.name in FILES else (path.is_dir(), "folder")
            if (path.is_symlink() or path.exists()) and not sound:
                leads = f" but a link to {path.readlink()}" if path.is_symlink() else ""
                raise ValueError(
                    f"{path} is no {kind}{leads}; mount or put back what belongs there, or remove it"
                )

    def _check_checkpoints(self) -> None:
        """Refuse a folder of checkpoints that cannot be written, or from which those that rows tell of are gone."""
        checkpoints, metrics = self.path / "checkpoints", self.path / "metrics.jsonl"
        if checkpoints.is_dir():
            with TemporaryFile(dir=checkpoints):
                pass
        rows = read_metrics(metrics) if find_checkpoint(self.path) is None else []
        # A run that was killed before its first one has the folder, and rows that tell of none.
        if rows and (not checkpoints.is_dir() or any("saved_step" in row for row in rows)):
            raise ValueError(
                f"{metrics} tells of {rows[-1]['step']} steps, but {checkpoints} holds none of their checkpoints; put "
                f"them back, give another --run.dir, or remove {metrics} to begin anew"
            )

    def _is_begun(self) -> bool:
        """Whether a run was begun here: then whatever else lies here, a log, an evaluation, is its own."""
        return is_run_config(self.path / "config.yaml") or any((self.path / "checkpoints").glob("step-*.pt"))

    def _hold(self) -> None:
        """Take the lock, which ends with this process however that ends."""
        if self._lock is None:
            try:
                self._lock = open_locked(self.path / "lock", wait=False)
            except BlockingIOError:
                raise ValueError(
                    f"another run is writing to {self.path}; wait until it has ended, or give another --run.dir"
                ) from None

    def prepare(self, config: Config) -> None:
        """Make it and its folder of checkpoints, and write the resolved configuration. Raises `ValueError` or
        `OSError`."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._hold()
        content = config.to_json()
        content["data"]["shards"] = str(
            config.data.shards.absolute()
        )  # the run may go on from another folder
        write_bytes(self.path / "config.yaml", yaml.safe_dump(content, sort_keys=False).encode())
        (self.path / "checkpoints").mkdir(exist_ok=True)  # behind what tells that the directory is a run's
