"""Fixtures: the demo, packed once for all tests, and small shard sets whose labels name each sample."""

import os
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock

from pipeline.eigenbasis import Eigenbasis
from pipeline.files import read_json, sha256, write_bytes, write_json
from pipeline.shards import SAMPLE, ShardSet, open_shards
from tests.helpers import files, jpeg, photo, run_ok, tar_of, write
from tools.packing.index import index_text, read_index, write_samples


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` or `browser` skip themselves where there is none."""
    there = {"gpu": torch.cuda.is_available(), "browser": shutil.which("chromium") is not None}
    reasons = {"gpu": "needs an NVIDIA GPU", "browser": "needs Chromium"}
    for item in items:
        for name in there:
            if item.get_closest_marker(name) and not there[name]:
                item.add_marker(pytest.mark.skip(reason=reasons[name]))


@pytest.fixture(autouse=True)
def restore_threads() -> Iterator[None]:
    """Give torch its threads back: programs that a test calls may take fewer, and bits depend on their number."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the demo: `raw` archives, `shards`, packed, with pca.json, and `few` of them, with their own. Made
    once for all processes that run tests; tests must not change it."""
    base = tmp_path_factory.getbasetemp()
    path = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "demo"
    with FileLock(f"{path}.lock"):
        if not (path / "few" / "pca.json").exists():
            run_ok("tools/make_demo.py", path / "raw")
            run_ok(
                "tools/make_shards.py", "pack", path / "raw", path / "shards", "--samples-per-shard", "180"
            )
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
            kept |= {
                Path(entry[3]).stem for sample in read_index(tar.with_suffix(".idx")) for entry in sample
            }
            for file in (tar, tar.with_suffix(".idx")):
                shutil.copy(file, few / split)
        manifest["repairs"] = [row for row in manifest["repairs"] if row["key"] in kept]
        samples = np.load(shards / split / "samples.npy")
        parts = [samples[samples["shard"] == shard] for shard in range(count)]
        manifest["samples_sha256"] = write_samples(few / split, parts)
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


@pytest.fixture
def numbered_shards(tmp_path: Path) -> Callable[..., ShardSet]:
    """Make shards of `n` samples whose label is the sample's own number, in `k` shards of both splits; of photos, or of
    one given JPEG."""

    def make(num_samples: int, num_shards: int, image: bytes | None = None) -> ShardSet:
        rng = np.random.default_rng(0)
        images = [image or jpeg(photo(rng)) for _ in range(8)]
        for split in ("train", "val"):
            rows, parts = [], []
            for shard in range(num_shards):
                numbers = range(shard * num_samples // num_shards, (shard + 1) * num_samples // num_shards)
                path = tmp_path / split / f"{split}-{shard:06d}.tar"
                content = {}
                for n in numbers:
                    content |= {f"s{n}.jpg": images[n % 8], f"s{n}.cls": str(n).encode()}
                write(path, tar_of(content, tarfile.USTAR_FORMAT))
                with tarfile.open(path) as tar:
                    places = [(each.name[-3:], each.offset_data, each.size, each.name) for each in tar]
                index = [places[n : n + 2] for n in range(0, len(places), 2)]
                write_bytes(path.with_suffix(".idx"), index_text(index).encode())
                parts.append(np.array([(0, *index[k][0][1:3], n) for k, n in enumerate(numbers)], SAMPLE))
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
                "samples_sha256": write_samples(tmp_path / split, parts),
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


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """90 images in three class tars."""
    raw, rng = tmp_path_factory.mktemp("small") / "raw", np.random.default_rng(0)
    for wnid in ("n00000011", "n00000022", "n00000033"):
        images = {f"{wnid}_{n}.JPEG": jpeg(photo(rng, *rng.integers(100, 300, 2))) for n in range(30)}
        if wnid == "n00000033":  # one shard is larger than the others
            images[f"{wnid}_0.JPEG"] = jpeg(rng.integers(0, 256, (300, 300, 3), dtype=np.uint8))
        write(raw / f"{wnid}.tar", tar_of(images))
    return raw


@pytest.fixture(scope="session")
def clean(small: Path) -> dict[str, bytes]:
    """What one undisturbed process packs of it."""
    from tools.make_shards import pack

    shards = small.parent / "clean"
    pack(small, shards, samples_per_shard=9, val_fraction=0, workers=1)
    content = files(shards)
    assert len(content) == 2 * 10 + 4  # tars and indexes, samples, manifest, classes, listing
    return content
