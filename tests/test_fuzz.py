"""Whatever bytes a reader is given, it succeeds or refuses them in one printable sentence, exit code 2 or 3, without a
traceback, a crash or a hang, and writes nowhere but into its output.

Input number n is made by the n-th of `READERS` (modulo their number) from valid files and a generator seeded with n. A
process of its own prints each number before it; `python -m tests.test_fuzz SEEDS FIRST LAST` repeats some.
"""

import copy
import functools
import io
import json
import os
import random
import re
import shutil
import signal
import sys
import tarfile
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.eigenbasis import Eigenbasis
from pipeline.loader import decoded_batches
from pipeline.shards import open_shards
from tests.helpers import ROOT, jpeg, photo, run_ok, run_python, small_run
from tests.layouts import class_tars, image_set, kaggle, parquet
from tools.export_weights import export_weights
from tools.make_demo import DIGIT_TO_ID, DIGIT_TO_WNID, write_archives
from tools.make_shards import pack
from tools.packing import layouts
from tools.packing.adopt import adopt
from tools.packing.images import find_fault, pack_image
from tools.packing.index import index
from tools.packing.verify import stats, verify
from train.cli import run_main
from train.metrics import read_metrics
from train.pretrained import read_pretrained

QUICKSTART = ROOT / "train" / "configs" / "quickstart.yaml"
FEW, MANY = 240, 10_000
LIMIT_S = 60
"""For one input, which takes less than a second."""
MEMORY_BYTES = 1.5e9
"""Peak of a process that loaded torch, DALI and scipy."""
NUMBERS = (0.5, float("nan"), 1e308, -1, 0, 2, 256, 2**31 - 1, 2**40, 2**63, 10**30)
NAMES = ("../../escape", "/absolute", "a\nb", "\x1b[31mred", "\0", "n" * 300, "\N{SNOWMAN}.tar", "*")
YAML = ("&a [*a]", "!!python/object/apply:os.system [id]", "1e3", "0x1f", "1:30", "[1, 2", "[" * 3000)
VALUES: tuple[Any, ...] = (None, True, [], {}, "", [1, [2]], *NUMBERS, *NAMES, *YAML)
"""Other types, extremes, names that lead out of a folder or act on a terminal, YAML's surprises."""
TAR_FIELDS = ((0, 100), (100, 8), (124, 12), (156, 1), (157, 100), (257, 8), (345, 155))
"""Offset and length of name, mode, size, type, link, magic and prefix in a header."""


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """Change one to six bits, integer fields or slices."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 6)):
        at, length = rng.randrange(len(out) + 1), rng.choice((1, 2, 4, 8, 64, 1000))
        other = rng.randrange(len(out) + 1)
        replacements = (
            bytes([rng.choice((0, 1, 0x7F, 0x80, 0xFF))]),
            rng.randbytes(length),
            bytes(length),
            out[other : other + length],
            rng.choice((0, 2**31, 2**32 - 1, 2**63)).to_bytes(8, rng.choice(("big", "little")))[:length],
            b"",
        )
        out[at : at + rng.choice((0, 1, length))] = rng.choice(replacements)
        if rng.random() < 0.05:
            del out[at:]
    return bytes(out)


def mutate_json(rng: random.Random, data: bytes) -> bytes:
    """Change one to three values of a JSON file."""
    tree = json.loads(data)
    for _ in range(rng.randint(1, 3)):
        node, path = tree, []
        while isinstance(node, dict | list) and node and (not path or rng.random() < 0.8):
            key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
            path.append((node, key))
            node = node[key]
        if path:
            container, key = path[-1]
            container[key] = copy.deepcopy(rng.choice(VALUES))
            if rng.random() < 0.2:
                del container[key]
    return json.dumps(tree).encode(errors="surrogatepass")


def mutate_text(rng: random.Random, data: bytes) -> bytes:
    """Change one to three words or lines."""
    words = re.split(r"([\s,:]+)", data.decode())
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(0, len(words), 2)
        other = words[rng.randrange(0, len(words), 2)]
        words[at] = rng.choice(("", words[at] * 2, other, str(rng.choice(VALUES))))
    return "".join(words).encode()


def mutate_tar(rng: random.Random, data: bytes) -> bytes:
    """Change a field of a header, under a valid checksum, or insert a header of another kind."""
    headers = [at for at in range(0, len(data) - 511, 512) if data[at + 257 : at + 262] == b"ustar"]
    at = rng.choice(headers)
    if rng.random() < 0.3:
        info = tarfile.TarInfo(rng.choice(("x.jpg", "../../escape", "/absolute")))
        info.type = rng.choice((*map(bytes, zip(b"012345677xgLKSV", strict=True)),))
        info.linkname, info.size = "/etc/passwd", rng.choice((0, 0, 512, 10**9))
        record = rng.choice((b"", b"20 size=9999999999\n".ljust(512, b"\0")))
        return data[:at] + info.tobuf(tarfile.GNU_FORMAT) + record + data[at:]
    header = bytearray(data[at : at + 512])
    start, length = rng.choice(TAR_FIELDS)
    sizes = (b"7" * 12, b"-0000000001", b"\x80" + bytes(10) + b"\xff", b"\xff" * 12, b"")
    value = rng.choice((*sizes, rng.randbytes(12)))
    header[start : start + length] = value[:length].ljust(length, b"\0")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return data[:at] + bytes(header) + data[at + 512 :]


MUTATORS = dict.fromkeys((".jsonl", ".idx", ".csv", ".txt", ".yaml"), mutate_text)
MUTATORS |= {".json": mutate_json, ".tar": mutate_tar}


def mutate_file(rng: random.Random, path: Path) -> None:
    """Damage a file: three in ten times by bytes, else by what it holds."""
    mutate = mutate_bytes if rng.random() < 0.3 else MUTATORS.get(path.suffix, mutate_bytes)
    path.write_bytes(mutate(rng, path.read_bytes()))


def pack_one(path: Path) -> None:
    """Pack an image file in both stores; a shard may hold what becomes of it."""
    for store in ("crop256", "original"):
        assert not find_fault(pack_image(path.read_bytes(), store, 90).jpeg)


def pack_all(raw: Path, out: Path) -> None:
    """Pack raw images to the end, in this process."""
    pack(raw, out, samples_per_shard=11, workers=1, on_bad="skip")


def train_on(shards: Path) -> None:
    """Decode a split by DALI, as training does, with its eigenbasis."""
    train = open_shards(shards, "train")
    Eigenbasis.load(shards / "pca.json", train.manifest_sha256, with_mean_image=True)
    for _ in decoded_batches(train, 4, 1):
        pass


def parse_recipe(path: Path, out: Path) -> None:
    """Read a recipe as the trainer does."""
    from train.config import parse_config

    parse_config(["--config", str(path), "--data.shards", "shards", "--run.dir", str(out)])


Call = Callable[[Path, Path, Path], object]
READERS: dict[str, tuple[str, str, tuple[Call, ...]]] = {
    # name: the folder of valid files, which of them is damaged, calls with folder, damaged file and output
    "images": ("images", "*", (lambda raw, path, out: pack_one(path),)),
    "archives": ("raw", "*", (lambda raw, path, out: pack_all(raw, out),)),
    "class tars": ("class_tars", "*", (lambda raw, path, out: pack_all(raw, out),)),
    "kaggle": ("kaggle", "LOC*", (lambda raw, path, out: pack_all(raw, out),)),
    "parquet": ("parquet", "data/*", (lambda raw, path, out: pack_all(raw, out),)),
    "half a pack": ("half", "shards/**/*.*", (lambda raw, path, out: pack_all(raw / "raw", raw / "shards"),)),
    "shards": ("shards", "**/*.*", (
        lambda shards, path, out: verify(shards, workers=1),
        lambda shards, path, out: verify(shards, fast=True),
        lambda shards, path, out: stats(shards),
        lambda shards, path, out: train_on(shards),
        lambda shards, path, out: index(shards, out / "indexed", workers=1),
        lambda shards, path, out: adopt(shards / "train", out, split="train", pattern="*.tar", workers=1),
    )),
    "recipes": ("recipes", "*", (lambda folder, path, out: parse_recipe(path, out),)),
    "runs": ("run", "**/*.*", (
        lambda run, path, out: read_pretrained(run),
        lambda run, path, out: export_weights(run, out / "weights.safetensors"),
        lambda run, path, out: read_metrics(run / "metrics.jsonl"),
    )),
    "weights": ("weights", "*", (lambda folder, path, out: read_pretrained(path),)),
}  # fmt: skip


def make_seeds(seeds: Path) -> None:
    """Write valid files of every kind, by our own programs."""
    rng = np.random.default_rng(0)
    pixels = photo(rng, 40, 60)
    (seeds / "images").mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    odd = {"rgb": jpeg(pixels), "grey": jpeg(pixels, "L"), "cmyk": jpeg(pixels, "CMYK")}
    odd["exif"] = jpeg(pixels, exif=exif)
    odd["progressive"] = jpeg(pixels, progressive=True, subsampling="4:4:4")
    for name, data in odd.items():
        (seeds / "images" / f"{name}.jpg").write_bytes(data)
    for extension in ("png", "gif", "bmp", "webp", "tiff", "ppm", "jp2", "ico", "tga", "avif"):
        Image.fromarray(pixels).save(seeds / "images" / f"rgb.{extension}")
    Image.fromarray(rng.integers(0, 2**16, (40, 60), np.uint16)).save(seeds / "images" / "deep.png")
    for layout in (class_tars, kaggle, parquet):
        layout(seeds / layout.__name__, image_set())
    (seeds / "raw").mkdir()
    wnids = sorted(DIGIT_TO_WNID.values())
    trained = [(f"{k}.JPEG", odd[name]) for k, name in enumerate(("rgb", "cmyk"))]
    write_archives(
        seeds / "raw",
        {wnid: [(f"{wnid}_{name}", data) for name, data in trained] for wnid in wnids},
        [(f"ILSVRC2012_val_{k:08d}.JPEG", odd["exif"]) for k in range(1, 11)],
        list(DIGIT_TO_ID.values()),
    )
    pack_all(seeds / "raw", seeds / "shards")
    shutil.copytree(seeds / "class_tars", seeds / "half" / "raw")
    half = {"samples_per_shard": 11, "workers": 1, "on_bad": "skip", "part": "1/2"}
    pack(seeds / "class_tars", seeds / "half" / "shards", **half)  # type: ignore[arg-type]
    (seeds / "recipes").mkdir()
    shutil.copy(QUICKSTART, seeds / "recipes" / "recipe.yaml")
    run_ok("tools/compute_pca.py", seeds / "shards", "--mean-image")
    more = ("--train.batch_size", "4", "--train.epochs", "1", "--model.channels", "[2,2,2,2,2]")
    run_ok("-m", "train.run", *small_run(seeds / "shards", seeds / "run", *more))
    (seeds / "weights").mkdir()
    export_weights(seeds / "run", seeds / "weights" / "weights.safetensors")


def find_complaint(call: Callable[[], object]) -> str:
    """Return what is wrong with how a program that makes this call ends; empty if nothing."""
    # As a terminal is: bytes that are no text come out as escapes.
    streams = [io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace", write_through=True) for _ in "12"]
    try:
        with redirect_stderr(streams[0]), redirect_stdout(streams[1]):
            run_main(call)
    except SystemExit as ended:
        code = ended.code
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    text, printed = (stream.buffer.getvalue().decode() for stream in streams)  # type: ignore[attr-defined]
    if not all(line.isprintable() for line in (*printed.splitlines(), *text.splitlines())):
        return f"prints what a terminal may act on: {printed + text!r}"
    if code == 0:
        return ""
    is_sentence = text.startswith("error: ") and text.count("\n") == 1 and 20 < len(text) < 1700
    return "" if is_sentence and code in (2, 3) else f"exit code {code}: {text!r}"


def list_files(folder: Path, but: Path) -> dict[str, tuple[int, int]]:
    """List size and time of all files outside of `but`."""
    found = [path for path in folder.rglob("*") if not path.is_relative_to(but) and not path.is_dir()]
    return {str(path): (path.lstat().st_size, path.lstat().st_mtime_ns) for path in found}


def try_inputs(seeds: Path, first: int, last: int) -> None:
    """Give the inputs of these numbers to their readers. Raises `AssertionError` for the first complaint."""
    layouts.read_synsets = functools.cache(layouts.read_synsets)  # half a second each
    os.fsync = lambda file: None  # no power is lost here
    place = seeds.parent / f"place-{first}"
    for number in range(first, last):
        name = list(READERS)[number % len(READERS)]
        print(number, name, flush=True)
        signal.alarm(LIMIT_S)
        source, pattern, calls = READERS[name]
        shutil.rmtree(place, ignore_errors=True)
        folder, out = place / "deep" / source, place / "deep" / "out"
        shutil.copytree(seeds / source, folder)
        out.mkdir()
        rng = random.Random(number)
        path = rng.choice(sorted(path for path in folder.glob(pattern) if path.is_file()))
        mutate_file(rng, path)
        written = folder / "shards" if source == "half" else out
        before = list_files(place, written)
        for call in calls:
            complaint = find_complaint(functools.partial(call, folder, path, out))
            assert not complaint, f"{number}, {name}, {path.relative_to(folder)}: {complaint}"
            is_unchanged = list_files(place, written) == before or source == "run"
            assert is_unchanged, f"{number}: wrote out of its output"
    # Not `ru_maxrss`, which a process inherits from the one that started it.
    peak_kb = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert peak_kb and 1024 * int(peak_kb[1]) < MEMORY_BYTES, peak_kb


@pytest.mark.parametrize("number", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def test_every_reader_refuses_damage_in_a_sentence(number: int, tmp_path: Path) -> None:
    """Two hundred inputs, or ten thousand."""
    make_seeds(tmp_path / "seeds")
    done = run_python("-m", "tests.test_fuzz", tmp_path / "seeds", "0", str(number), timeout=3600)
    last = done.stdout.splitlines()[-1:]
    assert done.returncode == 0, (done.returncode, last, done.stderr[-3000:])
    assert len(done.stdout.splitlines()) == number


if __name__ == "__main__":
    try_inputs(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
