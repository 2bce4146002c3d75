"""Attacks on every reader. Each takes a number's generator and a place, makes an input of sound files
(`tests/sound.py`) by damaging them (`tests/mutate.py`), and gives what is to be called.

Long, as there is one for each kind of file: none needs another to be understood.
"""

import gzip
import io
import json
import os
import random
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from train.signed import SignedWriter

from model.weights import read_weights
from pipeline.diagnose import locate_corrupt_sample
from pipeline.eigenbasis import Eigenbasis
from pipeline.shards import open_shards, read_index
from tests.mutate import (
    NAMES,
    make_tar,
    mutate_bytes,
    mutate_json,
    mutate_tar,
    mutate_text,
    mutate_tree,
    mutate_yaml,
)
from tests.sound import QUICKSTART, Place, config_arguments, config_of, copy, known_devkit, members_of, packed
from tools.doctor import check_eigenbasis
from tools.export_weights import export_weights
from tools.packing.adopt import adopt, read_class_file
from tools.packing.images import Packed
from tools.packing.layouts import DEVKIT_ARCHIVE, TRAIN_ARCHIVE, VAL_ARCHIVE, find_layout
from tools.packing.listing import RawImage
from tools.packing.plan import Options
from tools.packing.verify import find_image_fault, stats, verify
from tools.packing.writer import LISTING, pack_sample
from tools.preview import format_eigenbasis
from train.checkpoint import (
    RunDirectory,
    checkpoint_at_an_edge,
    checkpoint_path,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from train.config import parse_config
from train.metrics import MetricsLog, read_metrics
from train.pictures import CHARTS, draw_charts, draw_png
from train.pretrained import read_pretrained
from train.report import summarize_speed

Calls = list[Callable[[], object]]


def images(rng: random.Random, place: Place) -> Calls:
    """An image file, packed in each way; what the packer takes, `verify` takes too."""
    path = rng.choice(sorted((place.seeds / "images").iterdir()))
    data = mutate_bytes(rng, path.read_bytes(), most=rng.choice((1, 3, 20)))
    store = rng.choice(("crop256", "original"))
    file = place.given / f"n01_1{path.suffix}"
    file.write_bytes(data)

    def pack_it() -> None:
        image = RawImage(file.name, str(file), 0, len(data), 3)
        options = Options(store=store, on_bad="fail")  # type: ignore[arg-type]
        result, _ = pack_sample(("n01_1", image), options)
        if isinstance(result, Packed):
            assert not find_image_fault(result.jpeg, store)

    return [pack_it]


def listed(raw: Path) -> None:
    """List a raw data set, as `pack` does, and read and pack every image."""
    with known_devkit():
        data = find_layout(raw)[1]()
    for listing in data.splits.values():
        for image in listing if not data.sequential else ():
            pack_sample((image.escaped_name, image), Options(on_bad="skip"))


def ilsvrc(rng: random.Random, place: Place) -> Calls:
    """One of the two image archives, or a tar inside the first one."""
    copy(place.seeds / "raw", place.given)
    archive = place.given / rng.choice((TRAIN_ARCHIVE, VAL_ARCHIVE))
    archive.write_bytes(mutate_tar(rng, archive.read_bytes()))
    return [lambda: listed(place.given)]


def devkit(rng: random.Random, place: Place) -> Calls:
    """The devkit: its archive, or meta.mat or the labels within."""
    copy(place.seeds / "raw", place.given)
    archive, draw = place.given / DEVKIT_ARCHIVE, rng.random()
    whole = archive.read_bytes()
    if draw < 0.2:
        archive.write_bytes(mutate_bytes(rng, whole))
    else:
        inner, folder = gzip.decompress(whole), "ILSVRC2012_devkit_t12/data"
        files = members_of(inner)
        if draw < 0.3:
            inner = mutate_tar(rng, inner)
        elif draw < 0.75:
            name = f"{folder}/meta.mat"
            inner = make_tar({**files, name: mutate_bytes(rng, files[name])})
        else:
            name = f"{folder}/ILSVRC2012_validation_ground_truth.txt"
            inner = make_tar({**files, name: mutate_text(rng, files[name])})
        archive.write_bytes(gzip.compress(inner, 1))
    return [lambda: find_layout(place.given)[1]()]


def class_tars(rng: random.Random, place: Place) -> Calls:
    """A tar per class, one of them odd."""
    copy(place.seeds / "tars", place.given)
    archive = rng.choice(sorted(place.given.iterdir()))
    archive.write_bytes(mutate_tar(rng, archive.read_bytes()))
    return [lambda: listed(place.given)]


def kaggle(rng: random.Random, place: Place) -> Calls:
    """Kaggle's lists of labels and words."""
    copy(place.seeds / "kaggle", place.given)
    path = place.given / rng.choice(
        ("LOC_val_solution.csv", "LOC_val_solution.csv", "LOC_synset_mapping.txt")
    )
    path.write_bytes(mutate_text(rng, path.read_bytes()))
    return [lambda: find_layout(place.given)[1]()]


def folders(rng: random.Random, place: Place) -> Calls:
    """Class folders with odd names of folders and files, links and pipes; packed to the end."""
    image = (place.seeds / "images" / "rgb.jpg").read_bytes()
    names = [
        name
        for name in NAMES
        if name.strip("./") and "\0" not in name and "/" not in name and len(name) < 250
    ]
    for split in ("train", "val"):
        for _ in range(3):
            folder = place.given / split / rng.choice((*names, "n01", "n02"))
            folder.mkdir(parents=True, exist_ok=True)
            (folder / (rng.choice(names) + rng.choice((".jpg", ".jpg", ".txt", "")))).write_bytes(image)
            odd = folder / "odd.jpg"
            if rng.random() < 0.1 and not odd.is_symlink():
                odd.symlink_to(rng.choice(("nothing", "/etc/hostname", "..", "odd.jpg")))
            elif rng.random() < 0.05 and not odd.exists() and not odd.is_symlink():
                os.mkfifo(odd)
    return [lambda: packed(place.given, place.out / "shards")]


def parquet(rng: random.Random, place: Place) -> Calls:
    """A parquet file with other bytes, or columns of other types; packed to the end."""
    import pyarrow as pa
    import pyarrow.parquet

    path = place.given / "train-00000-of-00001.parquet"
    if rng.random() < 0.6:
        path.write_bytes(mutate_bytes(rng, (place.seeds / "data.parquet").read_bytes()))
    else:
        rows = json.loads((place.seeds / "rows.json").read_text())
        columns: dict[str, Any] = {}
        for name in ("image", "label"):
            try:
                columns[name] = pa.array(mutate_tree(rng, rows[name]))
            except (pa.ArrowException, OverflowError, UnicodeEncodeError):
                columns[name] = pa.array(rows[name])
        if len(columns["image"]) != len(columns["label"]):
            del columns[rng.choice(("image", "label"))]
        told = json.dumps(mutate_tree(rng, {"info": {"features": {"label": {"names": ["a", "b"]}}}}))
        try:
            table = pa.table(columns).replace_schema_metadata({"huggingface": told.encode(errors="replace")})
            pyarrow.parquet.write_table(table, path)
        except (pa.ArrowException, OverflowError):
            path.write_bytes(b"PAR1")
    return [lambda: packed(place.given, place.out / "shards", on_bad="skip")]


def adopted(rng: random.Random, place: Place) -> Calls:
    """Shards of others, one of them odd, with a list of classes; then read by the other programs."""
    copy(place.seeds / "shards" / "train", place.given / "shards")
    tar = rng.choice(sorted((place.given / "shards").glob("*.tar")))
    classes = None
    draw = rng.random()
    if draw < 0.75:
        tar.write_bytes(mutate_tar(rng, tar.read_bytes()))
    elif draw < 0.9:
        files = members_of(tar.read_bytes())
        name = rng.choice([name for name in files if name.endswith(".cls")])
        label = rng.choice(
            (
                b"-1",
                b"",
                b" 1",
                b"1 ",
                b"1\n",
                b"9" * 6,
                b"9" * 7,
                b"1.5",
                b"\xff",
                b"0x1",
                b"00",
                "²".encode(),
            )
        )
        tar.write_bytes(make_tar({**files, name: label}))
    else:
        classes = place.given / "names.txt"
        classes.write_bytes(mutate_text(rng, b"".join(b"n%08d name %d\n" % (k, k) for k in range(10))))
    pattern = rng.choice(
        (
            "*.tar",
            "train-{000000..000001}.tar",
            "train-{0..9",
            "**/*",
            "{0..999999999}.tar",
            "../*",
            "{a,b}" * 40,
            "[",
            "\0",
        )
        if rng.random() < 0.1
        else ("*.tar",)
    )
    out = place.out / "shards"
    source = place.given / "shards"
    return [
        lambda: adopt(source, out, split="train", pattern=pattern, classes=classes, workers=1),
        lambda: out.exists() and verify(out, workers=1),
        lambda: out.exists() and stats(out),
    ]


def verified(rng: random.Random, place: Place) -> Calls:
    """Any file of packed shards; checked and described, each of them."""
    copy(place.seeds / "shards", place.given)
    path = rng.choice(sorted(each for each in place.given.rglob("*") if each.is_file()))
    change = {".json": mutate_json, ".idx": mutate_text, ".tar": mutate_tar}.get(path.suffix, mutate_bytes)
    path.write_bytes(change(rng, path.read_bytes()))
    return [
        lambda: verify(place.given, workers=1),
        lambda: verify(place.given, fast=True),
        lambda: stats(place.given),
    ]


def index(rng: random.Random, place: Place) -> Calls:
    """An index, read, and compared with its shard."""
    copy(place.seeds / "shards", place.given)
    path = rng.choice(sorted((place.given / "train").glob("*.idx")))
    path.write_bytes(mutate_text(rng, path.read_bytes()))

    return [
        lambda: read_index(path),
        lambda: verify(place.given, fast=True),
        lambda: stats(place.given),
        lambda: locate_corrupt_sample(open_shards(place.given, "train")),
    ]


def manifest(rng: random.Random, place: Place) -> Calls:
    """A manifest, read by whatever reads one, the packer that finds it among its output too."""
    copy(place.seeds / "shards", place.given)
    copy(place.seeds / "shards", place.out / "shards")
    path = place.given / "train" / "manifest.json"
    path.write_bytes(mutate_json(rng, path.read_bytes()))
    shutil.copy(path, place.out / "shards" / "train")
    calls: Calls = [
        lambda: open_shards(place.given, "train"),
        lambda: verify(place.given, fast=True),
        lambda: stats(place.given),
    ]
    if rng.random() < 0.3:
        calls += [lambda: packed(place.seeds / "raw", place.out / "shards", samples_per_shard=11)]
        calls += [
            lambda: adopt(place.seeds / "tars", place.out / "shards", split="train", pattern="*", workers=1)
        ]
    return calls


def pca(rng: random.Random, place: Place) -> Calls:
    """An eigenbasis, loaded, formatted and checked."""
    copy(place.seeds / "shards", place.given)
    path = place.given / "pca.json"
    path.write_bytes(mutate_json(rng, path.read_bytes()))
    train = open_shards(place.given, "train")

    def shown() -> None:
        from pipeline.eigenbasis import read_eigenbasis

        format_eigenbasis(read_eigenbasis(path, train.manifest_sha256))

    return [
        lambda: Eigenbasis.load(path, train.manifest_sha256, with_mean_image=True),
        lambda: check_eigenbasis(place.given, train),
        shown,
    ]


def classes(rng: random.Random, place: Place) -> Calls:
    """A list of classes, in place and as adopt's option."""
    copy(place.seeds / "shards", place.given)
    path = place.given / "classes.json"
    path.write_bytes(mutate_json(rng, path.read_bytes()))
    return [
        lambda: open_shards(place.given, "val"),
        lambda: read_class_file(path),
        lambda: stats(place.given),
    ]


def mean_image(rng: random.Random, place: Place) -> Calls:
    """A mean image: other bytes, a header of its own, another kind of file."""
    copy(place.seeds / "shards", place.given)
    path, draw = place.given / "mean_image.npy", rng.random()
    data = path.read_bytes()
    if draw < 0.4:
        header = mutate_bytes(rng, data[:128])
        data = header + data[128:]
    elif draw < 0.6:
        shape = rng.choice(
            ("(256, 256, 3)", "(99999999999, 256, 3)", "()", "(-1,)", "(2**40,)", "(1e9,)", "(9**9**9,)")
        )
        kind = rng.choice(("<f4", "|O", "<f8", "|V8", "<U99999999", "|b1", "[('a', '<f4')]"))
        text = (
            f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
        )
        data = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data[128:]
    else:
        data = mutate_bytes(rng, data)
    path.write_bytes(data)
    sha = open_shards(place.given, "train").manifest_sha256
    return [lambda: Eigenbasis.load(place.given / "pca.json", sha, with_mean_image=True)]


def recipe(rng: random.Random, place: Place) -> Calls:
    """A recipe behind a sound one, as the trainer reads it."""
    path = place.given / "mine.yaml"
    path.write_bytes(mutate_yaml(rng, QUICKSTART.read_bytes()))
    rest = ["--data.shards", "shards", "--run.dir", str(place.out / "run")]
    return [lambda: parse_config(["--config", str(path), *rest])]


def signed(content: dict[str, Any]) -> bytes:
    """A checkpoint of ours with any content."""
    out = io.BytesIO()
    writer = SignedWriter(out)
    torch.save({"format_version": 1, "step": 7, **content}, writer)  # type: ignore[arg-type]
    writer.sign()
    return out.getvalue()


def run_of(rng: random.Random, place: Place) -> Path:
    """A run directory in the output's folder, with two checkpoints."""
    copy(place.seeds / "run", place.out / "run")
    return place.out / "run"


def checkpoint(rng: random.Random, place: Place) -> Calls:
    """The newest checkpoint of a run: other bytes, or another content under a sound signature."""
    copy(place.seeds / "run", place.given)
    path = place.given / "checkpoints" / "step-00000007.pt"
    if rng.random() < 0.4:
        data = mutate_bytes(rng, path.read_bytes())
    else:
        content = torch.load(path, map_location="cpu", weights_only=True)
        data = signed(odd_state(rng, content))
    path.write_bytes(data)
    return [
        lambda: load_checkpoint(checkpoint_path(place.given)),
        lambda: read_pretrained(place.given),
        lambda: export_weights(place.given, place.out / "w.safetensors"),
        lambda: checkpoint_at_an_edge(path.with_name("step-00000008.pt")),
    ]


def odd_state(rng: random.Random, content: dict[str, Any]) -> dict[str, Any]:
    """Other tensors, or other plain values."""
    content = dict(content)
    draw = rng.random()
    if draw < 0.3:
        part = rng.choice(("model", "optimizer"))
        state = dict(content.get(part) or {})
        if state:
            name = rng.choice(sorted(state))
            state[name] = odd_tensor(rng, state[name])
        content[part] = state
        return content
    tensors = {name: content.pop(name) for name in ("model", "optimizer") if name in content}
    content = mutate_tree(rng, content, most=1)
    return {
        **(content if isinstance(content, dict) else {"config": content}),
        **(tensors if draw < 0.95 else {}),
    }


def odd_tensor(rng: random.Random, tensor: torch.Tensor) -> Any:
    """Another kind of tensor, or none."""
    return rng.choice(
        (
            lambda: tensor.double() * float("nan"),
            lambda: tensor.int(),
            lambda: tensor.to(torch.complex64),
            lambda: tensor[..., :0],
            lambda: tensor.to_sparse(),
            lambda: tensor.expand(1000, *tensor.shape),
            lambda: tensor.bool(),
            lambda: None,
            lambda: [1.0],
            lambda: tensor.half(),
            lambda: torch.empty(tensor.shape, device="meta"),
            lambda: tensor.float()[:1].expand(tensor.shape) if tensor.ndim else tensor,
        )
    )()


def pointers(rng: random.Random, place: Place) -> Calls:
    """LATEST and BEST, when a run goes on and saves."""
    run = run_of(rng, place)
    for name in rng.sample(("LATEST", "BEST"), rng.randint(1, 2)):
        path = run / "checkpoints" / name
        path.write_bytes(
            rng.choice(
                (mutate_bytes(rng, path.read_bytes()), rng.choice(NAMES).encode(errors="surrogateescape"))
            )
        )
    content = {"best": {"step": 7, "top1_error": 1.0}, "model": {}}

    def claimed() -> None:
        directory = RunDirectory(run)
        directory.claim()
        assert directory._lock is not None
        directory._lock.close()

    def saved() -> None:
        save_checkpoint(run, 9, content if rng.random() < 0.5 else {}, keep=1, tell=lambda line: None)

    return [lambda: find_checkpoint(run), lambda: load_checkpoint(checkpoint_path(run)), claimed, saved]


@cache
def state_of(seeds: Path, out: Path) -> tuple[Any, dict[str, Any]]:
    """A run that stands at its beginning, and what a checkpoint holds of it."""
    from train.placement import ParallelConfig, Placement
    from train.state import TrainState

    device = torch.device("cpu")
    state = TrainState(
        parse_config(config_arguments(seeds, out)), device, Placement(ParallelConfig(), device)
    )
    state.build()
    return state, state.capture()


def restored(rng: random.Random, place: Place) -> Calls:
    """A run goes on from a checkpoint with another content."""
    state, content = state_of(place.seeds, place.out)
    path = place.given / "step-00000007.pt"
    if rng.random() < 0.5:
        parts = ("schedule", "scale", "ranks", "best", "kept", "epoch", "wnids", "eigenbasis")
        part = rng.choice(parts)
        tensors = {name: value for name, value in content.items() if name != part}
        changed = {part: mutate_tree(rng, {part: content[part]}, most=1)} if rng.random() < 0.9 else {}
        path.write_bytes(signed({**tensors, **(changed.get(part) or {})}))
    else:
        path.write_bytes(signed(odd_state(rng, content)))
    return [lambda: state.restore(path)]


def metrics(rng: random.Random, place: Place) -> Calls:
    """Rows of a run, read when it goes on and when it reports."""
    run = run_of(rng, place)
    path = run / "metrics.jsonl"
    lines = path.read_bytes().splitlines()
    for at in rng.sample(range(len(lines)), rng.randint(1, 4)):
        lines[at] = mutate_json(rng, lines[at])
    path.write_bytes(mutate_text(rng, b"\n".join(lines)) if rng.random() < 0.2 else b"\n".join(lines))

    def reported() -> None:
        rows = read_metrics(path)
        summarize_speed(rows)
        if rng.random() < 0.02:
            draw_png(draw_charts, list(CHARTS), rows, 10, 10)

    def continued() -> None:
        MetricsLog(run, 60, 2).close()

    def claimed() -> None:
        shutil.rmtree(run / "checkpoints")
        RunDirectory(run).claim()

    return [reported, continued, claimed]


def weights(rng: random.Random, place: Place) -> Calls:
    """Weights of others: other bytes, another header, other tensors."""
    path, draw = place.given / f"w{rng.choice(('.safetensors', '.pth'))}", rng.random()
    sound = (place.seeds / path.name).read_bytes()
    if draw < 0.4:
        data = mutate_bytes(rng, sound)
    elif path.suffix == ".pth":
        out, state = io.BytesIO(), torch.load(io.BytesIO(sound), weights_only=True)
        name = rng.choice(sorted(state))
        state[name] = odd_tensor(rng, state[name])
        torch.save(
            state if draw < 0.9 else rng.choice(([], {}, state[name], {1: 2}, {"state_dict": state})), out
        )
        data = out.getvalue()
    else:
        length = int.from_bytes(sound[:8], "little")
        header, tensors = json.loads(sound[8 : 8 + length]), sound[8 + length :]
        if draw < 0.6:
            inner = mutate_json(rng, header["__metadata__"][key := rng.choice(("config", "input"))].encode())
            header["__metadata__"][key] = inner.decode(errors="replace")
        else:
            header = mutate_tree(rng, header)
        text = json.dumps(header).encode()
        data = (
            (len(text) if draw < 0.95 else rng.choice((0, 2**31, 2**63, 2**64 - 1))).to_bytes(8, "little")
            + text
            + tensors
        )
    path.write_bytes(data)
    return [lambda: read_weights(path), lambda: read_pretrained(path)]


def listing(rng: random.Random, place: Place) -> Calls:
    """The packer's cached listing; a second pack reads it."""
    copy(place.seeds / "shards", place.out / "shards")
    path = place.out / "shards" / LISTING
    path.write_bytes(mutate_bytes(rng, path.read_bytes(), most=20))
    return [lambda: packed(place.seeds / "raw", place.out / "shards", samples_per_shard=11)]


def half_packed(rng: random.Random, place: Place) -> Calls:
    """What a packer that was killed leaves: plan, sidecars, packed row groups; another resumes from there."""
    source = place.seeds / rng.choice(("half", "half-spilled"))
    copy(source, place.out / "shards")
    files = [
        each
        for each in (place.out / "shards").rglob("*")
        if each.is_file() and (each.suffix in (".json", ".idx") or each.name.startswith("segment"))
    ]
    path = rng.choice(sorted(files))
    path.write_bytes((mutate_json if path.suffix == ".json" else mutate_bytes)(rng, path.read_bytes()))
    raw = place.seeds / ("parquet" if source.name == "half-spilled" else "raw")
    return [lambda: packed(raw, place.out / "shards", samples_per_shard=11)]


def loader(rng: random.Random, place: Place) -> Calls:
    """Damaged images, labels and indexes through DALI, for counting and for training."""
    from pipeline.loader import train_loader
    from pipeline.reader import decoded_batches

    copy(place.seeds / "shards", place.given)
    tar = rng.choice(sorted((place.given / "train").glob("*.tar")))
    if rng.random() < 0.3:
        index = tar.with_suffix(".idx")
        index.write_bytes(mutate_text(rng, index.read_bytes()))
    else:
        data = bytearray(tar.read_bytes())
        _, start, size, _ = rng.choice([each for row in read_index(tar.with_suffix(".idx")) for each in row])
        damaged = mutate_bytes(rng, bytes(data[start : start + size]), most=20)
        data[start : start + size] = damaged[:size].ljust(size, b"\0")
        tar.write_bytes(data)

    def counted() -> None:
        for _ in decoded_batches(open_shards(place.given, "train"), 4, 1):
            pass

    def trained() -> None:
        config = config_of(place)
        train = open_shards(place.given, "train")
        basis = Eigenbasis.load(place.given / "pca.json", train.manifest_sha256)
        loads = train_loader(
            train, basis, config.data, batch_size=4, seed=1, rank=0, num_ranks=1, device="cpu"
        )
        for _ in loads.epoch(0):
            pass
        loads.close()

    return [counted, trained]


ATTACKS: dict[Callable[[random.Random, Place], Calls], tuple[int, int]] = {
    images: (60, 3000),
    ilsvrc: (15, 1200),
    devkit: (3, 80),
    class_tars: (15, 1200),
    kaggle: (10, 400),
    folders: (5, 150),
    parquet: (6, 300),
    adopted: (10, 600),
    verified: (10, 400),
    index: (15, 500),
    manifest: (15, 500),
    pca: (15, 600),
    classes: (10, 400),
    mean_image: (10, 400),
    recipe: (6, 400),
    checkpoint: (10, 300),
    pointers: (10, 300),
    restored: (0, 80),
    metrics: (10, 400),
    weights: (12, 500),
    listing: (5, 150),
    half_packed: (4, 150),
    loader: (0, 60),
}
"""How many inputs of each: always, and in the slow test."""
