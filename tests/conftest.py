"""Fixtures: the demo, packed once for all tests, and small shard sets whose labels name each sample."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

from pipeline.eigenbasis import Eigenbasis
from pipeline.files import sha256, write_bytes, write_json
from pipeline.shards import ShardSet, index_text, open_shards


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` or `browser` skip themselves where there is none."""
    import torch

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


def run_ok(*arguments: str | Path) -> str:
    """Run `python ARGUMENTS`, which has to succeed; returns its output."""
    done = run_python(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def train_refuses(*arguments: str | Path) -> str:
    """The one line with which `python -m train.run ARGUMENTS` refuses them, exit code 2; in this process, because a
    process of its own takes seconds to start."""
    from train.config import parse_config
    from train.program import exit_with
    from train.run import run

    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGTERM, signal.SIGINT)]
    with redirect_stderr(io.StringIO()) as told, pytest.raises(SystemExit) as ended:
        exit_with(lambda: run(parse_config([str(argument) for argument in arguments])))
    for number, handler in handlers:
        signal.signal(number, handler)
    assert ended.value.code == 2 and len(told.getvalue().splitlines()) == 1, told.getvalue()
    return told.getvalue()


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
    """A folder with the demo: `raw` archives, and `shards`, packed, with pca.json. Made once for all processes that run
    tests; tests must not change it."""
    base = tmp_path_factory.getbasetemp()
    path = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "demo"
    with FileLock(f"{path}.lock"):
        if not (path / "shards" / "pca.json").exists():
            run_ok("tools/make_demo.py", path / "raw")
            run_ok("tools/make_shards.py", "pack", path / "raw", path / "shards", "--samples-per-shard", "180")
            run_ok("tools/compute_pca.py", path / "shards")
    return path


@pytest.fixture(scope="session")
def raw(demo: Path) -> Path:
    """The demo's raw archives."""
    return demo / "raw"


@pytest.fixture(scope="session")
def shards(demo: Path) -> Path:
    """The demo's shards."""
    return demo / "shards"


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
