"""A run's directory: whose it is, and that one run at a time writes to it."""

from pathlib import Path
from typing import BinaryIO

import yaml

from pipeline.files import open_locked, write_bytes
from train.config import Config

PICTURES = ("curves.png", "kernels.png", "augmentation.png", "predictions.png")
OURS = {"config.yaml", "metrics.jsonl", "tensorboard", "checkpoints", "lock", "report.html", *PICTURES}


class RunDirectory:
    """Held by the first process of a run from its start to its end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: BinaryIO | None = None

    def claim(self) -> None:
        """Refuse a directory that holds something else, before anything is written, or whose run goes on elsewhere.
        Raises `ValueError` or `OSError`."""
        names = {each.name.removesuffix(".tmp") for each in self.path.iterdir()} if self.path.is_dir() else set()
        config = self.path / "config.yaml"
        begun = config.is_file() and b"\noptimizer:" in config.read_bytes()
        if (self.path.exists() and not self.path.is_dir()) or names - OURS or (names - {"lock"} and not begun):
            raise ValueError(
                f"{self.path} holds something else; give a --run.dir that is new, empty or an earlier run's"
            )
        if self.path.is_dir():
            self._hold()

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
