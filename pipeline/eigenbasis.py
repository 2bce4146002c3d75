"""The RGB eigenbasis of a data set (`pca.json`), from exact integer moments.

Fancy PCA (Krizhevsky et al. 2012, section 4.1) shifts an image's colours along the principal axes of the RGB values of
the whole training set. Sums of uint8 pixels and of their products are kept as integers, so the result and the bytes of
the file do not depend on the order of images, on batches, workers or machines.

Shapes: N images, H rows, W columns, C colours.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import UserError
from pipeline.files import read_json, write_json
from pipeline.shards import IMAGE_SIDE

if TYPE_CHECKING:
    import torch

FORMAT_VERSION = 1
CENTRE, BLOCK = 128, 1024
"""See `Moments.of`."""
ROUNDING = 1e-12
"""Variances below this share of the largest count as zero; eigh's errors are a few 1e-16 of the largest."""
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
        """Add the moments of two sets of pixels."""
        return Moments(
            self.num_images + other.num_images,
            self.num_pixels + other.num_pixels,
            tuple(a + b for a, b in zip(self.sum, other.sum, strict=True)),
            tuple(a + b for a, b in zip(self.sum_products, other.sum_products, strict=True)),
        )

    @property
    def covariance(self) -> np.ndarray:
        """Covariance with denominator N, float64 (3, 3). It is computed in integers up to one division, as count *
        sum_products - sum * sum cancels exactly, while floats would lose digits."""
        count, sums, products = self.num_pixels, self.sum, self.sum_products
        scatter = [count * products[3 * i + j] - sums[i] * sums[j] for i in range(3) for j in range(3)]
        return np.array([value / count**2 for value in scatter]).reshape(3, 3)

    @staticmethod
    def of(images_NHWC: "np.ndarray | torch.Tensor", at_a_time: int = 1) -> "Moments":
        """Compute the moments of uint8 RGB images, shape (N, height, width, 3), on their device.

        `at_a_time`: images summed in one operation; one image stays in a core's cache, a GPU is faster with many.

        Sums in float32 are exact here: 128 is subtracted from pixels, so that the products of a block of 1024 pixels
        add up to 1024 * 128^2 = 2^24 at most, and float32 represents every integer up to there, in any order of
        addition. TF32 and bfloat16, to which a GPU may round factors, represent -128..127, too. Blocks are added as
        int64, which fewer than 2^63 / 128^2 = 5.6e14 pixels in a call cannot overflow; calls as Python integers.
        """
        import torch

        images_NHWC = torch.as_tensor(images_NHWC)
        assert images_NHWC.dtype == torch.uint8 and images_NHWC.shape[-1] == 3
        if not images_NHWC.numel():
            return Moments(len(images_NHWC))
        device, image_pixels = images_NHWC.device, images_NHWC[0].numel() // 3
        num_pixels = len(images_NHWC) * image_pixels
        sums, products = (torch.zeros(shape, dtype=torch.int64, device=device) for shape in ((3,), (3, 3)))
        # The part of the last block that an image does not fill stays zero.
        planes_N3P = torch.zeros(at_a_time, 3, -(-image_pixels // BLOCK) * BLOCK, device=device)
        for images_NP3 in images_NHWC.reshape(-1, image_pixels, 3).split(at_a_time):
            planes_N3P = planes_N3P[: len(images_NP3)]
            planes_N3P[:, :, :image_pixels].copy_(images_NP3.transpose(1, 2)).sub_(CENTRE)
            blocks_B3P = planes_N3P.unflatten(2, (-1, BLOCK)).transpose(1, 2)
            sums += blocks_B3P.sum(3).long().sum((0, 1))
            products += (blocks_B3P @ blocks_B3P.mT).long().sum((0, 1))
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
    mean_image: np.ndarray | None = None
    """float32 (256, 256, 3): mean of every pixel; None unless it was loaded."""

    @property
    def axis_stddev(self) -> np.ndarray:
        """Shape (3,): standard deviations along the axes, in levels."""
        return np.sqrt(self.eigenvalues)

    @staticmethod
    def of(moments: Moments) -> "Eigenbasis":
        """Compute the basis of at least one pixel."""
        eigenvalues, eigenvectors = np.linalg.eigh(moments.covariance)
        eigenvalues, eigenvectors = eigenvalues[::-1], eigenvectors[:, ::-1]
        # For an axis without variance eigh returns its rounding error, which may be negative.
        eigenvalues = np.where(eigenvalues < ROUNDING * eigenvalues[0], 0, eigenvalues)
        largest = eigenvectors[np.abs(eigenvectors).argmax(0), range(3)]
        mean = np.array([value / moments.num_pixels for value in moments.sum])
        return Eigenbasis(mean, eigenvalues, eigenvectors * np.sign(largest))

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
                f"{path.with_name('mean_image.npy')} is missing, damaged or of other images; make it with "
                f"tools/compute_pca.py {path.parent} --mean-image"
            )
        return replace(basis, mean_image=image)

    @staticmethod
    def from_json(content: dict[str, Any]) -> "Eigenbasis":
        """Make a basis of the fields `mean`, `eigenvalues` and `eigenvectors` of `pca.json`. Raises `UserError`."""
        found = [np.asarray(content[name]) for name in ("mean", "eigenvalues", "eigenvectors")]
        if not all(array.dtype.kind in "if" for array in found):  # numpy would also convert "1" and true
            raise UserError(
                "mean, eigenvalues or eigenvectors are no numbers; run tools/compute_pca.py again"
            )
        mean, eigenvalues, eigenvectors = (array.astype(np.float64) for array in found)
        shapes = [mean.shape, eigenvalues.shape, eigenvectors.shape]
        finite = all(np.isfinite(array).all() for array in (mean, eigenvalues, eigenvectors))
        sound = shapes == [(3,), (3,), (3, 3)] and finite and (eigenvalues >= 0).all()
        if not sound or not np.allclose(eigenvectors.T @ eigenvectors, np.eye(3), atol=1e-3):
            raise UserError(
                "mean, eigenvalues or eigenvectors are no RGB eigenbasis; run tools/compute_pca.py again"
            )
        return Eigenbasis(mean, eigenvalues, eigenvectors)

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
    if path.is_dir():
        raise UserError(f"{path} is a folder; remove it")
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; make it with tools/compute_pca.py {path.parent}")
    content = read_json(path)
    advice = f"remove it and run tools/compute_pca.py {path.parent}"
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


def write_eigenbasis(path: Path, moments: Moments, manifest_sha256: str, decoder: str) -> dict[str, Any]:
    """Compute the basis from `moments` and write `pca.json`; returns its content.

    Args:
        path: File to write.
        moments: Of at least one pixel.
        manifest_sha256: Checksum of the shards' manifest.
        decoder: Decoder of the pixels, such as "DALI 2.4.0 cpu".
    """
    basis, covariance = Eigenbasis.of(moments), moments.covariance
    content = {
        "format_version": FORMAT_VERSION,
        "num_images": moments.num_images,
        "num_pixels": moments.num_pixels,
        "sum": list(moments.sum),
        "sum_products": [list(moments.sum_products[3 * i : 3 * i + 3]) for i in range(3)],
        "scale": 255,
        "channel_order": "RGB",
        "geometry": GEOMETRY,
        "decoder": decoder,
        "manifest_sha256": manifest_sha256,
        "mean": round_values(basis.mean),
        "channel_stddev": round_values(np.sqrt(np.diag(covariance))),
        "covariance": round_values(covariance),
        "eigenvalues": round_values(basis.eigenvalues),
        "axis_stddev": round_values(basis.axis_stddev),
        "eigenvectors": round_values(basis.eigenvectors),
    }
    write_json(path, content)
    return content


def round_values(values: Any) -> Any:
    """Round an array to nested lists of floats with 12 significant digits, as more differ between machines (eigh)."""
    array = np.asarray(values)
    return [round_values(row) for row in array] if array.ndim else float(f"{float(array):.12g}")
