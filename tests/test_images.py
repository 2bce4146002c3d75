"""What the packer does to one image equals Pillow's own way, and odd files get a note."""

import io
import re

import numpy as np
import pytest
import simplejpeg
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.helpers import jpeg, photo
from tests.mutate_jpeg import joined, segment
from tools.packing.images import crop256, decode, find_fault, pack_image

BICUBIC = Image.Resampling.BICUBIC
CROP, ORIGINAL = ("crop256", 90), ("original", 90)
NOISE = np.random.default_rng(6).integers(0, 256, (300, 300, 3), dtype=np.uint8)


def pixels_of(data: bytes) -> np.ndarray:
    """int (height, width, 3), by Pillow."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


def saved(image: Image.Image, kind: str) -> bytes:
    """A file in any of Pillow's formats."""
    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()


@settings(max_examples=40, deadline=None)
@given(width=st.integers(60, 1000), height=st.integers(60, 1000))
@example(256, 256)
@example(257, 300)
def test_crop256_is_pillows(width: int, height: int) -> None:
    """On a picture of noise, Pillow's BICUBIC gives the same pixels but for a few, and those within two levels. In two
    steps: in one, Pillow resamples the height first where it is more than twice the width."""
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8))
    new_width, new_height = (round(side * 256 / min(width, height)) for side in (width, height))
    left, top = (new_width - 256) // 2, (new_height - 256) // 2
    resized = image.resize((new_width, height), BICUBIC).resize((new_width, new_height), BICUBIC)
    expected = np.asarray(resized.crop((left, top, left + 256, top + 256))).astype(int)
    difference = np.abs(crop256(np.array(image)) - expected)
    assert difference.max() <= 2 and (difference > 0).mean() < 0.05


def with_exif(data: bytes, block: bytes) -> bytes:
    """A JPEG with this EXIF block after its start marker."""
    return data[:2] + joined([segment(0xE1, block)]) + data[2:]


