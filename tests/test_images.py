"""What the packer does to one image equals Pillow's own way, and odd files get a note."""

import io
import re
import struct

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.helpers import jpeg, photo
from tools.packing.images import crop256, decode, find_fault, pack_image

CROP, ORIGINAL = ("crop256", 90), ("original", 90)


@settings(max_examples=40, deadline=None)
@given(width=st.integers(60, 700), height=st.integers(60, 700))
def test_crop256_geometry(width: int, height: int) -> None:
    """On a linear ramp, resampling is linear too: each kept pixel has the value of its place in the source."""
    ramp = np.add.outer(np.arange(height) / height, np.arange(width) / width) * 100 + 20
    got = crop256(np.repeat(np.rint(ramp).astype(np.uint8)[:, :, None], 3, 2)).astype(float)[:, :, 0]
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
    "size", [(500, 375), (375, 500), (333, 500), (256, 256), (97, 211), (1600, 1200), (257, 300)]
)
def test_crop256_is_pillows(size: tuple[int, int]) -> None:
    """On a picture of noise, Pillow's BICUBIC gives the same pixels but for a few, and those within two levels."""
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    width, height = (round(side * 256 / min(size)) for side in size)
    left, top = (width - 256) // 2, (height - 256) // 2
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    expected = np.asarray(resized.crop((left, top, left + 256, top + 256))).astype(int)
    difference = np.abs(crop256(np.array(image)) - expected)
    assert difference.max() <= 2 and (difference > 0).mean() < 0.05


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
    pixels, size, notes, _ = decode(data)
    assert size == (300, 400)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    assert np.abs(pixels - expected).max() <= 1
    assert [note[0] for note in notes] == ([found] if found else [])


def pixels_of(data: bytes) -> np.ndarray:
    """int (height, width, 3), by Pillow."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


def saved(image: Image.Image, kind: str) -> bytes:
    """A file in any of Pillow's formats."""
    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()


def with_exif(data: bytes, block: bytes) -> bytes:
    """A JPEG with this EXIF block after its start marker."""
    return data[:2] + b"\xff\xe1" + (len(block) + 2).to_bytes(2, "big") + block + data[2:]


def test_exif_orientation_is_ignored_and_stripped() -> None:
    """Pixels stay as they are stored; a packed file has no EXIF block, an original keeps its bytes."""
    exif = Image.Exif()
    exif[0x0112] = 6
    image = photo(np.random.default_rng(4), 256, 256)
    data = jpeg(image, exif=exif)
    packed = pack_image(data, "crop256", 95)
    assert packed.found == "EXIF orientation 6"
    with Image.open(io.BytesIO(packed.jpeg)) as result:
        assert result.getexif() == {} and result.size == (256, 256)
    assert np.abs(pixels_of(packed.jpeg) - image).mean() < 3
    assert np.abs(pixels_of(packed.jpeg) - np.rot90(image)).mean() > 10
    assert pack_image(data, *ORIGINAL) == (data, "EXIF orientation 6", "kept as it is")


