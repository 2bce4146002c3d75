"""The structure of a JPEG file, as far as the packer looks at it: segments, EXIF blocks, what lies behind the end."""

import warnings

from PIL import Image

DAMAGED_EXIF = "damaged EXIF block"


def segments(raw: bytes) -> list[tuple[int, int, int]]:
    """(marker, first byte, end) of a JPEG's segments up to its first scan; ends early where the structure is broken."""
    found, position = [], 2
    while position + 4 <= len(raw) and raw[position] == 0xFF:
        marker = raw[position + 1]
        if marker == 0xFF:  # a fill byte
            position += 1
            continue
        end = position + 2 + int.from_bytes(raw[position + 2 : position + 4], "big")
        found.append((marker, position, end))
        if marker == 0xDA:
            break
        position = end
    return found


def exif_segments(raw: bytes) -> list[tuple[int, int]]:
    """(first byte, end) of each EXIF block."""
    return [
        (start, end)
        for marker, start, end in segments(raw)
        if marker == 0xE1 and raw[start + 4 : start + 10] == b"Exif\0\0"
    ]


def exif_notes(raw: bytes) -> list[tuple[str, str]]:
    """What is to be said of the EXIF blocks: damaged, or turning the image for viewers that heed it."""
    for start, end in exif_segments(raw):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                exif = Image.Exif()
                exif.load(raw[start + 4 : end])
                orientation = exif.get(0x0112)
        except Exception:  # EXIF blocks are damaged in many ways, and Pillow has an exception for each
            return [(DAMAGED_EXIF, "stripped")]
        if orientation not in (None, 1):
            return [(f"EXIF orientation {orientation}", "tag stripped, pixels as they were")]
    return []


def without_exif(raw: bytes) -> bytes:
    """The same JPEG without its EXIF blocks; not a pixel changes."""
    for start, end in reversed(exif_segments(raw)):
        raw = raw[:start] + raw[end:]
    return raw


def trailing_bytes(raw: bytes) -> int:
    """Number of bytes after the end marker; -1 where there is none."""
    scan = next((end for marker, _, end in segments(raw) if marker == 0xDA), len(raw))
    end = raw.find(b"\xff\xd9", scan)  # no earlier: a thumbnail has an end as well
    return len(raw) - end - 2 if end >= 0 else -1