def test_exif_blocks_are_ignored_and_stripped() -> None:
    """Pixels stay as they are stored whatever the orientation; a packed file has no EXIF block, an original keeps its
    bytes, also with a damaged block."""
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
    for block in (b"Exif\0\0XX*\0garbage", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\1\2"):
        file = with_exif(jpeg(image), block)
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
        expected = np.asarray(look.resize((side, side), BICUBIC)).astype(int)
        assert np.abs(pixels_of(packed.jpeg) - expected).mean() < 4, found
        assert Image.open(io.BytesIO(packed.jpeg)).mode == "RGB"


def test_originals_are_untouched() -> None:
    """Clean and grey JPEGs keep their bytes, progressive ones and those with a thumbnail too."""
    thumbnail = with_exif(jpeg(NOISE), Image.Exif().tobytes() + b"\0" * 20 + jpeg(NOISE[:32, :32]))
    for file in (jpeg(NOISE), jpeg(NOISE, progressive=True), thumbnail):
        assert pack_image(file, *ORIGINAL) == (file, "", "")
    assert pack_image(jpeg(NOISE, "L"), *ORIGINAL) == (jpeg(NOISE, "L"), "grey JPEG", "kept as it is")


@pytest.mark.parametrize(
    ("mode", "options", "found"),
    [
        ("RGB", {"subsampling": "4:4:4"}, ""),
        ("RGB", {"progressive": True}, ""),
        ("L", {}, "grey JPEG"),
        ("CMYK", {}, "CMYK JPEG file"),
    ],
)
def test_decode_equals_pillow(mode: str, options: dict[str, object], found: str) -> None:
    """Within one level, every kind, noted where it is odd. Headers that libjpeg warns of, stray bytes, stray markers,
    other revisions and lone ICC pieces, are noted and cost no pixel."""
    data = jpeg(NOISE, mode, **options)
    pixels, size, notes, _ = decode(data)
    assert size == (300, 300) and [note[0] for note in notes] == ([found] if found else [])
    assert np.abs(pixels - pixels_of(data)).max() <= 1
    at = data.index(b"\xff\xdb")
    parts = (b"\xff\xe2\0\x10ICC_PROFILE\0\2\3", b"\xff\xd3", b"\xff\xfe\0\3x\x12\x34", bytes(11))
    headers = [data[:at] + part + data[at:] for part in parts]
    headers += [data.replace(b"JFIF\0\1\1", b"JFIF\0\7\0")] * (mode != "CMYK")
    for file in headers:
        assert np.array_equal(decode(file).pixels, pixels_of(data)) and find_fault(file)
        packed = pack_image(file, *ORIGINAL)
        assert packed.found and packed.jpeg != file and find_fault(packed.jpeg) == ""


def test_damage_in_the_middle() -> None:
    """What libjpeg warns of is encoded, as Pillow shows it; where it gives up before the first pixel, refused. So is
    one of a thousand scans, each of which takes as long as a whole image."""
    data = jpeg(NOISE)
    middle = data[:20000] + b"\x55\xaa" * 20 + data[20040:]
    packed = pack_image(middle, *ORIGINAL)
    assert packed.found and find_fault(packed.jpeg) == ""
    assert (decode(middle, check_only=True).pixels == pixels_of(middle)).all()
    progressive = jpeg(NOISE, progressive=True)
    second = progressive.index(b"\xff\xc4", progressive.index(b"\xff\xda"))  # the second scan's table
    broken = bytearray(progressive)
    broken[second - 40 : second], broken[second + 4 : second + 13] = bytes(40), b"\xff" * 9
    last = progressive[progressive.rindex(b"\xff\xda") : -2]
    assert pack_image(progressive[:-2] + last + b"\xff\xd9", *CROP).jpeg
    for form in (CROP, ORIGINAL):
        with pytest.raises(ValueError, match="not decodable"):
            pack_image(bytes(broken), *form)
        with pytest.raises(ValueError, match="scans"):
            pack_image(progressive[:-2] + last * 1000 + b"\xff\xd9", *form)


def test_files_that_end_too_early_or_too_late() -> None:
    """What one that ends early lacks is grey, as libjpeg shows it, not black, not memory; it is noted, and encoded so
    that strict readers take it; trailing bytes are noted; what no decoder takes raises with a reason."""
    data = jpeg(NOISE)
    cut = data[: len(data) * 2 // 3]
    assert (decode(cut).pixels[-16:] == 128).all()
    assert pack_image(cut, *CROP)[1:] == ("no end marker", "decoded as far as it goes")
    repaired = pixels_of(pack_image(cut, "original", 98).jpeg)
    assert np.abs(repaired[:150] - pixels_of(data)[:150]).mean() < 7  # noise, at two qualities
    for mode in ("RGB", "CMYK"):
        whole = jpeg(NOISE, mode, progressive=True)
        for share in np.linspace(0.3, 0.95, 8):
            shorter = pack_image(whole[: int(len(whole) * share)], *ORIGINAL)
            assert find_fault(shorter.jpeg) == "" and shorter.found
            assert simplejpeg.decode_jpeg(shorter.jpeg, strict=True).shape == (300, 300, 3)
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


def lossless_jpeg(color: tuple[int, ...], marker: int = 0xC3) -> bytes:
    """A lossless JPEG (T.81, annex H) of 256x256 pixels of one colour, grey or RGB, above 128. The first pixel's
    difference to 128, the others' to their neighbour: its length, in a code of four bits, and itself."""
    ids, sizes = b"RGB"[: len(color)], [(value - 128).bit_length() for value in color]
    bits = "".join(f"{size:04b}{value - 128:b}" for size, value in zip(sizes, color, strict=True))
    bits += "0000" * len(ids) * (256**2 - 1)
    bits += "1" * (-len(bits) % 8)
    data = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0")
    frame = b"\x08\1\0\1\0" + bytes([len(ids)]) + b"".join(bytes([each, 0x11, 0]) for each in ids)
    scan = bytes([len(ids)]) + b"".join(bytes([each, 0]) for each in ids) + b"\1\0\0"
    table = b"\0" + bytes([0, 0, 0, 9]) + bytes(12) + bytes(range(9))
    parts = [segment(marker, frame), segment(0xC4, table), segment(0xDA, scan)]
    return b"\xff\xd8" + joined(parts) + data + b"\xff\xd9"


@pytest.mark.parametrize("form", [CROP, ORIGINAL])
def test_lossless_jpegs(form: tuple[str, int]) -> None:
    """libjpeg-turbo does not scale them: at an eighth of the size it would write beyond the buffer's end. They, grey
    ones too, are packed as Pillow shows them; other frames that it does not know are refused."""
    for color in ((200, 150, 240), (150,)):
        assert (pixels_of(lossless_jpeg(color)) == color).all()
        packed = pack_image(lossless_jpeg(color), form[0], 98)
        assert np.abs(pixels_of(packed.jpeg) - color).max() <= 2 and "SOF3" in packed.found
    for marker in (0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF):
        with pytest.raises(ValueError, match="not decodable"):
            pack_image(lossless_jpeg(color, marker), *form)


@pytest.mark.filterwarnings("error")
def test_no_warning_of_a_library() -> None:
    """Of Pillow, about palettes with transparency; numbers that are none, in a TIFF, become levels."""
    palette, out = Image.fromarray(photo(np.random.default_rng(0), 40, 60)).quantize(16), io.BytesIO()
    palette.save(out, "PNG", transparency=bytes(range(16)))
    with pytest.raises(UserWarning, match="Transparency"):
        pixels_of(out.getvalue())
    assert pack_image(out.getvalue(), *CROP).jpeg
    levels = np.random.default_rng(0).random((40, 60), np.float32)
    levels[::3], levels[1::3] = np.nan, np.inf
    assert pixels_of(pack_image(saved(Image.fromarray(levels), "TIFF"), *CROP).jpeg).shape == (256, 256, 3)


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
        assert find_fault(data)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_large_images_are_reduced(mode: str) -> None:
    """One of 54 megapixels is decoded at half its size, in both stores, also where it ends too early: what is packed is
    what Pillow makes of it."""
    small = Image.fromarray(photo(np.random.default_rng(8), 375, 562))
    data = jpeg(np.asarray(small.resize((9000, 6000), BICUBIC)), mode)
    cut = [data[: len(data) * 3 // 4]] if mode == "RGB" else []
    for form, side in ((CROP, (256, 256)), (ORIGINAL, (4500, 3000))):
        for file in (data, *cut):
            packed = pack_image(file, form[0], 95)
            assert "9000x6000 pixels" in packed.found and find_fault(packed.jpeg) == ""
            with Image.open(io.BytesIO(packed.jpeg)) as image:
                assert image.size == side
    square = small.resize((384, 256), BICUBIC).crop((64, 0, 320, 256))
    expected = np.asarray(square.convert("L" if mode == "L" else "RGB").convert("RGB")).astype(int)
    assert np.abs(pixels_of(pack_image(data, *CROP).jpeg) - expected).mean() < 3
