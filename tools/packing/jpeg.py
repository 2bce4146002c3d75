"""The structure of a JPEG file, read from its own markers (ITU-T T.81, annex B), and what of it may stand in a shard.

A decoder is chosen by what is read here, never by what a library guesses: libjpeg-turbo also reads lossless and 12-bit
frames, which it writes at other sizes and depths than asked for.
"""

import re
import warnings
from typing import NamedTuple

from PIL import Image

DAMAGED_EXIF = "damaged EXIF block"
FRAMES = {marker for marker in range(0xC0, 0xD0) if marker not in (0xC4, 0xC8, 0xCC)}
"""SOF markers (T.81, table B.1)."""
BASELINE, PROGRESSIVE = (0xC0, 0xC1), 0xC2
"""Huffman-coded frames whose samples are 8 or 12 bits: SOF0 and SOF1, SOF2."""
SAMPLINGS = {(1, 1), (2, 1), (2, 2), (1, 2), (4, 1)}
"""Luma samples to one of chroma, horizontally and vertically: 4:4:4, 4:2:2, 4:2:0, 4:4:0, 4:1:1, which nvJPEG and
libjpeg-turbo both decode (nvImageCodec 0.8, extensions/nvjpeg/cuda_decoder.cpp)."""
MAX_SCANS = 256
"""More than these DALI refuses (nvImageCodec 0.8, extensions/libjpeg_turbo/jpeg_handle.cpp)."""
MAX_SEGMENTS = 10_000
SOI, EOI, SOS = 0xD8, 0xD9, 0xDA
WITHOUT_LENGTH = {0x01, *range(0xD0, 0xD9)}
"""TEM, RST0 to RST7, SOI: markers that head no segment; out of place outside of scans."""
MARKER = re.compile(rb"\xff+[^\x00\xff]")
END_OF_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
JFIF = b"\xff\xe0\x00\x10JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00"


class Jpeg(NamedTuple):
    """What the markers of a file say; zeros where they say nothing."""

    segments: list[tuple[int, int, int]]
    """(marker, first byte, end) of each, over the whole file."""
    frame: int
    """SOF marker; 0 where the file has none, or is no JPEG."""
    precision: int
    """Bits a sample."""
    height: int
    width: int
    sampling: list[tuple[int, int]]
    """Horizontal and vertical factor of each component."""
    color: str
    """"grey", "YCbCr", "RGB" or "other"."""
    one_scan: bool
    """Whether the first scan holds all components of a baseline frame: libjpeg then decodes it row by row, in little
    memory."""
    end: int
    """First byte behind the end marker; -1 where there is none."""
    oddity: str
    """The first thing in the markers that strict readers, DALI among them, may refuse or take for something else; empty
    if there is none."""

    @property
    def is_common(self) -> bool:
        """Whether libjpeg-turbo decodes the frame to 8-bit RGB at any of its scales."""
        return self.frame in (*BASELINE, PROGRESSIVE) and self.precision == 8 and self.color != "other"


def read_jpeg(raw: bytes) -> Jpeg:
    """Read the markers of a file as libjpeg does: what stands before one is skipped."""
    if not raw.startswith(b"\xff\xd8"):
        return Jpeg([], 0, 0, 0, 0, [], "other", False, -1, "not a JPEG file")
    segments, end, oddity = read_segments(raw)
    frames = [segment for segment in segments if segment[0] in FRAMES]
    scans = [start for marker, start, _ in segments if marker == SOS]
    if len(frames) != 1 or not scans or frames[0][1] > scans[0]:
        return Jpeg(segments, 0, 0, 0, 0, [], "other", False, end, oddity or "not one frame before its scans")
    frame, _, stop = frames[0]
    body = segment_body(raw, frames[0])
    components = body[6::3]
    sampling = [(factors >> 4, factors & 15) for factors in body[7::3]]
    precision, height, width = body[0] if body else 0, int.from_bytes(body[1:3], "big"), int.from_bytes(body[3:5], "big")
    color = find_color(raw, segments, components)
    if len(body) < 9 or len(body) != 6 + 3 * body[5] or not height or not width:
        return Jpeg(segments, 0, 0, 0, 0, [], "other", False, end, oddity or f"bad frame header before byte {stop}")
    first_scan = segment_body(raw, next(segment for segment in segments if segment[0] == SOS))
    one_scan = frame in BASELINE and first_scan[:1] == body[5:6]
    if frame not in (*BASELINE, PROGRESSIVE) or precision != 8:
        oddity = f"JPEG frame of type SOF{frame & 15} with {precision} bits"
    elif color not in ("grey", "YCbCr"):
        oddity = f"JPEG of {len(sampling)} components, {color if color == 'RGB' else 'not YCbCr'}"
    elif color == "YCbCr" and chroma_sampling(sampling) not in SAMPLINGS:
        oddity = oddity or f"chroma sampling {sampling}"
    elif len(scans) > MAX_SCANS:
        oddity = oddity or f"{len(scans)} scans"
    elif frame == PROGRESSIVE and not is_complete(raw, segments, components):
        oddity = oddity or "a progressive JPEG that lacks scans"
    return Jpeg(segments, frame, precision, height, width, sampling, color, one_scan, end, oddity)


