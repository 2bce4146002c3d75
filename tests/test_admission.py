"""What is admitted to a shard as it is, DALI decodes whole and in windows to libjpeg's pixels; and no JPEG, however it
is mutated, ends the packer or makes it write what depends on memory that nobody has written to.

DALI decodes in processes of its own, so that a crash names the number of its file;
`python -m tests.test_admission DEVICE FIRST LAST` repeats some.
"""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import simplejpeg

from pipeline.files import read_json
from tests.helpers import files, jpeg, run_ok, run_python, tar_of, write
from tests.mutate_jpeg import corpus, joined, segment, sound_jpegs
from tools.packing.images import find_fault

FEW, MANY = 500, 4000


def windows_of(height: int, width: int) -> list[tuple[slice, slice]]:
    """A window at each corner, more than half as high and as wide as the image, and small ones within."""
    tall, wide = height // 2 + 1, width // 2 + 1
    rows, columns = (
        (slice(0, tall), slice(height - tall, height)),
        (slice(0, wide), slice(width - wide, width)),
    )
    found = [(row, column) for row in rows for column in columns]
    for k in (1, 2):
        inner = slice(k * height // 4, (k + 1) * height // 4), slice(width // 3, width // 2 + 1)
        found += [inner] * all(side.start < side.stop for side in inner)
    return found


def decode_admitted(device: str, first: int, last: int) -> None:
    """Decode what is admitted of a part of the corpus by DALI, "cpu" or "gpu"; print each file's number before, and the
    files at last. Raises where DALI's pixels are not libjpeg's: on a GPU, where upsampling rounds otherwise, by more
    than two levels on average."""
    from nvidia.dali import fn, pipeline_def

    from pipeline.graph import Graph, decode_on_gpu

    settings = {"batch_size": 1, "num_threads": 1, "prefetch_queue_depth": 1}

    @pipeline_def(device_id=0 if device == "gpu" else None, **settings)
    def whole() -> object:
        encoded = fn.external_source(name="encoded")
        if device == "gpu":
            return decode_on_gpu(encoded, Graph("gpu", "gpu")).cpu()
        return fn.decoders.image(encoded, device="cpu", adjust_orientation=False)

    @pipeline_def(device_id=None, **settings)
    def window() -> object:
        encoded, start, end = (fn.external_source(name=name) for name in ("encoded", "start", "end"))
        return fn.decoders.image_slice(
            encoded, device="cpu", adjust_orientation=False, start=start, end=end, axes=[0, 1]
        )

    def decoded(pipe: object, **inputs: np.ndarray) -> np.ndarray:
        for name, value in inputs.items():
            pipe.feed_input(name, [value])  # type: ignore[attr-defined]
        return np.asarray(pipe.run()[0].as_cpu().at(0)).astype(int)  # type: ignore[attr-defined]

    pipes, numbers = (whole(), window()), []
    for number, data in enumerate(corpus(last)):
        if number < first or find_fault(data):
            continue
        print(number, flush=True)
        numbers.append(number)
        encoded = np.frombuffer(data, np.uint8)
        expected = simplejpeg.decode_jpeg(data, "RGB", fastdct=False, fastupsample=False).astype(int)
        got = decoded(pipes[0], encoded=encoded)
        if device == "gpu":
            assert got.shape == expected.shape and np.abs(got - expected).mean() <= 2, number
            continue
        assert np.array_equal(got, expected), number
        for place in windows_of(*expected.shape[:2]):
            start, end = np.array([(side.start, side.stop) for side in place], np.int32).T.copy()
            got = decoded(pipes[1], encoded=encoded, start=start, end=end)
            assert np.array_equal(got, expected[place]), number
    print("admitted", *numbers)


def check_admitted(device: str, number: int, least: int) -> None:
    """Decode what is admitted of the first so many files in a process of its own; it has to be enough of them."""
    done = run_python("-m", "tests.test_admission", device, "0", str(number))
    assert done.returncode == 0, (done.returncode, done.stdout.split()[-1:], done.stderr[-2000:])
    assert len(done.stdout.splitlines()[-1].split()) - 1 >= least


SOUND = sound_jpegs()
NOISE = np.random.default_rng(5).integers(0, 256, (48, 64, 3), dtype=np.uint8)


def with_segment(data: bytes, marker: int, body: bytes) -> bytes:
    """A file with one segment more, after its start marker."""
    return data[:2] + joined([segment(marker, body)]) + data[2:]


def subsampled(factors: bytes) -> bytes:
    """A baseline file whose frame claims other sampling factors than it has."""
    data = jpeg(NOISE, subsampling="4:4:4")
    at = data.index(b"\xff\xc0") + 11
    file = bytearray(data)
    file[at : at + 9 : 3] = factors
    return bytes(file)


SOS, EOI = b"\xff\xda", b"\xff\xd9"
SCANS = SOUND[2][:-2].split(SOS)
"""A progressive file, cut before each of its scans."""
EMPTY = b"\0\x08\1\1\0\1\x3f\1"
"""A scan that would leave a bit to come."""


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (SOUND[0], ""),
        (with_segment(SOUND[0], 0xE0, b"JFXX\0\x13"), ""),
        (with_segment(SOUND[0], 0xEE, b"Adobe\0\x64\0\0\0\0\0"), ""),  # JFIF wins
        (SOUND[0] + b"trailing", ""),
        (jpeg(NOISE, keep_rgb=True), "RGB JPEG"),
        (jpeg(NOISE, "CMYK"), "CMYK JPEG"),
        (subsampled(b"\x41\x11\x11"), "extraneous bytes"),  # valid but for the scan
        (subsampled(b"\x14\x11\x11"), "sampling"),
        (subsampled(b"\x22\x11\x12"), "subsampling"),
        (subsampled(b"\x44\x11\x11"), "subsampling"),
        (SOS.join([*SCANS, *SCANS[-1:] * 300]) + EOI, "scans"),
        (SOS.join([*SCANS, EMPTY]) + EOI, "lacks scans"),
        (SOS.join(SCANS[:4]) + EOI, "lacks scans"),
        (with_segment(SOUND[0], 0xE0, b"JFIF\0\0\0\0\0\1\0\1\0\0"), "JFIF"),
        (with_segment(SOUND[0], 0xE2, b"ICC_PROFILE\0\2\3"), "bad ICC marker"),
        (with_segment(SOUND[0], 0xE1, b"Exif"), ""),
        (SOUND[0][:2] + b"\xff\xe1\0\3Exif\0\0" + SOUND[0][2:], "EXIF"),
        (SOUND[0].replace(b"\xff\xc0\0\x11\x08", b"\xff\xc1\0\x11\x0c"), "12 bits"),
        (SOUND[0][: SOUND[0].index(b"\xff\xda")] + b"\xff\xda\0\2", "no end marker"),
        (b"\xff\xd8" + b"\xff" * 1_000_000 + b"\0", "no end marker"),
        (SOUND[0][:-2], "no end marker"),
    ],
)
def test_the_rule(data: bytes, fault: str) -> None:
    """Each part of the rule refuses a file that lacks nothing else, and names what it is."""
    found = find_fault(data)
    assert fault in found if fault else not found, found


