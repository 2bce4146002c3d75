"""Any number of ranks sees the same batches, epochs are exact, batches hold what was packed and what the formula says,
and what a loader takes it gives back."""

import gc
import json
import os
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.augment import sample_draws
from pipeline.eigenbasis import Eigenbasis
from pipeline.lighting import Lighting, shifted_means
from pipeline.loader import Loader, decoded_batches, train_loader
from pipeline.plan import TrainSampler
from pipeline.reader import SampleReader
from pipeline.settings import Augmentation, DataConfig, Speed
from pipeline.shards import SAMPLE, ShardSet, open_shards
from tests.helpers import Make, collect, loaders, private_mb, run_python, same_batches


@pytest.mark.parametrize("settings", [{}, {"shuffle": "blocks", "block_shards": 2}])
@pytest.mark.parametrize("images_per_crop", [1, 32])
def test_any_number_of_ranks_sees_the_same_batches(
    numbered_shards: Make, plain_basis: Eigenbasis, images_per_crop: int, settings: dict[str, Any]
) -> None:
    """Global batches of 24 over 1, 2, 3, 4 and 6 ranks, three epochs: the same samples with the same crops, flips and
    lighting in the same places; in an epoch none twice, as many dropped as reported; another order and another tail
    every epoch."""
    shards = numbered_shards(131, 5)
    config = DataConfig(Path(), augmentation=Augmentation(images_per_crop=images_per_crop), **settings)
    plans = {}
    for ranks in (1, 2, 3, 4, 6):
        samplers = [
            TrainSampler(shards, plain_basis, config, 24 // ranks, 3, rank, ranks) for rank in range(ranks)
        ]
        assert {sampler.steps for sampler in samplers} == {5}
        parts = [[sampler(number) for sampler in samplers] for number in range(15)]
        plans[ranks] = [
            [np.concatenate([plan.rows for plan in step]), np.concatenate([plan.means for plan in step])]
            + [
                np.concatenate(column)
                for column in zip(*(plan.draws for plan in step if plan.draws), strict=True)
            ]
            for step in parts
        ]
    for ranks in (2, 3, 4, 6):
        for expected, got in zip(plans[1], plans[ranks], strict=True):
            assert all(map(np.array_equal, expected, got))
    epochs = [np.concatenate([step[0] for step in plans[1][first : first + 5]]) for first in (0, 5, 10)]
    assert all(len(set(epoch.tolist())) == 120 for epoch in epochs)
    assert (
        len({frozenset(epoch.tolist()) for epoch in epochs}) == len({tuple(epoch) for epoch in epochs}) == 3
    )
    (loader,) = loaders(shards, plain_basis, 1, training=True, batch_size=24, **settings)
    assert loader.dropped_per_epoch == 11


@pytest.mark.parametrize("settings", [{}, {"shuffle": "blocks", "block_shards": 2}])
def test_batches_are_the_formula(
    numbered_shards: Make, plain_basis: Eigenbasis, settings: dict[str, Any]
) -> None:
    """Over the epoch at which lighting ends, which is prepared ahead of its time: the stored image, cropped and flipped
    as drawn, and the numpy formula of lighting on both sides of the edge, float32 in channels-last memory; labels are
    the samples'. `std` may be three numbers."""
    shards = numbered_shards(60, 3)
    stored = np.concatenate(list(decoded_batches(shards, 50)))
    augmentation = Augmentation(lighting=Lighting(strength=0.5, off_epoch=2), std=(1.0, 2.0, 50.0))
    options = {"augmentation": augmentation, "speed": Speed(prefetch_queue_depth=4), **settings}
    (loader,) = loaders(shards, plain_basis, 1, training=True, **options)
    for epoch in range(4):
        lighting = replace(augmentation.lighting, strength=0.5 if epoch < 2 else 0.0)
        for step, (images, labels) in enumerate(loader.epoch(epoch)):
            assert images.shape == (8, 3, 224, 224) and images.dtype == torch.float32
            assert images.is_contiguous(memory_format=torch.channels_last)
            draws = sample_draws([8 * step], 8, 3, epoch, augmentation)
            for n, label in enumerate(labels.tolist()):
                left, top = draws.left[0, n], draws.top[0, n]
                crop = stored[label, top : top + 224, left : left + 224]
                crop = crop[:, ::-1] if draws.mirrored[0, n] else crop
                mean = shifted_means(draws.noise[0, n], plain_basis, lighting)
                expected = (crop - mean) / lighting.divisor / (1, 2, 50)
                np.testing.assert_allclose(images[n].permute(1, 2, 0), expected, atol=1e-3)
    assert loader.steps_per_epoch == 7 and set(labels.tolist()) <= set(range(60))


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 7])
def test_validation_counts_every_sample_once(
    numbered_shards: Make, plain_basis: Eigenbasis, num_ranks: int, tmp_path: Path
) -> None:
    """Twice, each sample once over all ranks: the stored image minus the mean; the rest of the fixed batch shape is
    padding, a whole batch of it included."""
    numbered_shards(57, 4)
    val = open_shards(tmp_path, "val")
    stored = np.concatenate(list(decoded_batches(val, 50)))
    ranks = loaders(val, plain_basis, num_ranks, training=False)
    for _ in range(2):
        batches = [batch for loader in ranks for batch in loader]
        labels = torch.cat([batch.labels for batch in batches])
        assert sorted(labels[labels >= 0].tolist()) == list(range(57))
        assert (labels == -1).sum() == len(batches) * 8 - 57
        for images, labels in batches:
            assert images.shape == (8, 3, 256, 256) and images.isfinite().all()
            valid = labels[labels >= 0].tolist()
            got = images[: len(valid)].permute(0, 2, 3, 1)
            np.testing.assert_allclose(got, stored[valid] - plain_basis.mean, atol=1e-3)


