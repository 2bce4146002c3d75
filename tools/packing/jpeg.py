"""Read the structure of a JPEG file from its markers (ITU-T T.81, annex B), and decide whether a shard may hold it.

The decoder is chosen by the markers, not by a library: libjpeg-turbo also reads lossless and 12-bit frames, which it
writes at sizes and depths other than requested.
"""

import re
import struct
import warnings
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image

EOI, SOS, APP0, APP1, APP2, APP14, APP15, COM = 0xD9, 0xDA, 0xE0, 0xE1, 0xE2, 0xEE, 0xEF, 0xFE
FRAMES = {marker for marker in range(0xC0, 0xD0) if marker not in (0xC4, 0xC8, 0xCC)}
"""SOF0 to SOF15 (T.81, table B.1)."""
BASELINE, PROGRESSIVE = (0xC0, 0xC1), 0xC2
"""The Huffman-coded frames, whose samples are 8 or 12 bits: SOF0 and SOF1, SOF2."""
WITHOUT_LENGTH = {0x01, *range(0xD0, 0xD9)}
"""TEM, RST0 to RST7, SOI: markers without a segment, which are invalid outside of scans."""
MARKER = re.compile(rb"\xff[^\x00\xff]")
END_OF_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
EXIF, ICC = b"Exif\0\0", b"ICC_PROFILE\0"
DAMAGED_EXIF = "damaged EXIF block"
JFIF = b"\xff\xe0\0\x10JFIF\0\1\1\0\0\1\0\1\0\0"
"""A JFIF header of revision 1.01, square pixels, no thumbnail."""
SAMPLINGS = {(1, 1), (2, 1), (2, 2), (1, 2), (4, 1)}
"""Luma samples per chroma sample, horizontally and vertically: 4:4:4, 4:2:2, 4:2:0, 4:4:0, 4:1:1, which nvJPEG and
libjpeg-turbo both decode (nvImageCodec 0.8, extensions/nvjpeg/cuda_decoder.cpp)."""
MAX_SCANS = 256
"""DALI's decoder leaves files with more to others (nvImageCodec 0.8, extensions/libjpeg_turbo/jpeg_handle.cpp)."""
MAX_SEGMENTS = 10_000
"""Limit for reading a file; photographs have some dozens."""


class Segment(NamedTuple):
    """A marker and its content."""

    marker: int
    start: int
    """First byte of the marker, including fill bytes before it."""
    content: int
    """First byte after its length."""
    end: int
    """First byte after it; for SOS, after its header."""


class Jpeg(NamedTuple):
    """Structure of a file, from its markers."""

    anomaly: str = ""
    """First deviation from what strict decoders such as DALI's accept; empty if there is none."""
    segments: Sequence[Segment] = ()
    """Of the whole file."""
    end: int = -1
    """First byte after the end marker; -1 where there is none."""
    frame: int = 0
    """SOF marker; 0 unless there is exactly one readable frame."""
    precision: int = 0
    """Bits per sample."""
    height: int = 0
    width: int = 0
    color: str = "other"
    """"grey", "YCbCr", "RGB" or "other"."""
    one_scan: bool = False
    """Whether the first scan of a baseline frame has all components: libjpeg then decodes it row by row."""

    @property
    def is_common(self) -> bool:
        """Return True if libjpeg-turbo decodes the frame to 8-bit RGB at any scale."""
        return self.frame in (*BASELINE, PROGRESSIVE) and self.precision == 8 and self.color != "other"


