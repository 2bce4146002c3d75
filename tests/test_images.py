"""What the packer does to one image equals Pillow's own way, and odd files get a note."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.conftest import jpeg, photo
from tools.images import crop256, decode, pack_image


@settings(max_examples=40, deadline=None)
@given(width=st.integers(60, 700), height=st.integers(60, 700))
def test_crop256_geometry(width: int, height: int) -> None:
    """On a linear ramp, resampling is linear too: each kept pixel has the value of its place in the source."""
    ramp = np.add.outer(np.arange(height) / height, np.arange(width) / width) * 100 + 20
    got = np.asarray(crop256(Image.fromarray(np.rint(ramp).astype(np.uint8)).convert("RGB"))).astype(float)[:, :, 0]
    assert got.shape == (256, 256)
    scale = 256 / min(width, height)
    new_width, new_height = round(width * scale), round(height * scale)
    x = (np.arange(256) + (new_width - 256) // 2 + 0.5) * width / new_width - 0.5
    y = (np.arange(256) + (new_height - 256) // 2 + 0.5) * height / new_height - 0.5
    expected = np.add.outer(y / height, x / width) * 100 + 20
    assert (
        np.abs(got - expected)[8:-8, 8:-8].max() < 2.5
    )  # half a level of rounding, and bicubic overshoot at the ramp's steps
    assert np.abs((got - expected)[8:-8, 8:-8].mean()) < 0.2


@pytest.mark.parametrize(
    ("mode", "options", "found"),
    [
        ("RGB", {"subsampling": "4:2:0"}, ""),
        ("RGB", {"subsampling": "4:4:4"}, ""),
        ("RGB", {"progressive": True}, ""),
        ("L", {}, "grey JPEG"),
        ("CMYK", {}, "CMYK JPEG file"),
        ("CMYK", {"subsampling": "4:2:0"}, "CMYK JPEG file"),
    ],
)
def test_decode_equals_pillow(mode: str, options: dict[str, object], found: str) -> None:
    """Every kind decodes as Pillow decodes it, within one level, and is noted where it is odd."""
    data = jpeg(photo(np.random.default_rng(3), 300, 400), mode, **options)
    pixels, notes = decode(data)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    assert np.abs(pixels - expected).max() <= 1
    assert [note[0] for note in notes] == ([found] if found else [])


def test_exif_orientation_is_ignored_and_stripped() -> None:
    """Pixels stay as they are stored; the packed file has no EXIF block."""
    exif = Image.Exif()
    exif[0x0112] = 6
    image = photo(np.random.default_rng(4), 256, 256)
    packed = pack_image(jpeg(image, exif=exif), 95)
    assert "EXIF orientation 6" in packed.found
    with Image.open(io.BytesIO(packed.jpeg)) as result:
        assert result.getexif() == {} and result.size == (256, 256)
        assert np.abs(np.asarray(result).astype(int) - image).mean() < 3
        assert np.abs(np.asarray(result).astype(int) - np.rot90(image)).mean() > 10


def test_png_named_jpeg_and_alpha() -> None:
    """Other formats are converted, whatever their name says."""
    out = io.BytesIO()
    Image.fromarray(photo(np.random.default_rng(5), 300, 300)).convert("RGBA").save(out, "PNG")
    packed = pack_image(out.getvalue(), 90)
    assert packed.found == "RGBA PNG file" and packed.done == "converted to RGB"


def test_damage() -> None:
    """A file that ends early is noted, trailing bytes do not stop it, and what no decoder takes raises with a
    reason."""
    noise = np.random.default_rng(6).integers(0, 256, (300, 300, 3), dtype=np.uint8)
    data = jpeg(noise)
    assert "libjpeg warns" in pack_image(data[: len(data) * 2 // 3], 90).found
    assert pack_image(data + b"trailing", 90).jpeg
    for garbage in (b"", b"\xff\xd8", b"no image at all", b"\xff\xd8" + bytes(1000)):
        with pytest.raises(ValueError, match="not decodable"):
            pack_image(garbage, 90)
