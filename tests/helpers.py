"""What tests share: programs run as a user or in this process, runs to train, loaders, images, archives, waiting.

Longer than others: many short functions, of which a test file takes a few; in one place none is written twice.
"""

import io
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from model.alexnet import AlexNet, AlexNetConfig
from model.weights import weights_bytes
from pipeline.eigenbasis import Eigenbasis
from pipeline.files import read_json
from pipeline.loader import Loader, train_loader, val_loader
from pipeline.shards import ShardSet
from train.checkpoint import find_checkpoint, load_checkpoint
from train.config import Config, parse_config
from train.metrics import read_metrics

Members = list[tuple[str, bytes]]
Make = Callable[..., ShardSet]
"""The fixture `numbered_shards`."""

ROOT = Path(__file__).resolve().parent.parent


def run_python(
    *arguments: str | Path, timeout: float = 600, **options: object
) -> subprocess.CompletedProcess[str]:
    """Run `python ARGUMENTS` in the repository's root as a user would."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False, **options
    )  # type: ignore[call-overload, no-any-return]


def run_here(*arguments: str | Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """What `python ARGUMENTS` does where they name a program of ours, by its file or behind -m, in this process: a new
    one takes seconds to start. For whatever is not about processes. `env` comes on top of the environment."""
    program, *others = map(str, arguments[arguments[0] == "-m" :])
    module = program.removesuffix(".py").replace("/", ".")
    handlers = [
        (number, signal.getsignal(number)) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    ]
    threads, returncode = torch.get_num_threads(), 0
    # Real files: a program may ask its outputs for their descriptors.
    with (
        tempfile.TemporaryFile("w+") as out,
        tempfile.TemporaryFile("w+") as err,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(sys, "argv", [program, *others])
        patch.chdir(ROOT)
        for name, value in (env or {}).items():
            patch.setenv(name, value)
        with redirect_stdout(out), redirect_stderr(err), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # that the program has been imported before
            try:
                runpy.run_module(module, run_name="__main__", alter_sys=True)
            except SystemExit as ended:
                returncode = int(ended.code or 0)
            finally:
                sys.stdout.flush(), sys.stderr.flush()  # which may be the program's own by now
                torch.set_num_threads(threads)
                for number, handler in handlers:
                    signal.signal(number, handler)
        out.seek(0), err.seek(0)
        return subprocess.CompletedProcess([program, *others], returncode, out.read(), err.read())


def run_ok(*arguments: str | Path, run: Callable[..., subprocess.CompletedProcess[str]] = run_here) -> str:
    """Run a program, which has to succeed; returns its output."""
    done = run(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def refuses(*arguments: str | Path) -> str:
    """The one line with which a program refuses its arguments, exit code 2."""
    done = run_here(*arguments)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    return done.stderr


def train_refuses(*arguments: str | Path) -> str:
    """The one line with which `python -m train.run ARGUMENTS` refuses them, exit code 2."""
    return refuses("-m", "train.run", *arguments)


def start_python(*arguments: str | Path, **options: Any) -> "subprocess.Popen[str]":
    """Start `python ARGUMENTS` in the repository's root, its outputs in pipes."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.Popen([sys.executable, *map(str, arguments)], cwd=ROOT, text=True, **pipes)


def wait_for(
    reached: Callable[[], Any], process: "subprocess.Popen[str] | None" = None, seconds: float = 120
) -> None:
    """Until `reached()` is true, which it has to be in time, and while the process runs."""
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline, "it takes too long"
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.002)


def rows_of(directory: Path) -> list[dict[str, Any]]:
    """What a run has told so far."""
    return read_metrics(directory / "metrics.jsonl")


def signal_worker(launcher: "subprocess.Popen[str]", rank: int, number: int = 0) -> bool:
    """Send a signal to the process of a rank that torchrun has started; returns whether it is there."""
    for pid in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split():
        with suppress(OSError):  # it has just ended
            if f"\0RANK={rank}\0".encode() in Path(f"/proc/{pid}/environ").read_bytes():
                os.kill(int(pid), number)
                return True
    return False


TRAIN = ("-m", "train.run")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
EPOCHS, BATCH = 3, 32
STEPS = 539 // BATCH
NETWORK = "--model.channels [8,16,16,16,16] --model.fc_dim 64 --model.num_classes 10 --train.compile false "
NETWORK += "--train.seed 5 --run.device cpu "  # where bitwise equality is promised
SMALL = f"{NETWORK} --model.variant original --optimizer.lr 0.005 --train.batch_size {BATCH} --train.epochs {EPOCHS} "
SMALL += "--run.log_every 4 --run.save_minutes 0.002 --run.keep_last 2 --run.keep_every 1"
SHARED = f"{NETWORK} --optimizer.lr 0.001 --train.batch_size 128 --train.epochs 1 --run.log_every 2"


