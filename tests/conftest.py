"""Fixtures: the demo, packed once for all tests, and small shard sets whose labels name each sample."""

import io
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image

from pipeline.eigenbasis import Eigenbasis
from pipeline.files import read_json, sha256, write_bytes, write_json
from pipeline.shards import ShardSet, index_text, open_shards, read_index


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` or `browser` skip themselves where there is none."""
    there = {"gpu": torch.cuda.is_available(), "browser": shutil.which("chromium") is not None}
    reasons = {"gpu": "needs an NVIDIA GPU", "browser": "needs Chromium"}
    for item in items:
        for name in there:
            if item.get_closest_marker(name) and not there[name]:
                item.add_marker(pytest.mark.skip(reason=reasons[name]))


ROOT = Path(__file__).resolve().parent.parent


def run_python(*arguments: str | Path, timeout: float = 240, **options: object) -> subprocess.CompletedProcess[str]:
    """Run `python ARGUMENTS` in the repository's root as a user would."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False, **options)  # type: ignore[call-overload, no-any-return]


def run_here(*arguments: str | Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """What `python ARGUMENTS` does where they name a program of ours, by its file or behind -m, in this process: a new
    one takes seconds to start. For whatever is not about processes. `env` comes on top of the environment."""
    program, *others = map(str, arguments[arguments[0] == "-m" :])
    module = program.removesuffix(".py").replace("/", ".")
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
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
    quiet = "--no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update"
    quiet += " --disable-sync --enable-logging=stderr --hide-scrollbars --virtual-time-budget=5000"
    quiet += " --window-size=1400,900 --dump-dom"
    command = ["chromium", "--headless", *quiet.split(), f"--user-data-dir={folder / 'profile'}"]
    file = (folder / "frames.html").as_uri()
    done = subprocess.run([*command, file], capture_output=True, text=True, timeout=60, check=True)
    found = [json.loads(each) for each in re.findall("FOUND({.*?})END", done.stdout)]
    console = "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)
    return sorted(found, key=lambda each: list(pages.values()).index(each["width"])), console


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the demo: `raw` archives, `shards`, packed, with pca.json, and `few` of them, with their own. Made
    once for all processes that run tests; tests must not change it."""
    base = tmp_path_factory.getbasetemp()
    path = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "demo"
    with FileLock(f"{path}.lock"):
        if not (path / "few" / "pca.json").exists():
            run_ok("tools/make_demo.py", path / "raw")
            run_ok("tools/make_shards.py", "pack", path / "raw", path / "shards", "--samples-per-shard", "180")
            copy_first(path / "shards", path / "few", train=3, val=1)
            for name in ("shards", "few"):
                run_ok("tools/compute_pca.py", path / name)
    return path


def copy_first(shards: Path, few: Path, **counts: int) -> None:
    """Copy the first shards of each split, with a manifest of what there is."""
    for split, count in counts.items():
        (few / split).mkdir(parents=True)
        manifest = read_json(shards / split / "manifest.json")
        manifest["shards"] = manifest["shards"][:count]
        manifest["num_samples"] = sum(row["samples"] for row in manifest["shards"])
        kept = set()
        for row in manifest["shards"]:
            tar = shards / split / row["name"]
            kept |= {Path(entry[3]).stem for sample in read_index(tar.with_suffix(".idx")) for entry in sample}
            for file in (tar, tar.with_suffix(".idx")):
                shutil.copy(file, few / split)
        manifest["repairs"] = [row for row in manifest["repairs"] if row["key"] in kept]
        write_json(few / split / "manifest.json", manifest)
    shutil.copy(shards / "classes.json", few)


@pytest.fixture(scope="session")
def raw(demo: Path) -> Path:
    """The demo's raw archives."""
    return demo / "raw"


@pytest.fixture(scope="session")
def shards(demo: Path) -> Path:
    """The demo's shards."""
    return demo / "shards"


@pytest.fixture(scope="session")
def few(demo: Path) -> Path:
    """The first 539 training and 179 validation images of the demo's shards, for whatever goes through all of them."""
    return demo / "few"


@pytest.fixture(scope="session")
def basis(shards: Path) -> Eigenbasis:
    """The demo's eigenbasis."""
    return Eigenbasis.load(shards / "pca.json", open_shards(shards, "train").manifest_sha256)


def jpeg(pixels: np.ndarray, mode: str = "RGB", **options: object) -> bytes:
    """Encode uint8 RGB (height, width, 3) with Pillow."""
    out = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(out, "JPEG", **{"quality": 92, **options})  # type: ignore[arg-type]
    return out.getvalue()


def photo(rng: np.random.Generator, height: int = 256, width: int = 256) -> np.ndarray:
    """A smooth random colour image, uint8 (height, width, 3)."""
    small = Image.fromarray(rng.integers(0, 256, (7, 7, 3), dtype=np.uint8))
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


@pytest.fixture
def numbered_shards(tmp_path: Path) -> Callable[..., ShardSet]:
    """Make shards of `n` samples whose label is the sample's own number, in `k` shards of both splits; of photos, or of
    one given JPEG."""

    def make(num_samples: int, num_shards: int, image: bytes | None = None) -> ShardSet:
        import tarfile

        rng = np.random.default_rng(0)
        images = [image or jpeg(photo(rng)) for _ in range(8)]
        for split in ("train", "val"):
            (tmp_path / split).mkdir(exist_ok=True)
            rows = []
            for shard in range(num_shards):
                numbers = range(shard * num_samples // num_shards, (shard + 1) * num_samples // num_shards)
                path, index = tmp_path / split / f"{split}-{shard:06d}.tar", []
                with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
                    for number in numbers:
                        members = []
                        for extension, data in (("jpg", images[number % 8]), ("cls", str(number).encode())):
                            info = tarfile.TarInfo(f"s{number}.{extension}")
                            info.size = len(data)
                            members.append((extension, tar.offset + 512, len(data), info.name))
                            tar.addfile(info, io.BytesIO(data))
                        index.append(members)
                write_bytes(path.with_suffix(".idx"), index_text(index).encode())
                rows.append(
                    {
                        "name": path.name,
                        "samples": len(numbers),
                        "bytes": path.stat().st_size,
                        "sha256": sha256(path.read_bytes()),
                    }
                )
            manifest = {
                "format_version": 1,
                "split": split,
                "num_samples": num_samples,
                "num_classes": num_samples,
                "shards": rows,
            }
            write_json(tmp_path / split / "manifest.json", manifest)
        names = [{"index": k, "wnid": f"n{k:08d}", "words": str(k)} for k in range(num_samples)]
        write_json(tmp_path / "classes.json", {"format_version": 1, "classes": names})
        return open_shards(tmp_path, "train")

    return make


@pytest.fixture
def plain_basis() -> Eigenbasis:
    """A basis made up by hand: rotated axes, deviations 50, 20 and 10 levels."""
    vectors, _ = np.linalg.qr(np.array([[1.0, 2, 3], [4, 5, 6], [7, 8, 10]]))
    return Eigenbasis(np.array([120.0, 115.0, 100.0]), np.array([2500.0, 400.0, 100.0]), vectors)
