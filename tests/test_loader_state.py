"""A loader's state continues bit for bit, in separate processes, too; a state of other settings is refused."""

import hashlib
import json
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline.eigenbasis import Eigenbasis
from pipeline.lighting import Lighting
from pipeline.loader import train_loader
from pipeline.settings import Augmentation, DataConfig, Speed
from pipeline.shards import open_shards
from tests.helpers import Make, collect, loaders, start_python


@pytest.mark.parametrize("stop_at", [0, 5, 16])
def test_state_continues_bit_for_bit(numbered_shards: Make, plain_basis: Eigenbasis, stop_at: int) -> None:
    """From the start, the middle and the end of an epoch: the following batches are those of the undisturbed loader."""
    shards = numbered_shards(131, 4)
    (undisturbed,) = loaders(shards, plain_basis, 1, training=True)
    expected = collect(undisturbed, range(3))
    (first,) = loaders(shards, plain_basis, 1, training=True)
    collect(first, range(1))
    for step, _ in enumerate(first.epoch(1), start=1):
        if step == stop_at:
            break
    state = first.state_dict()
    (second,) = loaders(shards, plain_basis, 1, training=True, speed=Speed(threads=1, prefetch_queue_depth=3))
    second.load_state_dict(state)
    position = first.at_epoch * 16 + first.at_step
    got = collect(second, range(second.at_epoch, 3))
    assert len(got) == len(expected) - position == 48 - position
    for (images, labels), (expected_images, expected_labels) in zip(got, expected[position:], strict=True):
        assert torch.equal(images, expected_images) and torch.equal(labels, expected_labels)


def test_a_state_that_does_not_fit_is_refused(numbered_shards: Make, plain_basis: Eigenbasis) -> None:
    """Each field of the fingerprint is named; speed knobs and the strength of lighting are free."""
    shards = numbered_shards(131, 4)
    config = DataConfig(Path("x"), shuffle_buffer=16)
    place = {"batch_size": 8, "seed": 3, "rank": 0, "num_ranks": 1, "device": "cpu"}
    state = train_loader(shards, plain_basis, config, **place).state_dict()
    free = replace(config, speed=Speed(threads=1), augmentation=Augmentation(lighting=Lighting(strength=0)))
    train_loader(shards, plain_basis, free, **place).load_state_dict(state)
    for name, changed in [
        ("batch_size", {"batch_size": 4}),
        ("seed", {"seed": 4}),
        ("num_ranks", {"num_ranks": 2}),
    ]:
        with pytest.raises(ValueError, match=f"{name} was"):
            train_loader(shards, plain_basis, config, **{**place, **changed}).load_state_dict(state)
    with pytest.raises(ValueError, match="augmentation was"):
        train_loader(
            shards, plain_basis, replace(config, augmentation=Augmentation(flip=0)), **place
        ).load_state_dict(state)
    with pytest.raises(ValueError, match="shards was"):
        train_loader(replace(shards, manifest_sha256="other"), plain_basis, config, **place).load_state_dict(
            state
        )


def rank_batches(shards: Path, rank: int, num_ranks: int, state: Path, what: str) -> Iterator[str]:
    """Two epochs of one loader rank, a line for every batch; to "stop" is to be killed in mid-epoch, with the state
    saved, and to "resume" begins from there."""
    place = {"batch_size": 16, "seed": 1, "rank": rank, "num_ranks": num_ranks, "device": "cpu"}
    train = open_shards(shards, "train")
    basis = Eigenbasis.load(shards / "pca.json", train.manifest_sha256)
    loader = train_loader(train, basis, DataConfig(shards, shuffle_buffer=200), **place)  # type: ignore[arg-type]
    if what == "resume":
        loader.load_state_dict(json.loads(state.read_text()))
    for epoch in range(loader.at_epoch, 2):
        for images, labels in loader.epoch(epoch):
            digest = hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes())
            yield f"{epoch} {loader.at_step} {digest.hexdigest()}\n"
            if what == "stop" and loader.at_step == 5:
                state.write_text(json.dumps(loader.state_dict()))
                sys.stdout.flush()
                os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    "num_ranks", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)]
)
def test_ranks_in_processes_continue(few: Path, num_ranks: int, tmp_path: Path) -> None:
    """Each rank is a process, killed after its state is saved in mid-epoch: new processes
    continue with the batches of undisturbed ones, bit for bit, through the end of that epoch and the next one."""
    code = (
        "import sys; from pathlib import Path; from tests.test_loader_state import rank_batches as batches; "
        "place = sys.argv"
    )
    code += (
        "; sys.stdout.writelines(batches(Path(place[1]), *map(int, place[2:4]), Path(place[4]), place[5]))"
    )

    def processes(what: str) -> list[str]:
        command = ["-c", code, few]
        ranks = range(num_ranks)
        started = [
            start_python(*command, str(rank), str(num_ranks), tmp_path / str(rank), what) for rank in ranks
        ]
        outputs = [process.communicate(timeout=120)[0] for process in started]
        assert {process.returncode for process in started} == {-9 if what == "stop" else 0}
        return outputs

    undisturbed = ["".join(rank_batches(few, rank, num_ranks, tmp_path, "all")) for rank in range(num_ranks)]
    assert all(output.count("\n") > 20 for output in undisturbed) and len(set(undisturbed)) == num_ranks
    stopped, continued = processes("stop"), processes("resume")
    assert [one + two for one, two in zip(stopped, continued, strict=True)] == undisturbed


def test_another_world_goes_on_from_an_epochs_edge(numbered_shards: Make, plain_basis: Eigenbasis) -> None:
    """Other ranks and batches are refused, with the way out named, or taken from the edge of the epoch: its samples
    once each over the new ranks, in a new order, which continues bit for bit as any other."""
    shards = numbered_shards(131, 4)
    (old,) = loaders(shards, plain_basis, 1, training=True)
    collect(old, range(1))
    ended = old.state_dict()
    next(old.epoch(1))
    mid_epoch = old.state_dict()
    for state in (ended, mid_epoch):
        ranks = loaders(shards, plain_basis, 2, training=True, batch_size=4)
        with pytest.raises(ValueError, match=r"was 1, now it is 2; --resume\.allow_world_change"):
            ranks[0].load_state_dict({**state, "fingerprint": {**state["fingerprint"], "batch_size": 4}})
        for loader in ranks:
            loader.load_state_dict(state, allow_world_change=True)
            assert (loader.at_epoch, loader.at_step) == (1, 0)
        first = [collect(loader, range(1, 2)) for loader in ranks]
        seen = torch.cat([labels for rank in first for _, labels in rank]).tolist()
        assert len(seen) == len(set(seen)) == 128

        (again, _) = loaders(shards, plain_basis, 2, training=True, batch_size=4)
        again.load_state_dict(ranks[0].state_dict())
        expected, got = collect(ranks[0], range(2, 3)), collect(again, range(2, 3))
        assert all(
            torch.equal(a, x) and torch.equal(b, y) for (a, b), (x, y) in zip(got, expected, strict=True)
        )
        other_seed = ranks[0].state_dict()
        other_seed["fingerprint"]["seed"] = 9
        with pytest.raises(ValueError, match="seed was 9"):
            again.load_state_dict(other_seed, allow_world_change=True)
