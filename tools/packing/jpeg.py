"""Read the structure of a JPEG file from its markers (ITU-T T.81, annex B).

Some files have to be recognized by their markers, as libjpeg-turbo does not warn of them: lossless and 12-bit frames,
which it decodes to another size or depth than requested, and files that lack scans, whose block edges it smooths.
"""

import re
from typing import NamedTuple

SOI = b"\xff\xd8"
EOI, SOS, APP1 = 0xD9, 0xDA, 0xE1
FRAMES = {marker for marker in range(0xC0, 0xD0) if marker not in (0xC4, 0xC8, 0xCC)}
"""SOF0 to SOF15 (T.81, table B.1)."""
BASELINE, PROGRESSIVE = (0xC0, 0xC1), 0xC2
"""The Huffman-coded frames, whose samples are 8 or 12 bits: SOF0 and SOF1, SOF2."""
WITHOUT_LENGTH = {0x01, *range(0xD0, 0xD9)}
"""TEM, RST0 to RST7, SOI: markers without a segment, which are invalid outside of scans."""
MARKER = re.compile(rb"\xff[^\x00\xff]")
END_OF_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
EXIF = b"Exif\0\0"
MAX_SCANS = 256
"""DALI's decoder leaves files with more to others (nvImageCodec 0.8, extensions/libjpeg_turbo/jpeg_handle.cpp)."""


class Jpeg(NamedTuple):
    """Structure of a file, from its markers."""

    fault: str = ""
    """First reason why a shard may not hold the file; empty if its markers give none."""
    end: int = -1
    """First byte after the end marker; -1 where there is none."""
    num_scans: int = 0
    one_scan: bool = False
    """True if the first scan of a baseline frame has all components: libjpeg then decodes it row by row."""
    exif: bytes = b""
    """First EXIF block."""


def read_jpeg(raw: bytes) -> Jpeg:
    """Read the markers of a file as libjpeg does, skipping stray bytes between them."""
    if not raw.startswith(SOI):
        return Jpeg("not a JPEG file")
    fault, exif, end, position = "", b"", -1, len(SOI)
    frames: list[tuple[int, bytes]] = []
    scans: list[bytes] = []
    while match := MARKER.search(raw, position):
        start, after = match.span()
        marker = raw[after - 1]
        if stray := len(raw[position:start].rstrip(b"\xff")):
            fault = fault or f"{stray} stray bytes before marker {marker:02X}"
        if marker == EOI:
            end = after
            break
        if marker in WITHOUT_LENGTH:
            fault, position = fault or f"marker {marker:02X} out of place", after
            continue
        position = after + int.from_bytes(raw[after : after + 2], "big")
        if not after + 2 <= position <= len(raw):
            fault = fault or f"segment {marker:02X} is cut short"
            break
        content = raw[after + 2 : position]
        if marker in FRAMES:
            frames.append((marker, content))
        elif marker == SOS:
            fault = fault or ("" if frames else "scan without a frame")
            scans.append(content)
            after_scan = END_OF_SCAN.search(raw, position)
            position = after_scan.start() if after_scan else len(raw)
        elif marker == APP1 and raw.startswith(EXIF, after + 2):
            exif = exif or content
            if len(content) < len(EXIF):  # DALI reads past its end
                fault = fault or "EXIF block shorter than its name"
    if end < 0:
        fault = fault or "no end marker"
    one_scan = bool(frames and scans) and frames[0][0] in BASELINE and scans[0][:1] == frames[0][1][5:6]
    return Jpeg(fault or find_frame_fault(frames, scans, one_scan), end, len(scans), one_scan, exif)


def find_frame_fault(frames: list[tuple[int, bytes]], scans: list[bytes], one_scan: bool) -> str:
    """Find what is wrong with the frames (marker and header) and the scans (headers); empty if nothing."""
    if len(frames) != 1 or not scans:
        return f"{len(frames)} frames, {len(scans)} scans"
    marker, frame = frames[0]
    if len(frame) < 9 or len(frame) != 6 + 3 * frame[5]:
        return "frame header of a wrong length"
    if marker not in (*BASELINE, PROGRESSIVE) or frame[0] != 8:
        return f"JPEG frame of type SOF{marker & 15}, {frame[0]} bits"
    if len(scans) > MAX_SCANS:
        return f"{len(scans)} scans"
    components = frame[6::3]
    if not (one_scan and len(set(components)) == len(components)) and not is_complete(scans, components):
        return "JPEG that lacks scans"
    return ""


def is_complete(scans: list[bytes], components: bytes) -> bool:
    """Return True if the scans refine every coefficient of every component to its last bit.

    If not, libjpeg smooths block edges (jdcoefct.c, smoothing_ok), so DALI's crops, which lack the neighbouring blocks,
    differ from the whole image. Components with the same identifier count as one.
    """
    bits = {(component, k): -1 for component in components for k in range(64)}
    for scan in scans:
        if len(scan) >= 6:
            first, last, approximation = scan[-3:]
            bits |= {(each, k): approximation & 15 for each in scan[1:-3:2] for k in range(first, last + 1)}
    return len(bits) == 64 * len(components) and not any(bits.values())