def test_mean_image(numbered_shards: Make, plain_basis: Eigenbasis) -> None:
    """With `mean: image` a training crop is what it is with `mean: channel`, minus the centre of the mean image and
    plus the mean colour, neither cropped nor flipped, over std and the divisor of lighting; validation images stay as
    they are, for the evaluation to subtract `mean_offset` from their crops."""
    shards = numbered_shards(40, 2)
    image = np.random.default_rng(0).uniform(0, 255, (256, 256, 3)).astype(np.float32)

    def make(mean: Any, training: bool, basis: Eigenbasis) -> Loader:
        augmentation = Augmentation(mean=mean, std=2.0, lighting=Lighting(off_epoch=1))
        return loaders(shards, basis, 1, training, augmentation=augmentation)[0]

    basis = replace(plain_basis, mean_image=image)
    removed = (image[16:240, 16:240] - basis.mean).transpose(2, 0, 1) / 2
    plain, imaged = (collect(make(mean, True, basis), range(2)) for mean in ("channel", "image"))
    for n, (one, two) in enumerate(zip(plain, imaged, strict=True)):
        divisor = 1.1 if n < len(plain) // 2 else 1.0
        assert torch.equal(one[1], two[1])
        np.testing.assert_allclose(one[0] - two[0], np.stack([removed / divisor] * 8), atol=1e-3)
    val_plain, val = (make(mean, False, basis) for mean in ("channel", "image"))
    assert same_batches(collect(val, range(1)), collect(val_plain, range(1)))
    assert val_plain.mean_offset is None
    np.testing.assert_allclose(val.mean_offset, removed, atol=1e-4)
    with pytest.raises(ValueError, match="--mean-image"):
        make("image", True, plain_basis)