@pytest.mark.parametrize("number", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def test_dali_decodes_what_is_admitted_to_libjpegs_pixels(number: int) -> None:
    """Whole, and a window at each corner."""
    check_admitted("cpu", number, number // 12)


@pytest.mark.parametrize("store", ["crop256", "original"])
@pytest.mark.parametrize("number", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def test_packing_mutated_jpegs_is_deterministic(tmp_path: Path, number: int, store: str) -> None:
    """Pack the corpus twice, over memory that the C library fills with other bytes each time: equal shards. Every file
    is packed or skipped, and what is packed as an original is admitted."""
    raw = tmp_path / "raw" / "n00000011.tar"
    write(raw, tar_of({f"f{k}.JPEG": data for k, data in enumerate(corpus(number))}))
    results = []
    for fill in ("85", "170"):
        shards = tmp_path / f"{store}-{fill}"
        options = ("--store", store, "--on-bad", "skip", "--val-fraction", "0", "--workers", "1")
        environment = {**os.environ, "MALLOC_PERTURB_": fill}
        done = run_python("tools/make_shards.py", "pack", raw.parent, shards, *options, env=environment)
        assert done.returncode == 0 and done.stderr == "", (done.returncode, done.stderr)
        results.append(files(shards))
    assert results[0] == results[1]
    manifest = read_json(shards / "train" / "manifest.json")
    assert manifest["num_samples"] + len(manifest["skipped"]) == number < 4 * manifest["num_samples"]
    run_ok("tools/make_shards.py", "verify", shards)


@pytest.mark.gpu
def test_the_mixed_decoder_decodes_what_is_admitted() -> None:
    """The whole corpus, on a GPU."""
    check_admitted("gpu", MANY, MANY // 8)


if __name__ == "__main__":
    decode_admitted(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
