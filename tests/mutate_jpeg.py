"""JPEG files with one to three changes that know a JPEG's structure: markers, segments, frames, tables, scans, lengths.

`corpus(number)` gives the same files each time.
"""

import random
from collections.abc import Iterator

import numpy as np
import simplejpeg
from PIL import Image

from tests.helpers import jpeg, photo

Part = list[bytes]
"""[marker byte, length as it stands, body, what follows up to the next marker (a scan's data)]; SOI and EOI have no
length and no body."""


def sound_jpegs() -> list[bytes]:
    """Baseline and progressive files of each sampling, grey, CMYK, RGB, with restart markers, EXIF and a thumbnail."""
    rng = np.random.default_rng(7)
    noisy = photo(rng, 96, 80).astype(int) + rng.integers(-20, 21, (96, 80, 3))
    pixels = np.ascontiguousarray(noisy.clip(0, 255).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds = [(progressive, sampling) for progressive in (0, 1) for sampling in ("4:2:0", "4:4:4")]
    files = [jpeg(pixels, progressive=progressive, subsampling=sampling) for progressive, sampling in kinds]
    files += [simplejpeg.encode_jpeg(pixels, 80, "RGB", sampling) for sampling in ("422", "440", "411")]
    files += [jpeg(pixels, "L"), jpeg(pixels, "L", progressive=True), jpeg(pixels, "CMYK")]
    files += [jpeg(pixels, keep_rgb=True), jpeg(pixels, restart_marker_blocks=3), jpeg(pixels, exif=exif)]
    files.append(jpeg(pixels, progressive=True, exif=exif.tobytes() + bytes(20) + jpeg(pixels[:16, :16])))
    smooth = photo(rng, 96, 80)  # where libjpeg's smoothing of blocks would show
    files += [jpeg(smooth, mode, progressive=True, quality=15) for mode in ("RGB", "L")]
    return files


def parts_of(data: bytes) -> list[Part]:
    """Cut a sound file at its markers."""
    parts, at = [], 0
    while at < len(data):
        marker, length, body, at = data[at + 1], b"", b"", at + 2
        if marker not in (0xD8, 0xD9):
            length = data[at : at + 2]
            end = at + int.from_bytes(length, "big")
            body, at = data[at + 2 : end], end
        end = at
        while marker == 0xDA and not (
            data[end] == 0xFF and not (data[end + 1] == 0 or 0xD0 <= data[end + 1] <= 0xD7)
        ):
            end += 1
        parts.append([bytes([marker]), length, body, data[at:end]])
        at = end
    return parts


def joined(parts: list[Part]) -> bytes:
    """The file of these parts."""
    return b"".join(b"\xff" + b"".join(part) for part in parts)


def segment(marker: int, body: bytes) -> Part:
    """A segment with the length that it should have."""
    return [bytes([marker]), (len(body) + 2).to_bytes(2, "big"), body, b""]


ADOBE = b"Adobe\0\x64\0\0\0\0"
ICC = b"ICC_PROFILE\0"
TIFF = b"II*\0\x08\0\0\0"
EXIF = (b"", b"II*\0", b"MM\0*\0\0\0\x08\xff\xff\1\2", b"XX*\0junk", b"II*\0\xff\xff\xff\xff")
EXIF += (TIFF + b"\xff" * 18, TIFF + b"\1\0\x12\1\3\0\1\0\0\0\x09\0\0\0")
EXIF += (TIFF + b"\1\0\x12\1\2\0\xff\xff\xff\x7f\0\0\0\0",)
INSERTED = (
    *(segment(0xE0, b"JFIF\0" + revision + b"\0\0\1\0\1\0\0") for revision in (b"\0\0", b"\1\2", b"\2\0", b"\xff\xff")),
    *(segment(0xE0, body) for body in (b"", b"JFIF\0", b"JFXX\0\x13", b"AVI1\0\0")),
    *(segment(0xE1, b"Exif\0\0" + body) for body in EXIF),
    [b"\xe1", b"\0\2", b"", b""], [b"\xe1", b"\0\3", b"Exif\0\0", b""], [b"\xe1", b"\0\7", b"Exif\0\0", b""],
    *(segment(0xE2, ICC + numbers + b"x" * 40) for numbers in (b"\1\2", b"\2\1", b"\1\1", b"\0\0", b"\3\2")),
    *(segment(0xEE, ADOBE + transform) for transform in (b"\0", b"\1", b"\2", b"\7", b"", b"\0\0\0")),
    *(segment(marker, b"\0" * 9) for marker in (0xFE, 0xE7, 0xEF, 0xDC, 0xDE, 0xDF, 0xF0, 0xC8, 0xCC, 0x02, 0xBF)),
    *(segment(0xDD, value.to_bytes(2, "big")) for value in (0, 1, 5, 65535)),
    *([bytes([marker]), b"", b"", b""] for marker in (0x01, 0xD0, 0xD7, 0xD8, 0xD9, 0x00, 0xFF)),
    *([b"\xff\xfe", b"\0\2", b"", stray] for stray in (b"\0", b"\x12\x34", bytes(11), b"x" * 600, b"\xff")),
)  # fmt: skip
"""Segments of other programs, markers without a segment, and comments with stray bytes after them."""


def change(rng: random.Random, parts: list[Part]) -> None:
    """One change, in place."""
    at = rng.randrange(1, len(parts))
    frames, tables, scans = (
        [part for part in parts if part[0][0] in markers]
        for markers in ((*range(0xC0, 0xC4), 0xC9, 0xCA), (0xC4, 0xDB), (0xDA,))
    )
    match rng.randrange(13):
        case 0:
            parts[at][0] = bytes([rng.choice((*range(0xC0, 0xFF), 0x01, 0x02, 0x00, 0xFF))])
        case 1 | 2:
            parts.insert(at, list(rng.choice(INSERTED)))
        case 3:
            del parts[at]
        case 4:
            parts.insert(at, list(rng.choice(parts)))
        case 5:
            for part in frames:
                part[0] = bytes([rng.randrange(0xC0, 0xD0)])
        case 6 | 7 | 8 | 9:
            group = rng.choice([each for each in (frames, tables, scans) if each] or [parts])
            edit(rng, rng.choice(group), 3 if group is scans and rng.random() < 0.5 else 2)
        case 10 if scans:  # a scan again, of other coefficients or bits
            again = list(rng.choice(scans))
            endings = (again[2][-3:], b"\x01\x3f\x01", b"\0\0\x01", b"\x01\x05\x02")
            again[2] = again[2][:-3] + rng.choice(endings)
            again[3] = rng.choice((again[3], b"", b"\0" * 40))
            parts.insert(len(parts) - 1, again)
        case 11:
            if parts[at][1]:
                length = int.from_bytes(parts[at][1], "big")
                other = rng.choice((0, 1, 2, 3, length - 1, length + 1, length + 2, length + 300, 65535))
                parts[at][1] = (other % 65536).to_bytes(2, "big")
        case _:
            first, second = rng.randrange(1, len(parts)), rng.randrange(1, len(parts))
            parts[first], parts[second] = parts[second], parts[first]


def edit(rng: random.Random, part: Part, field: int) -> None:
    """Change, insert or remove a few bytes of a part."""
    data = bytearray(part[field])
    place = rng.randrange(len(data) + 1)
    match rng.randrange(5):
        case 0 if data:
            data[place - 1] ^= 1 << rng.randrange(8)
        case 1 if data:
            values = (0, 1, 2, 8, 12, 0xFF, *b"\x11\x12\x21\x22\x41\x44", rng.randrange(256))
            data[place - 1] = rng.choice(values)
        case 2:
            del data[place : place + rng.choice((1, 2, 9, 300))]
        case 3:
            other = (b"\0", b"\xff\0", b"\xff\xd1", b"\xff\xd9", b"\xff\xc4\0\3x", rng.randbytes(5))
            data[place:place] = rng.choice(other)
        case _:
            data[place : place + 6] = bytes([rng.choice((0, 0xFF, 0x55))]) * 6
    part[field] = bytes(data)


def corpus(number: int) -> Iterator[bytes]:
    """The first `number` files: sound ones, then mutated ones, a quarter of them cut at a marker, as long as there are
    such."""
    rng, sound = random.Random(18), sound_jpegs()
    starts = [parts[:k] for parts in map(parts_of, sound) for k in range(1, len(parts))]
    cut = [joined(start) + tail for start in starts for tail in (b"", b"\xff")]
    rng.shuffle(cut)
    endings = (b"\0" * 70, b"trailing", sound[0], b"\xff", b"\xff\xd9")
    first = [*sound, *(sound[k] + tail for k, tail in enumerate(endings))]
    yield from first[:number]
    for k in range(number - len(first)):
        parts = parts_of(rng.choice(sound))
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            change(rng, parts)
        yield cut.pop() if cut and k % 4 == 0 else joined(parts)