def read_segments(raw: bytes) -> tuple[list[tuple[int, int, int]], int, str]:
    """(marker, first byte, end) of the segments, the byte behind the end marker (-1: there is none), first oddity."""
    segments, position, oddity = [], 2, ""
    while len(segments) < MAX_SEGMENTS and (match := MARKER.search(raw, position)):
        marker, body = raw[match.end() - 1], match.end()
        if match.start() > position:
            oddity = oddity or f"{match.start() - position} stray bytes before marker {marker:02X}"
        if marker == EOI:
            return segments, body, oddity
        if marker in WITHOUT_LENGTH:
            oddity = oddity or f"marker {marker:02X} out of place"
            position = body
            continue
        size = int.from_bytes(raw[body : body + 2], "big")
        position = body + size
        if size < 2 or position > len(raw):
            return segments, -1, oddity or f"segment {marker:02X} is cut short"
        segments.append((marker, match.start(), position))
        if marker == 0xE1 and size < 8 and raw[body + 2 : body + 8] == b"Exif\0\0":  # DALI reads on over its end
            oddity = oddity or "EXIF block shorter than its name"
        if marker == SOS:
            scan_end = END_OF_SCAN.search(raw, position)
            position = scan_end.start() if scan_end else len(raw)
    return segments, -1, oddity or "no end marker"


def segment_body(raw: bytes, segment: tuple[int, int, int]) -> bytes:
    """What stands behind a segment's length."""
    _, start, end = segment
    while raw[start + 1] == 0xFF:  # fill bytes
        start += 1
    return raw[start + 4 : end]


def is_complete(raw: bytes, segments: list[tuple[int, int, int]], components: bytes) -> bool:
    """Whether the scans of a progressive frame bring every coefficient of every component to its last bit.

    Where they do not, libjpeg smooths over the edges of blocks (jdcoefct.c, smoothing_ok), and DALI's windows, at whose
    edges there are no neighbours, differ from the whole image.
    """
    missing = {(component, k) for component in components for k in range(64)}
    for segment in segments:
        if segment[0] == SOS and len(body := segment_body(raw, segment)) >= 6:
            first, last, bits = body[-3:]
            if not bits & 15:
                missing -= {(component, k) for component in body[1:-3:2] for k in range(first, last + 1)}
    return not missing


def find_color(raw: bytes, segments: list[tuple[int, int, int]], components: bytes) -> str:
    """The colours of a frame with these component identifiers, by libjpeg's rule (jdapimin.c,
    default_decompress_parms): JFIF means YCbCr, else Adobe's marker tells, else the identifiers."""
    if len(components) == 1:
        return "grey"
    if len(components) != 3:
        return "other"
    bodies = [(segment[0], segment_body(raw, segment)) for segment in segments if segment[0] in (0xE0, 0xEE)]
    if any(marker == 0xE0 and body.startswith(b"JFIF\0") and len(body) >= 14 for marker, body in bodies):
        return "YCbCr"
    transforms = [body[11] for marker, body in bodies if marker == 0xEE and body[:5] == b"Adobe" and len(body) >= 12]
    if transforms:
        return "YCbCr" if transforms[-1] else "RGB"
    return "RGB" if components == b"RGB" else "YCbCr"


def chroma_sampling(sampling: list[tuple[int, int]]) -> tuple[float, float]:
    """Luma samples to one of chroma, horizontally and vertically; zeros where the chroma components differ."""
    (luma_h, luma_v), first, second = sampling
    return (luma_h / first[0], luma_v / first[1]) if first == second and min(first) > 0 else (0, 0)


def rewrite_header(raw: bytes, jpeg: Jpeg) -> bytes:
    """The same JPEG with what decoders need alone, up to its end marker; not a pixel changes.

    Keeps tables, frame and scans, and what says how colours are stored; leaves out EXIF, ICC and other application
    data, comments, stray bytes. A JFIF header of any revision becomes one of revision 1.01.
    """
    out = [b"\xff\xd8"]
    behind = [start for _, start, _ in jpeg.segments[1:]] + [jpeg.end if jpeg.end > 0 else len(raw)]
    for segment, following in zip(jpeg.segments, behind, strict=True):
        marker, start, end = segment
        if marker == 0xE0 and segment_body(raw, segment).startswith(b"JFIF\0"):
            out.append(JFIF)
        elif marker == SOS:
            scan_end = END_OF_SCAN.search(raw, end)
            out.append(raw[start : scan_end.start() if scan_end else following])
        elif marker == 0xEE or not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            out.append(raw[start:end])
    return b"".join(out) + (b"\xff\xd9" if jpeg.end > 0 else b"")


def exif_notes(raw: bytes, jpeg: Jpeg) -> list[tuple[str, str]]:
    """What is to be said of the EXIF blocks: damaged, or turning the image for viewers that heed it."""
    for segment in jpeg.segments:
        if segment[0] != 0xE1 or not (block := segment_body(raw, segment)).startswith(b"Exif\0\0"):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                exif = Image.Exif()
                exif.load(block)
                orientation = exif.get(0x0112)
        except Exception:  # EXIF blocks are damaged in many ways, and Pillow has an exception for each
            return [(DAMAGED_EXIF, "stripped")]
        if orientation not in (None, 1):
            return [(f"EXIF orientation {orientation}", "tag stripped, pixels as they were")]
    return []
