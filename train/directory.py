"""A run's directory: whose it is, and that one run at a time writes to it."""

from pathlib import Path
from typing import BinaryIO

import yaml

from pipeline.files import open_locked, write_bytes
from train.config import Config

PICTURES = ("curves.png", "kernels.png", "augmentation.png", "predictions.png")
SECTIONS = (b"data:", b"\ntrain:", b"\nrun:", b"\nmodel:", b"\noptimizer:")
"""What the configuration of a run of ours has in it."""


class RunDirectory:
    """Held by the first process of a run from its start to its end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: BinaryIO | None = None

    def claim(self) -> None:
        """Refuse a directory that holds something else, before anything is written, or whose run goes on elsewhere.
        Raises `ValueError` or `OSError`."""
        names = {each.name for each in self.path.iterdir()} if self.path.is_dir() else set()
        strangers = sorted(names - {"lock", "config.yaml.tmp"})  # of a run that was killed at once
        if (self.path.exists() and not self.path.is_dir()) or (strangers and not self._is_begun()):
            held = f" ({strangers[0]})" if strangers else ""
            raise ValueError(
                f"{self.path} holds something else{held}; give a --run.dir that is new, empty or an earlier run's"
            )
        if self.path.is_dir():
            self._hold()

    def _is_begun(self) -> bool:
        """Whether a run was begun here: then whatever else lies here, a log, an evaluation, is its own."""
        config, checkpoints = self.path / "config.yaml", self.path / "checkpoints"
        if config.is_file() and all(section in config.read_bytes() for section in SECTIONS):
            return checkpoints.is_dir() or not checkpoints.exists()
        return any(checkpoints.glob("step-*.pt"))

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
        """Make it, and write the resolved configuration. Raises `ValueError` or `OSError`."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._hold()
        write_bytes(self.path / "config.yaml", yaml.safe_dump(config.to_json(), sort_keys=False).encode())