def small_run(shards: Path, directory: Path, *more: str) -> list[str]:
    """A small network on `few`, STEPS steps an epoch: dropout, lighting, flip and shuffling are on."""
    return ["--data.shards", str(shards), "--run.dir", str(directory), *SMALL.split(), *more]


def shared_run(shards: Path, directory: Path, *more: str) -> list[str]:
    """A small network on the demo, 11 steps an epoch, that several processes can share."""
    return ["--data.shards", str(shards), "--run.dir", str(directory), *SHARED.split(), *more]


def final(directory: Path) -> dict[str, object]:
    """The newest checkpoint."""
    path = find_checkpoint(directory)
    assert path is not None
    return load_checkpoint(path)


def same_weights(one: dict[str, object], two: dict[str, object]) -> bool:
    """Bitwise, weights and velocities."""
    pairs = [(one[part][name], two[part][name]) for part in ("model", "optimizer") for name in one[part]]  # type: ignore[attr-defined,index]
    return all(torch.equal(a, b) for a, b in pairs)


def rows_without_times(directory: Path) -> list[dict[str, object]]:
    """The rows of a run, but for what a clock says."""
    times = ("wait", "images_per_s", "step_ms", "data_time", "save", "saving", "eval_s")
    found = read_metrics(directory / "metrics.jsonl")
    return [{key: value for key, value in row.items() if not key.startswith(times)} for row in found]


def shipped(name: str) -> Config:
    """A configuration as it is shipped."""
    return parse_config(
        ["--config", str(ROOT / f"train/configs/{name}.yaml"), "--data.shards", "s", "--run.dir", "r"]
    )


def tiny(path: Path, shards: Path, **changes: object) -> AlexNet:
    """A network with random weights as a .safetensors file that expects the demo's mean."""
    torch.manual_seed(3)
    config = AlexNetConfig(**{"channels": (8, 16, 16, 16, 16), "fc_dim": 64, "num_classes": 10, **changes})  # type: ignore[arg-type]
    model = AlexNet(config)
    inputs = {"mean": read_json(shards / "pca.json")["mean"], "std": 1.0}
    path.write_bytes(weights_bytes(model.state_dict(), config, inputs))
    return model.eval()


def loaders(
    shards: ShardSet, basis: Eigenbasis, num_ranks: int, training: bool, batch_size: int = 8, **settings: Any
) -> list[Loader]:
    """One loader per rank."""
    place: dict[str, Any] = {
        "batch_size": batch_size,
        "num_ranks": num_ranks,
        "device": "cpu",
        "basis": basis,
    }
    if training:
        return [train_loader(shards, seed=3, rank=rank, **place, **settings) for rank in range(num_ranks)]
    return [val_loader(shards, rank=rank, **place, **settings) for rank in range(num_ranks)]


def private_mb() -> float:
    """Memory of this process that is no file's."""
    rollup = Path("/proc/self/smaps_rollup").read_text()
    return sum(int(row.split()[1]) for row in rollup.splitlines() if row.startswith("Private_Dirty")) / 1024


def collect(loader: Loader, epochs: range) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Copies of every batch."""
    return [(batch.images.clone(), batch.labels.clone()) for epoch in epochs for batch in loader.epoch(epoch)]


def same_batches(
    one: list[tuple[torch.Tensor, torch.Tensor]], two: list[tuple[torch.Tensor, torch.Tensor]]
) -> bool:
    """Bitwise, images and labels."""
    return all(torch.equal(a, x) and torch.equal(b, y) for (a, b), (x, y) in zip(one, two, strict=True))


TORCHVISION = {
    "features.0": (64, 3, 11, 11), "features.3": (192, 64, 5, 5), "features.6": (384, 192, 3, 3),
    "features.8": (256, 384, 3, 3), "features.10": (256, 256, 3, 3),
    "classifier.1": (4096, 9216), "classifier.4": (4096, 4096), "classifier.6": (1000, 4096),
}  # fmt: skip
"""Names and shapes of weights in torchvision 0.26's `alexnet`, from its published state dict."""