def read_jpeg(raw: bytes) -> Jpeg:
    """Read the markers of a file as libjpeg does, skipping stray bytes between them."""
    if not raw.startswith(b"\xff\xd8"):
        return Jpeg("not a JPEG file")
    segments, end, anomaly = read_segments(raw)
    frames = [segment for segment in segments if segment.marker in FRAMES]
    scans = [segment for segment in segments if segment.marker == SOS]
    if len(frames) != 1 or not scans or scans[0].start < frames[0].start:
        return Jpeg(anomaly or "not one frame before its scans", segments, end)
    frame, content = frames[0].marker, raw[frames[0].content : frames[0].end]
    if len(content) < 9 or len(content) != 6 + 3 * content[5]:
        return Jpeg(anomaly or "frame header of a wrong length", segments, end)
    precision, height, width, count = struct.unpack_from(">BHHB", content)
    if not height or not width:
        return Jpeg(anomaly or "image without size", segments, end)
    components = content[6::3]
    header = segments[: segments.index(scans[0])]
    color = find_color(raw, header, components)
    one_scan = frame in BASELINE and raw.startswith(bytes([count]), scans[0].content)
    if frame not in (*BASELINE, PROGRESSIVE) or precision != 8:
        anomaly = f"JPEG frame of type SOF{frame & 15}, {precision} bits"
    elif color not in ("grey", "YCbCr"):
        anomaly = {("RGB", 3): "RGB JPEG", ("other", 4): "CMYK JPEG"}.get(
            (color, count), f"JPEG of {count} components"
        )
    elif color == "YCbCr" and find_chroma_sampling(content[7::3]) not in SAMPLINGS:
        anomaly = anomaly or f"chroma sampling {content[7::3].hex(' ')}"
    elif len(scans) > MAX_SCANS:
        anomaly = anomaly or f"{len(scans)} scans"
    elif not (one_scan and len(set(components)) == count) and not is_complete(raw, scans, components):
        anomaly = anomaly or "JPEG that lacks scans"
    else:
        anomaly = anomaly or find_metadata_anomaly(raw, segments)
    return Jpeg(anomaly, segments, end, frame, precision, height, width, color, one_scan)


def read_segments(raw: bytes) -> tuple[list[Segment], int, str]:
    """Return the segments, the first byte after the end marker (-1: there is none), and the first anomaly."""
    segments: list[Segment] = []
    position, anomaly = 2, ""
    while len(segments) < MAX_SEGMENTS and (match := MARKER.search(raw, position)):
        start, after = match.span()
        marker = raw[after - 1]
        while start > position and raw[start - 1] == 0xFF:  # fill bytes
            start -= 1
        if start > position:
            anomaly = anomaly or f"{start - position} stray bytes before marker {marker:02X}"
        if marker == EOI:
            return segments, after, anomaly
        if marker in WITHOUT_LENGTH:
            anomaly = anomaly or f"marker {marker:02X} out of place"
            position = after
            continue
        size = int.from_bytes(raw[after : after + 2], "big")
        position = after + size
        if size < 2 or position > len(raw):
            return segments, -1, anomaly or f"segment {marker:02X} is cut short"
        segments.append(Segment(marker, start, after + 2, position))
        if marker == APP1 and size < 8 and raw[after + 2 : after + 8] == EXIF:  # DALI reads past its end
            anomaly = anomaly or "EXIF block shorter than its name"
        if marker == SOS:
            position = find_end_of_scan(raw, segments[-1])
    return segments, -1, anomaly or "no end marker"


def find_end_of_scan(raw: bytes, scan: Segment) -> int:
    """Return the first byte after the data of a scan."""
    match = END_OF_SCAN.search(raw, scan.end)
    return match.start() if match else len(raw)


def find_metadata_anomaly(raw: bytes, segments: list[Segment]) -> str:
    """Find metadata that libjpeg-turbo warns about: a JFIF header whose major revision is not 1 (jdmarker.c), an ICC
    profile with missing pieces (jdicc.c); empty if none."""
    pieces = []
    for segment in segments:
        content = raw[segment.content : segment.end]
        if is_jfif(segment, content) and content[5] != 1:
            return f"JFIF header of revision {content[5]}.{content[6]:02}"
        if segment.marker == APP2 and content.startswith(ICC) and len(content) >= 14:
            pieces.append((content[12], content[13]))
    if pieces and sorted(pieces) != [(number, len(pieces)) for number in range(1, len(pieces) + 1)]:
        return "ICC profile that lacks pieces"
    return ""


