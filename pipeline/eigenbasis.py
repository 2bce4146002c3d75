"""The RGB eigenbasis of a data set: `pca.json`, which tools/compute_pca.py writes.

Fancy PCA (Krizhevsky et al. 2012, section 4.1) shifts an image's colours along the principal axes of the RGB values of
the whole training set.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import UserError
from pipeline.files import read_json
from pipeline.shards import IMAGE_SIDE

FORMAT_VERSION = 1
GEOMETRY = "shorter side 256, central 256x256"


@dataclass(frozen=True)
class Eigenbasis:
    """Mean and principal axes of a data set's RGB values, on the 0..255 scale. Arrays are float64."""

    mean: np.ndarray
    """Shape (3,): mean of R, G, B."""
    eigenvalues: np.ndarray
    """Shape (3,): variances along the axes, descending."""
    eigenvectors: np.ndarray
    """Shape (3, 3): the axes are the columns; the largest component of each is positive."""
    mean_image: np.ndarray | None = None
    """float32 (256, 256, 3): mean of every pixel; None unless it was loaded."""

    @property
    def axis_stddev(self) -> np.ndarray:
        """Shape (3,): standard deviations along the axes, in levels."""
        return np.sqrt(self.eigenvalues)

    @staticmethod
    def load(path: Path, manifest_sha256: str, *, with_mean_image: bool = False) -> "Eigenbasis":
        """Read `pca.json`, and with `with_mean_image` also `mean_image.npy` next to it.

        Raises as `read_eigenbasis`, and `ValueError` for a mean image that is missing or of other images.
        """
        basis = Eigenbasis.from_json(read_eigenbasis(path, manifest_sha256))
        if not with_mean_image:
            return basis
        image = read_mean_image(path.with_name("mean_image.npy"), basis.mean)
        if image is None:
            raise UserError(
                f"{path.with_name('mean_image.npy')} is missing, damaged or of other images; run "
                f"{suggest_command(path, ' --mean-image')}"
            )
        return replace(basis, mean_image=image)

    @staticmethod
    def from_json(content: dict[str, Any]) -> "Eigenbasis":
        """Make a basis of the fields `mean`, `eigenvalues` and `eigenvectors` of `pca.json`. Raises `UserError`."""
        found = [np.asarray(content[name]) for name in ("mean", "eigenvalues", "eigenvectors")]
        # numpy would also convert "1" and true
        numbers = all(each.dtype.kind in "if" and np.isfinite(each).all() for each in found)
        if numbers and [each.shape for each in found] == [(3,), (3,), (3, 3)] and (found[1] >= 0).all():
            mean, eigenvalues, eigenvectors = (each.astype(np.float64) for each in found)
            if np.allclose(eigenvectors.T @ eigenvectors, np.eye(3), atol=1e-3):
                return Eigenbasis(mean, eigenvalues, eigenvectors)
        raise UserError(
            "mean, eigenvalues or eigenvectors are no RGB eigenbasis; run tools/compute_pca.py again"
        )

    def to_json(self) -> dict[str, Any]:
        """Return the fields that `from_json` reads."""
        return {
            "mean": self.mean.tolist(),
            "eigenvalues": self.eigenvalues.tolist(),
            "eigenvectors": self.eigenvectors.tolist(),
        }


def read_eigenbasis(path: Path, manifest_sha256: str) -> dict[str, Any]:
    """Read and check `pca.json`.

    Raises `FileNotFoundError` if it is missing, `UserError` if it is damaged or was made from other shards than those
    of the manifest with this checksum.
    """
    advice = f"run {suggest_command(path)}"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: expected a file, found {'a folder' if path.is_dir() else 'none'}; {advice}"
        )
    content = read_json(path)
    if os.access(path.parent, os.W_OK):
        advice = f"give another file, or remove it and {advice}"
    if not isinstance(content, dict) or content.get("format_version") != FORMAT_VERSION:
        raise UserError(f"{path} is damaged or has another format version; {advice}")
    if content.get("manifest_sha256") != manifest_sha256:
        raise UserError(f"{path} was made from other shards; {advice}")
    pixels = [content.get(name) for name in ("scale", "channel_order", "geometry")]
    if pixels != [255, "RGB", GEOMETRY]:
        raise UserError(f"{path} was made from other pixels than RGB on 0..255, {GEOMETRY}; {advice}")
    try:
        Eigenbasis.from_json(content)
        if type(content["num_images"]) is not int or not isinstance(content["decoder"], str):
            raise UserError("it does not say what it was made of")
        np.asarray(content["axis_stddev"], np.float64)
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path} is damaged: it holds no RGB eigenbasis; {advice}") from None
    return content


def suggest_command(path: Path, options: str = "") -> str:
    """Suggest a command that makes `path`, or another file where that cannot be written."""
    in_shards = path.name == "pca.json" and (path.parent / "train").is_dir()
    shards = path.parent if in_shards else "SHARDS"
    command = f"tools/compute_pca.py {shards}{options}"
    if path.is_dir() or (path.parent.exists() and not os.access(path.parent, os.W_OK)):
        return f"{command} --out FILE, train with --data.eigenbasis FILE (tools: a folder of links to {shards}/*)"
    return command if in_shards else f"{command} --out {path}"


def read_mean_image(path: Path, mean: np.ndarray) -> np.ndarray | None:
    """Read the mean image, float32 (256, 256, 3); None if it is missing or damaged, or its mean is not `mean`."""
    try:
        image = np.load(path, allow_pickle=False)
    except Exception:  # zipfile and numpy raise many kinds for damaged files
        return None
    shape = (IMAGE_SIDE, IMAGE_SIDE, 3)
    if not isinstance(image, np.ndarray) or image.dtype != np.float32 or image.shape != shape:
        return None
    fits = np.isfinite(image).all() and np.allclose(image.mean((0, 1), dtype=np.float64), mean, rtol=1e-5)
    return image if fits else None