def jpeg(pixels: np.ndarray, mode: str = "RGB", **options: object) -> bytes:
    """Encode uint8 RGB (height, width, 3) with Pillow."""
    out = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(out, "JPEG", **{"quality": 92, **options})  # type: ignore[arg-type]
    return out.getvalue()


def photo(rng: np.random.Generator, height: int = 256, width: int = 256) -> np.ndarray:
    """A smooth random colour image, uint8 (height, width, 3)."""
    small = Image.fromarray(rng.integers(0, 256, (7, 7, 3), dtype=np.uint8))
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


def tar_of(members: Members | dict[str, bytes], format: int = tarfile.GNU_FORMAT, **fields: object) -> bytes:
    """A tar with these files; `fields` go to the header of every one."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as tar:
        for name, data in members.items() if isinstance(members, dict) else members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for field, value in fields.items():
                setattr(info, field, value)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def read_tar(tar: Path | bytes) -> dict[str, bytes]:
    """Names and contents of the files in a tar, by Python's tarfile."""
    content = tar if isinstance(tar, bytes) else tar.read_bytes()
    with tarfile.open(fileobj=io.BytesIO(content)) as opened:
        return {member.name: opened.extractfile(member).read() for member in opened if member.isfile()}  # type: ignore[union-attr]


def write(path: Path, data: bytes) -> None:
    """Write a file and its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def write_foreign(
    src: Path, stem: str, labels: list[int], per_shard: int, extension: str = "jpg", newline: bytes = b""
) -> None:
    """Shards as timm's: STEM-0000.tar, ..., a json beside image and label; images are 256x256 and of eight kinds."""
    rng = np.random.default_rng(0)
    images = [jpeg(photo(rng)) for _ in range(8)]
    src.mkdir(exist_ok=True)
    with webdataset.ShardWriter(f"{src}/{stem}-%04d.tar", maxcount=per_shard, verbose=0) as writer:
        for number, label in enumerate(labels):
            content = {
                "cls": str(label).encode() + newline,
                "json": b'{"a": 1}',
                extension: images[number % 8],
            }
            writer.write({"__key__": f"{stem}_{number:05d}", **content})


def files(shards: Path) -> dict[str, bytes]:
    """Everything in a shard folder."""
    return {str(path.relative_to(shards)): path.read_bytes() for path in shards.rglob("*") if path.is_file()}


PROBE = """<script>
addEventListener("load", () => {
  const root = document.documentElement, wide = root.clientWidth, images = [...document.images];
  const reaches = each => each.getBoundingClientRect().right > wide + 1;
  parent.postMessage({
    width: wide, scroll: root.scrollWidth, images: images.length,
    broken: images.filter(each => !each.complete || each.naturalWidth === 0).length,
    outside: [...document.body.querySelectorAll("*")].filter(reaches).length,
    sections: [...document.querySelectorAll("section")].map(each => each.id),
  }, "*");
});
</script></body>"""


def look_at(pages: dict[str, int], folder: Path) -> tuple[list[dict[str, Any]], str]:
    """Open HTML texts in headless Chromium, each in a frame so many pixels wide; a window has at least 500.

    Returns, of each, width and scroll width, the numbers of images, of broken ones and of elements that reach beyond
    the right edge, and the ids of its sections; and what Chromium's console said.
    """
    frames = ""
    for number, (html, width) in enumerate(pages.items()):
        allowed = html.replace("default-src 'none'", "default-src 'none'; script-src 'unsafe-inline'")
        (folder / f"{number}.html").write_text(allowed.replace("</body>", PROBE), encoding="utf-8")
        frames += f'<iframe src="{number}.html" width="{width}" height="900" style="border:0"></iframe>'
    listen = "onmessage = event => document.body.append('FOUND' + JSON.stringify(event.data) + 'END')"
    (folder / "frames.html").write_text(f"<body><script>{listen}</script>{frames}</body>", encoding="utf-8")
    quiet = (
        "--no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update"
    )
    quiet += " --disable-sync --enable-logging=stderr --hide-scrollbars --virtual-time-budget=5000"
    quiet += " --window-size=1400,900 --dump-dom"
    command = ["chromium", "--headless", *quiet.split(), f"--user-data-dir={folder / 'profile'}"]
    file = (folder / "frames.html").as_uri()
    done = subprocess.run([*command, file], capture_output=True, text=True, timeout=60, check=True)
    found = [json.loads(each) for each in re.findall("FOUND({.*?})END", done.stdout)]
    console = "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)
    return sorted(found, key=lambda each: list(pages.values()).index(each["width"])), console