def is_jfif(segment: Segment, content: bytes) -> bool:
    """Return True for a JFIF header; libjpeg ignores shorter ones."""
    return segment.marker == APP0 and content.startswith(b"JFIF\0") and len(content) >= 14


def find_color(raw: bytes, header: list[Segment], components: bytes) -> str:
    """Find the colour space by libjpeg's rule (jdapimin.c, default_decompress_parms) from the segments before the first
    scan: JFIF means YCbCr, else Adobe's marker decides, else the component identifiers."""
    if len(components) == 1:
        return "grey"
    if len(components) != 3:
        return "other"
    markers = [(each, raw[each.content : each.end]) for each in header if each.marker in (APP0, APP14)]
    if any(is_jfif(segment, content) for segment, content in markers):
        return "YCbCr"
    adobe = [
        content for segment, content in markers if segment.marker == APP14 and content.startswith(b"Adobe")
    ]
    if transforms := [content[11] for content in adobe if len(content) >= 12]:
        return "YCbCr" if transforms[-1] else "RGB"
    return "RGB" if components == b"RGB" else "YCbCr"


def find_chroma_sampling(factors: bytes) -> tuple[float, float]:
    """Compute luma samples per chroma sample, horizontally and vertically, from the factors of three components; zeros
    if the chroma components differ."""
    (luma_h, luma_v), first, second = ((each >> 4, each & 15) for each in factors)
    return (luma_h / first[0], luma_v / first[1]) if first == second and min(first) > 0 else (0, 0)


def is_complete(raw: bytes, scans: list[Segment], components: bytes) -> bool:
    """Return True if the scans refine every coefficient of every component to its last bit.

    If not, libjpeg smooths block edges (jdcoefct.c, smoothing_ok), so DALI's crops, which lack the neighbouring blocks,
    differ from the whole image. Components with the same identifier count as one.
    """
    bits = {(component, k): -1 for component in components for k in range(64)}
    for scan in scans:
        if len(content := raw[scan.content : scan.end]) >= 6:
            first, last, approximation = content[-3:]
            bits |= {
                (each, k): approximation & 15 for each in content[1:-3:2] for k in range(first, last + 1)
            }
    return len(bits) == 64 * len(components) and not any(bits.values())


def rewrite_header(raw: bytes, jpeg: Jpeg) -> bytes:
    """Strip a JPEG to what decoders need, without changing a pixel.

    Keeps tables, frame, scans and the colour space markers; drops EXIF, ICC, other application data, comments and stray
    bytes. A JFIF header of any revision becomes one of revision 1.01.
    """
    out, in_header = [b"\xff\xd8"], True
    for segment in jpeg.segments:
        if segment.marker == SOS:
            out.append(raw[segment.start : find_end_of_scan(raw, segment)])
            in_header = False
        elif is_jfif(segment, raw[segment.content : segment.end]):
            out.append(JFIF * in_header)
        elif (segment.marker == APP14 and in_header) or (
            not APP0 <= segment.marker <= APP15 and segment.marker != COM
        ):
            out.append(raw[segment.start : segment.end])
    return b"".join(out) + b"\xff\xd9" * (jpeg.end > 0)


def list_exif_notes(raw: bytes, jpeg: Jpeg) -> list[tuple[str, str]]:
    """List notes on EXIF blocks: damaged, or with an orientation other than upright."""
    for segment in jpeg.segments:
        block = raw[segment.content : segment.end]
        if segment.marker != APP1 or not block.startswith(EXIF):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                exif = Image.Exif()
                exif.load(block)
                orientation = exif.get(0x0112)
        except Exception:  # Pillow raises many kinds for damaged EXIF blocks
            return [(DAMAGED_EXIF, "stripped")]
        if orientation not in (None, 1):
            return [(f"EXIF orientation {orientation}", "tag stripped, pixels as they were")]
    return []
