"""Exact moments of RGB pixels, and the file `pca.json` that is computed from them.

Sums of uint8 pixels and of their products are kept as integers, so the result and the bytes of the file do not depend
on the order of images, on batches, workers or machines.

Shapes: N images, H rows, W columns, C colours; B blocks of P pixels.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.eigenbasis import FORMAT_VERSION, GEOMETRY, Eigenbasis
from pipeline.files import write_json

if TYPE_CHECKING:
    import torch

CENTRE, BLOCK = 128, 1024
"""See `Moments.of`."""
ROUNDING = 1e-12
"""Variances below this share of the largest count as zero; eigh's errors are a few 1e-16 of the largest."""


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


def compute_basis(moments: Moments) -> Eigenbasis:
    """Compute the basis of at least one pixel."""
    eigenvalues, eigenvectors = np.linalg.eigh(moments.covariance)
    eigenvalues, eigenvectors = eigenvalues[::-1], eigenvectors[:, ::-1]
    # For an axis without variance eigh returns its rounding error, which may be negative.
    eigenvalues = np.where(eigenvalues < ROUNDING * eigenvalues[0], 0, eigenvalues)
    largest = eigenvectors[np.abs(eigenvectors).argmax(0), range(3)]
    mean = np.array([value / moments.num_pixels for value in moments.sum])
    return Eigenbasis(mean, eigenvalues, eigenvectors * np.sign(largest))


def write_eigenbasis(path: Path, moments: Moments, manifest_sha256: str, decoder: str) -> dict[str, Any]:
    """Compute the basis from `moments` and write `pca.json`; returns its content.

    Args:
        path: File to write.
        moments: Of at least one pixel.
        manifest_sha256: Checksum of the shards' manifest.
        decoder: Decoder of the pixels, such as "DALI 2.4.0 cpu".
    """
    basis, covariance = compute_basis(moments), moments.covariance
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