def test_a_damaged_exif_block_is_noted() -> None:
    """It does no decoder harm."""
    data = jpeg(photo(np.random.default_rng(4)))
    for block in (b"Exif\0\0XX*\0garbage", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\1\2"):
        file = with_exif(data, block)
        assert pack_image(file, *ORIGINAL) == (file, "damaged EXIF block", "kept as it is")
        assert pack_image(file, *CROP)[1:] == ("damaged EXIF block", "stripped")


@pytest.mark.parametrize("form", [CROP, ORIGINAL])
def test_other_formats(form: tuple[str, int]) -> None:
    """PNGs with alpha, palettes or 16 bits, GIFs and CMYK JPEGs become RGB JPEGs of the same look, whatever their name
    says."""
    image = Image.fromarray(photo(np.random.default_rng(5), 300, 300))
    sixteen = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    unit = Image.fromarray(np.asarray(image.convert("L")) / np.float32(255))
    files = {
        "RGBA PNG file": (saved(image.convert("RGBA"), "PNG"), image),
        "P PNG file": (saved(image.quantize(200), "PNG"), image.quantize(200).convert("RGB")),
        "I;16 PNG file": (saved(sixteen, "PNG"), image.convert("L").convert("RGB")),
        "I PPM file": (saved(sixteen, "PPM"), image.convert("L").convert("RGB")),
        "F TIFF file": (saved(unit, "TIFF"), image.convert("L").convert("RGB")),
        "P GIF file": (saved(image.quantize(200), "GIF"), image.quantize(200).convert("RGB")),
        "CMYK JPEG file": (jpeg(np.asarray(image), "CMYK"), image),
    }
    for found, (data, look) in files.items():
        packed = pack_image(data, form[0], 98)
        assert (packed.found, packed.done) == (found, "converted to RGB")
        side = 256 if form[0] == "crop256" else 300
        expected = np.asarray(look.resize((side, side), Image.Resampling.BICUBIC)).astype(int)
        assert pixels_of(packed.jpeg).shape == (side, side, 3)
        assert np.abs(pixels_of(packed.jpeg) - expected).mean() < 4, found
        assert Image.open(io.BytesIO(packed.jpeg)).mode == "RGB"


def test_originals_are_untouched() -> None:
    """Clean and grey JPEGs keep their bytes, progressive ones and those with a thumbnail too."""
    noise = np.random.default_rng(6).integers(0, 256, (300, 300, 3), dtype=np.uint8)
    data = jpeg(noise)
    thumbnail = with_exif(data, Image.Exif().tobytes() + b"\0" * 20 + jpeg(noise[:32, :32]))
    for file in (data, jpeg(noise, "L"), jpeg(noise, progressive=True), thumbnail):
        assert pack_image(file, *ORIGINAL).jpeg == file
    assert (
        pack_image(thumbnail, *ORIGINAL).found == ""
        and pack_image(jpeg(noise, "L"), *ORIGINAL).done == "kept as it is"
    )


@pytest.mark.parametrize(
    ("mode", "options"), [("RGB", {}), ("L", {}), ("RGB", {"progressive": True}), ("CMYK", {})]
)
def test_headers_that_libjpeg_warns_of_cost_no_pixel(mode: str, options: dict[str, object]) -> None:
    """Stray bytes, stray markers, other revisions and lone ICC pieces: noted, and decoded as the same file without."""
    data = jpeg(np.random.default_rng(6).integers(0, 256, (300, 300, 3), dtype=np.uint8), mode, **options)
    at = data.index(b"\xff\xdb")
    parts = (b"\xff\xe2\0\x10ICC_PROFILE\0\2\3", b"\xff\xd3", b"\xff\xfe\0\3x\x12\x34", bytes(11))
    headers = [data[:at] + part + data[at:] for part in parts]
    headers += [data.replace(b"JFIF\0\1\1", b"JFIF\0\7\0")] * (mode != "CMYK")
    for file in headers:
        assert np.array_equal(decode(file).pixels, pixels_of(data)) and find_fault(file)
        packed = pack_image(file, *ORIGINAL)
        assert packed.found and packed.jpeg != file and find_fault(packed.jpeg) == ""


def test_what_a_file_lacks_is_grey() -> None:
    """Of one that ends too early, as libjpeg shows it, baseline or not, in a reduced one too; not black, not memory."""
    image = photo(np.random.default_rng(6), 304, 304)
    data = jpeg(image)
    pixels = decode(data[: len(data) // 2]).pixels
    assert (pixels[-16:] == 128).all() and np.abs(pixels[:100] - image[:100].astype(int)).mean() < 3
    large = jpeg(np.asarray(Image.fromarray(image).resize((9000, 6000))))
    cut = pack_image(large[: len(large) * 3 // 4], *ORIGINAL)
    with Image.open(io.BytesIO(cut.jpeg)) as reduced:
        assert reduced.size == (4500, 3000) and find_fault(cut.jpeg) == ""


def test_a_thousand_scans_are_refused() -> None:
    """Each takes as long as a whole image."""
    data = jpeg(photo(np.random.default_rng(6), 300, 300), progressive=True)
    last = data.rindex(b"\xff\xda")
    assert pack_image(data[:-2] + data[last:], *CROP).jpeg
    with pytest.raises(ValueError, match="scans"):
        pack_image(data[:-2] + data[last:-2] * 1000 + b"\xff\xd9", *CROP)


def test_damage_in_the_middle() -> None:
    """What libjpeg warns of is encoded, as Pillow shows it; where it gives up before the first pixel, refused."""
    noise = np.random.default_rng(6).integers(0, 256, (300, 300, 3), dtype=np.uint8)
    data = jpeg(noise)
    middle = data[:20000] + b"\x55\xaa" * 20 + data[20040:]
    packed = pack_image(middle, *ORIGINAL)
    assert packed.found and find_fault(packed.jpeg) == ""
    assert (decode(middle, check_only=True).pixels == pixels_of(middle)).all()
    progressive = jpeg(noise, progressive=True)
    second = progressive.index(b"\xff\xc4", progressive.index(b"\xff\xda"))  # the second scan's table
    broken = bytearray(progressive)
    broken[second - 40 : second], broken[second + 4 : second + 13] = bytes(40), b"\xff" * 9
    for form in (CROP, ORIGINAL):
        with pytest.raises(ValueError, match="not decodable"):
            pack_image(bytes(broken), *form)


def test_damage() -> None:
    """A file that ends early is noted, and as an original encoded so that strict readers take it; trailing bytes
    are noted; what no decoder takes raises with a reason."""
    noise = np.random.default_rng(6).integers(0, 256, (300, 300, 3), dtype=np.uint8)
    data = jpeg(noise)
    cut = data[: len(data) * 2 // 3]
    assert pack_image(cut, *CROP)[1:] == ("no end marker", "decoded as far as it goes")
    progressive = jpeg(noise, progressive=True)
    for share in np.linspace(0.3, 0.95, 8):
        shorter = pack_image(progressive[: int(len(progressive) * share)], *ORIGINAL)
        assert simplejpeg.decode_jpeg(shorter.jpeg, strict=True).shape == (300, 300, 3) and shorter.found
    repaired = pack_image(cut, "original", 98)
    assert find_fault(repaired.jpeg) == ""
    assert (
        np.abs(pixels_of(repaired.jpeg)[:150] - pixels_of(data)[:150]).mean() < 7
    )  # noise, at two qualities
    cmyk = jpeg(noise, "CMYK")
    assert "no end marker" in pack_image(cmyk[: len(cmyk) // 2], *CROP).found
    for tail in (b"trailing", b"\0" * 70, data, b"x\xff\xd9y"):
        packed = pack_image(data + tail, *ORIGINAL)
        assert packed == (data + tail, f"{len(tail)} bytes after the image's end", "kept as it is")
        assert pack_image(data + tail, *CROP).done == "dropped"
    cut_png = saved(Image.new("L", (9, 9)), "PNG")[:40]
    for garbage in (b"", b"\xff\xd8", b"no image at all", b"\xff\xd8" + bytes(1000), cut_png):
        for form in (CROP, ORIGINAL):
            with pytest.raises(ValueError, match="not decodable") as error:
                pack_image(garbage, *form)
            assert "BytesIO" not in str(error.value)


def lossless_jpeg(pixels: np.ndarray, marker: int = 0xC3) -> bytes:
    """A lossless JPEG (T.81, annex H) of uint8 (height, width, 1 or 3): the left neighbour predicts, every length of a
    difference has a code of four bits."""
    height, width, count = pixels.shape
    ids = b"RGB"[:count]
    padded = pixels.astype(int)
    before = np.roll(padded, 1, 1)
    before[1:, 0], before[0, 0] = padded[:-1, 0], 128
    bits = ""
    for difference in (padded - before).reshape(-1).tolist():
        size = abs(difference).bit_length()
        value = difference if difference >= 0 else difference + 2**size - 1
        bits += f"{size:04b}" + (f"{value:0{size}b}" if size else "")
    data = (
        int(bits + "1" * (-len(bits) % 8), 2).to_bytes(-(-len(bits) // 8), "big").replace(b"\xff", b"\xff\0")
    )
    frame = (
        b"\x08" + struct.pack(">HHB", height, width, count) + b"".join(bytes([each, 0x11, 0]) for each in ids)
    )
    scan = bytes([count]) + b"".join(bytes([each, 0]) for each in ids) + b"\1\0\0"
    table = b"\0" + bytes([0, 0, 0, 9]) + bytes(12) + bytes(range(9))
    head = b"".join(
        b"\xff" + bytes([each]) + (len(content) + 2).to_bytes(2, "big") + content
        for each, content in ((marker, frame), (0xC4, table), (0xDA, scan))
    )
    return b"\xff\xd8" + head + data + b"\xff\xd9"


@pytest.mark.parametrize("form", [CROP, ORIGINAL])
def test_lossless_jpegs(form: tuple[str, int]) -> None:
    """libjpeg-turbo does not scale them: at an eighth of the size it would write beyond the buffer's end. They, grey
    ones too, are packed as Pillow shows them; other frames that it does not know are refused."""
    image = photo(np.random.default_rng(3), 256, 256)
    assert (pixels_of(lossless_jpeg(image)) == image).all()
    for pixels in (image, image[:, :, :1]):
        packed = pack_image(lossless_jpeg(pixels), form[0], 98)
        assert np.abs(pixels_of(packed.jpeg) - pixels).mean() < 2 and "SOF3" in packed.found
    for marker in (0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF):
        with pytest.raises(ValueError, match="not decodable"):
            pack_image(lossless_jpeg(image, marker), *form)


@pytest.mark.filterwarnings("error")
def test_no_warning_of_a_library() -> None:
    """Of Pillow, about palettes with transparency."""
    palette, out = Image.fromarray(photo(np.random.default_rng(0), 40, 60)).quantize(16), io.BytesIO()
    palette.save(out, "PNG", transparency=bytes(range(16)))
    with pytest.raises(UserWarning, match="Transparency"):
        Image.open(io.BytesIO(out.getvalue())).convert("RGB")
    assert pack_image(out.getvalue(), *CROP).jpeg


def test_no_program_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow would hand an EPS file to Ghostscript, which runs what stands in it."""
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 72 72\n%%EndComments\n(x) print\n%%EOF\n"
    assert Image.open(io.BytesIO(eps)).format == "EPS"
    monkeypatch.setattr("subprocess.check_call", lambda *_, **__: pytest.fail("a program was run"))
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("a program was run"))
    with pytest.raises(ValueError, match="not decodable"):
        pack_image(eps, *CROP)


def claiming(data: bytes, height: int, width: int) -> bytes:
    """A JPEG whose frame header claims another size."""
    at = re.search(rb"\xff[\xc0-\xc3]\0[\x0b\x11\x14]", data).start() + 5  # type: ignore[union-attr]
    return data[:at] + height.to_bytes(2, "big") + width.to_bytes(2, "big") + data[at + 4 :]


def test_images_that_would_fill_the_memory() -> None:
    """Headers that claim a gigantic picture, a large progressive one, which holds all coefficients, and strips that
    would be stretched into one are refused at once, in their own size, alike in both stores."""
    tiny = np.zeros((16, 16, 3), np.uint8)
    for data, size in (
        (claiming(jpeg(tiny), 0xFFDC, 0xFFDC), "65500x65500"),
        (claiming(jpeg(tiny, progressive=True), 6000, 9000), "9000x6000"),
        (claiming(jpeg(tiny, "CMYK", progressive=True), 6000, 9000), "9000x6000"),
        (jpeg(np.zeros((1, 1000, 3), np.uint8)), "1000x1"),
        (saved(Image.new("L", (1, 1000)), "PNG"), "1x1000"),
    ):
        for form in (CROP, ORIGINAL):
            with pytest.raises(ValueError, match=f"^too (large|narrow): {size} pixels"):
                pack_image(data, *form)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_large_images_are_reduced(mode: str) -> None:
    """One of 54 megapixels is decoded at half its size, in both stores: what is packed is what Pillow makes of it."""
    small = Image.fromarray(photo(np.random.default_rng(8), 375, 562))
    data = jpeg(np.asarray(small.resize((9000, 6000), Image.Resampling.BICUBIC)), mode)
    for form, side in ((CROP, (256, 256)), (ORIGINAL, (4500, 3000))):
        packed = pack_image(data, form[0], 95)
        assert "9000x6000 pixels" in packed.found and find_fault(packed.jpeg) == ""
        with Image.open(io.BytesIO(packed.jpeg)) as image:
            assert image.size == side
    square = small.resize((384, 256), Image.Resampling.BICUBIC).crop((64, 0, 320, 256))
    expected = np.asarray(square.convert("L" if mode == "L" else "RGB").convert("RGB")).astype(int)
    assert np.abs(pixels_of(pack_image(data, *CROP).jpeg) - expected).mean() < 3


def test_numbers_that_are_none() -> None:
    """NaN and infinity in a TIFF become levels."""
    levels = np.random.default_rng(0).random((40, 60), np.float32)
    levels[::3], levels[1::3] = np.nan, np.inf
    assert pixels_of(pack_image(saved(Image.fromarray(levels), "TIFF"), *CROP).jpeg).shape == (256, 256, 3)
