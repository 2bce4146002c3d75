"""The RGB eigenbasis of a data set (`pca.json`), from exact integer moments.

Fancy PCA (Krizhevsky et al. 2012, section 4.1) moves an image's colour along the principal axes of the RGB values of
the whole training set. Sums of uint8 pixels and of their products are integers, so they are kept as such: the result
does not depend on the order of images, batches, workers or machines, and the file has the same bytes whatever made it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.files import read_json, write_json

FORMAT_VERSION = 1
CENTRE, BLOCK = 128, 1024
"""See `Moments.of`."""
GEOMETRY = "shorter side 256, central 256x256"


@dataclass(frozen=True)
class Moments:
    """Exact sums over RGB pixels on the 0..255 scale, in Python's unbounded integers."""

    num_images: int = 0
    num_pixels: int = 0
    sum: tuple[int, ...] = (0,) * 3
    """Sum of R, G and B."""
    sum_products: tuple[int, ...] = (0,) * 9
    """Sum of the products, 3x3 row by row."""

    def __add__(self, other: "Moments") -> "Moments":
        """Moments of both sets of pixels together."""
        return Moments(
            self.num_images + other.num_images,
            self.num_pixels + other.num_pixels,
            tuple(a + b for a, b in zip(self.sum, other.sum, strict=True)),
            tuple(a + b for a, b in zip(self.sum_products, other.sum_products, strict=True)),
        )

    @staticmethod
    def of(images_NHWC: np.ndarray) -> "Moments":
        """Moments of uint8 RGB images, shape (N, height, width, 3).

        Summed in float32, yet exact: pixels are moved to -128..127, so that the products of a block of 1024 pixels add
        up to 1024 * 128^2 = 2^24 at most, and float32 holds every integer up to there, in whatever order they are
        added. Blocks are added as int64, which a call of fewer than 2^63 / 128^2 = 5.6e14 pixels cannot overflow,
        batches as Python integers.
        """
        assert images_NHWC.dtype == np.uint8 and images_NHWC.shape[-1] == 3
        if not images_NHWC.size:
            return Moments(len(images_NHWC))
        import torch

        num_pixels, image_pixels = images_NHWC.size // 3, images_NHWC[0].size // 3
        sums, products = torch.zeros(3, dtype=torch.int64), torch.zeros(3, 3, dtype=torch.int64)
        planes_3P = torch.zeros(3, -(-image_pixels // BLOCK) * BLOCK)  # what an image does not fill stays zero
        blocks_B3P = planes_3P.view(3, -1, BLOCK).permute(1, 0, 2)
        for image_P3 in torch.from_numpy(images_NHWC).view(-1, image_pixels, 3):  # one at a time stays in the cache
            planes_3P[:, :image_pixels].copy_(image_P3.t()).sub_(CENTRE)
            sums += blocks_B3P.sum(2).long().sum(0)
            products += torch.bmm(blocks_B3P, blocks_B3P.transpose(1, 2)).long().sum(0)
        # Back from -128..127: sum of (x + c)(y + c) = sum of xy + c (sum of x + sum of y) + n c^2.
        moved, crossed = sums.tolist(), products.tolist()
        return Moments(
            len(images_NHWC),
            num_pixels,
            tuple(value + CENTRE * num_pixels for value in moved),
            tuple(
                crossed[i][j] + CENTRE * (moved[i] + moved[j]) + CENTRE**2 * num_pixels
                for i in range(3)
                for j in range(3)
            ),
        )


@dataclass(frozen=True)
class Eigenbasis:
    """Mean and principal axes of a data set's RGB values, on the 0..255 scale. Arrays are float64."""

    mean: np.ndarray
    """Shape (3,): mean of R, G, B."""
    eigenvalues: np.ndarray
    """Shape (3,): variances along the axes, descending."""
    eigenvectors: np.ndarray
    """Shape (3, 3): the axes are the columns; the largest component of each is positive."""

    @property
    def axis_stddev(self) -> np.ndarray:
        """Shape (3,): standard deviations along the axes, in levels."""
        return np.sqrt(self.eigenvalues)

    @staticmethod
    def load(path: Path, manifest_sha256: str) -> "Eigenbasis":
        """Read `pca.json`.

        Raises `FileNotFoundError` where there is none, `ValueError` where it is damaged or made from other shards than
        the manifest with this checksum.
        """
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; make it with tools/compute_pca.py {path.parent}")
        content = read_json(path)
        advice = f"remove it and run tools/compute_pca.py {path.parent}"
        if not isinstance(content, dict) or content.get("format_version") != FORMAT_VERSION:
            raise ValueError(f"{path} is damaged or has another format version; {advice}")
        if content.get("manifest_sha256") != manifest_sha256:
            raise ValueError(f"{path} was made from other shards; {advice}")
        try:
            return Eigenbasis.from_json(content)
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{path} is damaged: it holds no RGB eigenbasis; {advice}") from None

    @staticmethod
    def from_json(content: dict[str, Any]) -> "Eigenbasis":
        """From the fields `mean`, `eigenvalues` and `eigenvectors` of `pca.json`."""
        mean, eigenvalues, eigenvectors = (
            np.asarray(content[name], np.float64) for name in ("mean", "eigenvalues", "eigenvectors")
        )
        shapes = [mean.shape, eigenvalues.shape, eigenvectors.shape]
        finite = all(np.isfinite(array).all() for array in (mean, eigenvalues, eigenvectors))
        if shapes != [(3,), (3,), (3, 3)] or not finite or not (eigenvalues >= 0).all():
            raise ValueError("mean, eigenvalues or eigenvectors are no RGB eigenbasis; run tools/compute_pca.py again")
        return Eigenbasis(mean, eigenvalues, eigenvectors)

    def to_json(self) -> dict[str, Any]:
        """The fields that `from_json` reads."""
        return {
            "mean": self.mean.tolist(),
            "eigenvalues": self.eigenvalues.tolist(),
            "eigenvectors": self.eigenvectors.tolist(),
        }


def write_eigenbasis(path: Path, moments: Moments, manifest_sha256: str, decoder: str) -> dict[str, Any]:
    """Derive the basis from `moments` and write `pca.json`; returns its content.

    Args:
        path: File to write.
        moments: Of at least one pixel.
        manifest_sha256: Checksum of the shards' manifest.
        decoder: What decoded the pixels, for example "DALI 2.4.0 cpu".
    """
    count, sums = moments.num_pixels, moments.sum
    # Integers until the one division: count * sum_products - sum * sum cancels exactly, where floats would lose digits.
    scatter = [count * moments.sum_products[3 * i + j] - sums[i] * sums[j] for i in range(3) for j in range(3)]
    covariance = np.array([value / count**2 for value in scatter]).reshape(3, 3)
    eigenvalues, eigenvectors = np.linalg.eigh(covariance)
    eigenvalues, eigenvectors = eigenvalues[::-1].clip(min=0), eigenvectors[:, ::-1]
    largest = eigenvectors[np.abs(eigenvectors).argmax(0), range(3)]
    eigenvectors = eigenvectors * np.sign(largest)
    content = {
        "format_version": FORMAT_VERSION,
        "num_images": moments.num_images,
        "num_pixels": count,
        "sum": list(sums),
        "sum_products": [list(moments.sum_products[3 * i : 3 * i + 3]) for i in range(3)],
        "scale": 255,
        "channel_order": "RGB",
        "geometry": GEOMETRY,
        "decoder": decoder,
        "manifest_sha256": manifest_sha256,
        "mean": rounded([value / count for value in sums]),
        "channel_stddev": rounded(np.sqrt(np.diag(covariance))),
        "covariance": rounded(covariance),
        "eigenvalues": rounded(eigenvalues),
        "axis_stddev": rounded(np.sqrt(eigenvalues)),
        "eigenvectors": rounded(eigenvectors),
    }
    write_json(path, content)
    return content


def rounded(values: Any) -> Any:
    """Nested lists of floats with 12 significant digits: beyond them, eigh differs between machines."""
    array = np.asarray(values)
    return [rounded(row) for row in array] if array.ndim else float(f"{float(array):.12g}")