def test_only_a_folder_is_needed(few: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`train_loader("SHARDS", batch_size=N)`: seed 0, one rank, the folder's eigenbasis, or that of another file."""
    from pipeline import train_loader as public

    train = open_shards(few, "train")
    basis = Eigenbasis.load(few / "pca.json", train.manifest_sha256)
    options = {"seed": 0, "rank": 0, "num_ranks": 1, "device": "cpu"}
    monkeypatch.setenv("HOME", str(few.parent))
    with pytest.raises(ValueError, match="other shards"):
        public(few, batch_size=8, eigenbasis="~/shards/pca.json")
    (short, full) = public("~/few", batch_size=8), train_loader(train, batch_size=8, basis=basis, **options)
    if short.device.type == "cpu":
        assert torch.equal(next(iter(short)).images, next(iter(full)).images)


def test_close_gives_everything_back(numbered_shards: Make, plain_basis: Eigenbasis) -> None:
    """Threads, native ones included, and file handles after many loaders are what they were after the first: closed,
    let go of, or interrupted between two batches and then let go of; with both orders."""
    shards, used = numbered_shards(40, 4), set()
    for number in range(12):
        (loader,) = loaders(shards, plain_basis, 1, True, shuffle="global" if number % 2 else "blocks")
        if number % 3:
            next(iter(loader))
        else:
            try:
                for _ in loader:
                    raise KeyboardInterrupt
            except KeyboardInterrupt:
                pass
        if number % 4:
            loader.close()
        del loader
        gc.collect()
        used.add(tuple(len(list(Path("/proc/self", kind).iterdir())) for kind in ("task", "fd")))
    assert len(used) == 1


INTERRUPTED = """
import os, signal, sys, threading, time
from pathlib import Path
from pipeline import train_loader
loader = train_loader(sys.argv[1], batch_size=64, device="cpu")
def tasks(): return len(os.listdir("/proc/self/task"))
next(iter(loader)); loader.close(); before = tasks()
caught = threading.Event()
def press():  # again, as Python ignores an interrupt that hits a finalizer
    while not caught.wait(0.7):
        os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=press, daemon=True).start()
try:
    for epoch in range(10**6):
        for batch in loader.epoch(epoch): pass
except KeyboardInterrupt as error:
    caught.set()
    kept = error  # as an interactive Python does, with all frames
loader.close()
time.sleep(0.2)
assert tasks() <= before, (tasks(), before)
assert not Path(f"/proc/self/task/{os.getpid()}/children").read_text()
print("ended", sum(len(batch.labels) for batch in loader.epoch(0)) > 0)
"""


def test_ctrl_c_in_a_notebook(few: Path) -> None:
    """Wherever SIGINT hits a loop, threads end, no process is left, and the loader works again."""
    done = run_python("-c", INTERRUPTED, few)
    assert done.returncode == 0 and done.stdout == "ended True\n", done.stderr


def test_at_most_two_blocks_are_open(numbered_shards: Make, plain_basis: Eigenbasis) -> None:
    """With `shuffle: blocks`, over two epochs; `global` has all shards open."""
    shards = numbered_shards(160, 10)

    def count_open() -> int:
        return sum(
            str(path.readlink()) in shards.tars
            for path in Path("/proc/self/fd").iterdir()
            if path.is_symlink()
        )

    most = {}
    for shuffle in ("blocks", "global"):
        (loader,) = loaders(shards, plain_basis, 1, True, shuffle=shuffle, block_shards=2)
        most[shuffle] = max(count_open() for epoch in range(2) for _ in loader.epoch(epoch))
        loader.close()
    assert most["blocks"] <= 4 and most["global"] > 4


def test_14_million_samples(plain_basis: Eigenbasis, tmp_path: Path) -> None:
    """Batches anywhere in any epoch are planned at once, and in less than 50 MB, by a loader of a table on disk; its
    state takes less than a kilobyte."""
    table = np.lib.format.open_memmap(tmp_path / "samples.npy", "w+", SAMPLE, (14_000_000,))
    table["shard"] = np.arange(len(table)) // 1000
    table.flush()
    del table
    samples, before = np.load(tmp_path / "samples.npy", mmap_mode="r"), private_mb()
    tars = tuple(str(tmp_path / "train" / f"{n}.tar") for n in range(14_000))
    shards = ShardSet(tars, samples, (), "0" * 64, "crop256")
    for shuffle in ("global", "blocks"):
        config = DataConfig(tmp_path, shuffle=shuffle)  # type: ignore[arg-type]
        started = time.perf_counter()
        sampler = TrainSampler(shards, plain_basis, config, 128, 1, 3, 8)
        for number in (0, sampler.steps // 2, 90 * sampler.steps - 1):
            rows = sampler(number).rows
            assert len(set(rows.tolist())) == 128 and rows.max() < len(samples)
        assert time.perf_counter() - started < 20  # a second, and thirty by an order that is held
    (loader,) = loaders(shards, plain_basis, 1, training=True)
    state = loader.state_dict()
    assert len(json.dumps(state)) < 1000 and json.loads(json.dumps(state)) == state
    assert private_mb() - before < 50


@pytest.mark.slow
def test_memory_stays_flat(shards: Path, basis: Eigenbasis) -> None:
    """Resident memory does not grow by more than 2 % over 40 epochs of one loader, with four others opened and closed
    in each. Medians of small batches, as each look sees another number of them ready; the first rounds fill caches."""
    train, sizes = open_shards(shards, "train"), []
    (loader,) = loaders(train, basis, 1, training=True, batch_size=4)
    for epoch in range(40):
        for _ in loader.epoch(epoch):
            pass
        for _ in range(4):
            (other,) = loaders(train, basis, 1, training=True, batch_size=4)
            next(iter(other))
            other.close()
        gc.collect()
        sizes.append(private_mb())
    assert np.median(sizes[25:]) <= 1.02 * np.median(sizes[10:25]), sizes


def test_memory_is_used_again_only_when_nobody_holds_it(
    numbered_shards: Make, plain_basis: Eigenbasis
) -> None:
    """Batches that are kept, also by a view of them, stay as they are; the memory of others is used again."""
    (loader,) = loaders(numbered_shards(131, 4), plain_basis, 1, training=True)
    kept = [(batch.images[1:, 2], batch.images[1:, 2].clone()) for batch in loader.epoch(0)]
    assert len(kept) == 16 and all(torch.equal(view, copy) for view, copy in kept)
    places = {view.data_ptr() for view, _ in kept}
    del kept
    gc.collect()
    assert {batch.images[1:, 2].data_ptr() for batch in loader.epoch(1)} <= places


def test_any_epoch_at_any_time(numbered_shards: Make, plain_basis: Eigenbasis) -> None:
    """A finished epoch begins again, an unfinished one resumes, any other begins at its start, bit for bit; a loop that
    is interrupted while a batch is finished gets that batch again; a forked process is refused."""
    shards = numbered_shards(40, 2)
    (loader,) = loaders(shards, plain_basis, 1, training=True)
    epochs = [collect(loader, range(epoch, epoch + 1)) for epoch in range(3)]
    assert len(loader) == 5 and same_batches(collect(loader, range(2, 3)), epochs[2])
    assert same_batches(collect(loader, range(0, 1)), epochs[0])
    next(loader.epoch(1))
    assert same_batches(collect(loader, range(1, 3)), epochs[1][1:] + epochs[2])
    finish = loader._finish

    def interrupt(*_: Any) -> None:
        loader._finish = finish  # type: ignore[method-assign]
        raise KeyboardInterrupt

    loader._finish = interrupt  # type: ignore[method-assign,assignment]
    got = []
    for _ in "12":
        try:
            for images, labels in loader.epoch(1):
                got.append((images.clone(), labels))
        except KeyboardInterrupt:
            assert loader.at_step == 0
    assert same_batches(got, epochs[1])
    next(loader.epoch(2))
    child = os.fork()
    if child == 0:
        try:
            next(loader.epoch(2))
        except ValueError:
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_blocks_are_read_in_sequence_first(
    numbered_shards: Make, plain_basis: Eigenbasis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over two epochs: when samples are read, their shards have been read through, each once an epoch (of the last
    block of one and the first of the next once for both); and the next block is begun before the present one is done.
    """
    shards, begun, done, late = numbered_shards(160, 10), list[int](), list[int](), list[int]()
    through, read = SampleReader.read_through, SampleReader.read

    def read_through(self: SampleReader, shard: int) -> None:
        begun.append(shard)
        through(self, shard)
        done.append(shard)

    def read_samples(self: SampleReader, rows: np.ndarray) -> Any:
        late.extend(set(shards.samples["shard"][rows].tolist()) - set(done[-8:]))
        return read(self, rows)

    monkeypatch.setattr(SampleReader, "read_through", read_through)
    monkeypatch.setattr(SampleReader, "read", read_samples)
    (loader,) = loaders(shards, plain_basis, 1, True, shuffle="blocks", block_shards=2)
    ahead = []
    for epoch in range(2):
        for _ in loader.epoch(epoch):
            ahead.append(len(begun) > len(done) or len(done) >= 2 * len(ahead) // 4)
    loader.close()
    assert not late and all(ahead)
    assert sorted(done[:10]) == sorted(done[10:20]) == list(range(10))


def test_refusals(numbered_shards: Make, plain_basis: Eigenbasis, monkeypatch: pytest.MonkeyPatch) -> None:
    """By name, when the loader is made: a batch that cannot be filled, a rank that is none or one of several processes
    without one, a GPU's decoder without a GPU, settings that are no choice, seeds and stds that are none."""
    shards = numbered_shards(20, 2)
    with pytest.raises(ValueError, match="smaller batch size"):
        loaders(shards, plain_basis, 3, training=True)
    with pytest.raises(ValueError, match="rank"):
        train_loader(shards, batch_size=1, basis=plain_basis, rank=2, num_ranks=2)
    for name, value in (("decode", "gpu"), ("shuffle", "block"), ("on_corrupt", "Skip"), ("decode", "GPU")):
        with pytest.raises(ValueError, match=name):
            loaders(shards, plain_basis, 1, training=True, **{name: value})
    for changes in ({"crop": "centre"}, {"std": (1, 2)}, {"std": (1, 2, 0)}, {"mean": "none"}):
        with pytest.raises(ValueError, match=next(iter(changes))):
            Augmentation(**changes)  # type: ignore[arg-type]
    assert Augmentation(std=[1, 2, 3]) == Augmentation(std=(1.0, 2.0, 3.0))  # type: ignore[arg-type]
    for seed in (-1, 2**63, 1.5):
        with pytest.raises(ValueError, match="seed"):
            train_loader(shards, batch_size=1, basis=plain_basis, seed=seed, device="cpu")  # type: ignore[arg-type]
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="num_ranks"):
        train_loader(shards, batch_size=1, basis=plain_basis, device="cpu")


def test_states(numbered_shards: Make, plain_basis: Eigenbasis) -> None:
    """From the start, the middle and the end of an epoch a loader continues bit for bit, with other settings of speed,
    and on two ranks as on one."""
    shards = numbered_shards(131, 4)
    (undisturbed,) = loaders(shards, plain_basis, 1, training=True)
    expected = collect(undisturbed, range(3))
    for stop_at in (0, 5, 16, 21):
        (first,) = loaders(shards, plain_basis, 1, training=True)
        seen = [
            batch.labels
            for epoch in range(2)
            for batch in islice(first.epoch(epoch), max(0, stop_at - 16 * epoch))
        ]
        assert len(seen) == stop_at
        state = first.state_dict()
        speed = Speed(threads=1, prefetch_queue_depth=3, reader_queue_depth=1)
        (second,) = loaders(shards, plain_basis, 1, training=True, speed=speed)
        second.load_state_dict(state)
        assert same_batches(collect(second, range(second.at_epoch, 3)), expected[stop_at:])
    halves = loaders(shards, plain_basis, 2, training=True, batch_size=4)
    for half in halves:
        half.load_state_dict(state)
    pairs = zip(*(collect(half, range(half.at_epoch, 3)) for half in halves), strict=True)
    joined = [(torch.cat([a[0], b[0]]), torch.cat([a[1], b[1]])) for a, b in pairs]
    assert same_batches(joined, expected[21:])


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("global batch size", {"batch_size": 4}),
        ("global batch size", {"num_ranks": 2}),
        ("shuffle", {"shuffle": "blocks"}),
        ("augmentation", {"augmentation": Augmentation(flip=0)}),
        *(
            (name, {})
            for name in ("shards", "seed", "eigenbasis", "decode", "device", "DALI", "content version")
        ),
    ],
)
def test_a_state_that_does_not_fit_is_refused(
    numbered_shards: Make, plain_basis: Eigenbasis, field: str, change: dict[str, Any]
) -> None:
    """Each field of the fingerprint is named; settings of speed and the strength of lighting are free."""
    shards = numbered_shards(131, 4)
    place: dict[str, Any] = {"num_ranks": 1, "training": True}
    state = loaders(shards, plain_basis, **place)[0].state_dict()
    free = {"speed": Speed(threads=1), "augmentation": Augmentation(lighting=Lighting(strength=0))}
    loaders(shards, plain_basis, **place, **free)[0].load_state_dict(state)
    if not change:
        assert state["fingerprint"][field] != "other"
        state["fingerprint"][field] = "other"
    with pytest.raises(ValueError, match=f"{field} was"):
        loaders(shards, plain_basis, **{**place, **change})[0].load_state_dict(state)


@pytest.mark.gpu
@pytest.mark.parametrize("decode", ["cpu", "gpu"])
def test_gpu_backend_agrees_with_the_cpu(shards: Path, decode: Any) -> None:
    """Equal seeds give equal crops, flips and noise; half precision and another decoder move pixels slightly."""
    on_cpu = train_loader(shards, batch_size=32, seed=3, device="cpu")
    on_gpu = train_loader(shards, batch_size=32, seed=3, device="cuda", decode=decode)
    for (images, labels), (gpu_images, gpu_labels), _ in zip(
        on_cpu.epoch(0), on_gpu.epoch(0), range(5), strict=False
    ):
        assert gpu_images.dtype == torch.float16 and gpu_images.is_cuda
        assert gpu_images.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(labels, gpu_labels.cpu())
        difference = (images - gpu_images.cpu().float()).abs()
        assert difference.mean() < 0.5 and difference.max() < (0.1 if decode == "cpu" else 40)
