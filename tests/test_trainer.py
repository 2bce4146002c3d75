"""A step is one update of the rule, whatever the micro-batches and the precision, and never waits in between."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.eigenbasis import Eigenbasis
from tests.helpers import Make, loaders, rows_of, small_run
from train.config import parse_config
from train.distributed import Distributed, StopFlag
from train.trainer import Trainer


@pytest.fixture
def build(shards: Path, tmp_path: Path) -> Iterator[Any]:
    """Builds trainers of a small network on the demo, in this process."""
    made: list[Trainer] = []

    def build(*more: str, device: str = "cpu") -> Trainer:
        run = tmp_path / f"run{len(made)}"
        config = parse_config(small_run(shards, run, "--run.save_minutes", "9", *more))
        config.run.dir.mkdir()
        trainer = Trainer(config, torch.device(device), Distributed(config.parallel))
        trainer.build()
        made.append(trainer)
        return trainer

    yield build
    for trainer in made:
        trainer.close()


def train(trainer: Trainer, stop: Callable[[], bool]) -> None:
    """Train until `stop()`, which is asked after every step."""
    trainer.fit(StopFlag(trainer.distributed, stop))


def test_deterministic_does_without_jpeg_engines(build: Any) -> None:
    """Those of a GPU may differ between calls; the saved configuration keeps what the user set."""
    for words, load in (((), 0.65), (("--run.deterministic", "true"), 0.0)):
        trainer = build(*words)
        loaders = (trainer.train_loader, trainer.val_loader)
        assert {each._config.speed.hw_decoder_load for each in loaders} == {load}
        assert trainer.config.data.speed.hw_decoder_load == 0.65


WAITS = ("item", "cpu", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__", "nonzero")
"""What makes the host wait for a GPU, on a tensor there."""


def test_no_waiting_outside_log_steps(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between log steps nothing reads a tensor of the network, the loss or the meter; at a log step something does.
    (On a CPU the loader's own tensors are numpy's, so they are not counted.)"""
    trainer = build("--run.log_every", "4")
    reads: list[tuple[int, str]] = []
    loader, watching = trainer.train_loader, True
    run = loader._finish

    def unwatched(*args: Any) -> Any:
        nonlocal watching
        watching = False
        batch = run(*args)
        watching = True
        return batch

    monkeypatch.setattr(loader, "_finish", unwatched)
    for name in WAITS:
        original = getattr(torch.Tensor, name)

        def spy(*args: Any, _name: str = name, _original: Any = original, **kwargs: Any) -> Any:
            if watching:
                reads.append((trainer.step, _name))
            return _original(*args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, spy)
    train(trainer, lambda: trainer.step >= 10)
    assert trainer.step == 10 and {step for step, _ in reads} == {4, 8, 10}, reads  # at 10 it is saved


@pytest.mark.gpu
def test_no_waiting_on_a_gpu(build: Any) -> None:
    """Steps between two log rows synchronize with the GPU nowhere, by CUDA's own alarm."""
    more = ["--run.device", "cuda", "--train.precision", "bf16", "--run.log_every", "50"]
    trainer = build(*more, device="cuda:0")

    def stop() -> bool:
        if trainer.step == 3:  # after the first steps, which set things up
            torch.cuda.set_sync_debug_mode("error")
        if trainer.step == 13:
            torch.cuda.set_sync_debug_mode("default")
        return trainer.step == 13

    try:
        train(trainer, stop)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_rows_and_profile(build: Any) -> None:
    """With warm-up and a cosine the rate of a row is that of its step; `run.profile_steps` writes a Chrome trace of
    forward, backward and update."""
    cosine = ["--optimizer.schedule", "cosine", "--optimizer.warmup_epochs", "1"]
    trainer = build(*cosine, "--run.log_every", "4", "--run.profile_steps", "2")
    train(trainer, lambda: trainer.step >= 14)
    run = trainer.config.run.dir
    expected = [0.005 * (step - 0.5) / 44 for step in (4, 8, 12)]
    assert [row["lr"] for row in rows_of(run)][:3] == pytest.approx(expected, rel=1e-5)
    names = {event.get("name") for event in json.loads((run / "profile.json").read_text())["traceEvents"]}
    assert {"aten::convolution", "Optimizer.step#AlexNetSGD.step"} <= names, names


def steps(trainer: Trainer, count: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of the first steps, and the weights after them."""
    losses = []
    for group in trainer.optimizer.param_groups:
        group["lr"] = 0.001
    for _, batch in zip(range(count), trainer.train_loader.epoch(0), strict=False):
        losses.append(trainer.train_step(batch)[0].item())
    return losses, {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


@pytest.mark.parametrize(
    ("option", "rel"),
    [
        ("--train.grad_accum_steps 4", 1e-5),
        ("--train.precision bf16", 0.02),
        ("--train.precision fp16", 0.02),
    ],
)
def test_same_steps(build: Any, option: str, rel: float) -> None:
    """Without dropout, four micro-batches are one batch, but for rounding; so is half precision, whose weights are
    float32."""
    plain, other = (build("--model.dropout", "0", *more) for more in ((), option.split()))
    (expected, weights), (losses, others) = steps(plain, 5), steps(other, 5)
    assert losses == pytest.approx(expected, rel=rel) and losses != expected
    for name, weight in weights.items():
        assert others[name].dtype == torch.float32
        assert (others[name] - weight).abs().max() < 10 * rel * weight.abs().max() > 0


def test_overflow_skips_a_step(build: Any) -> None:
    """A loss scaled beyond float16 changes no weight and halves the factor; the next step trains."""
    trainer = build("--train.precision", "fp16")
    trainer.scale.factor.fill_(2.0**40)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    _, after = steps(trainer, 1)
    assert trainer.scale.factor == 2.0**39 and all(torch.equal(before[name], after[name]) for name in before)
    trainer.scale.factor.fill_(2.0**10)
    trainer.train_step(next(trainer.train_loader.epoch(0)))
    assert not torch.equal(trainer.model.state_dict()["fc8.weight"], before["fc8.weight"])


def test_gradient_norm(build: Any) -> None:
    """The norm over all parameters, as torch's own clipping computes it, of the unscaled gradient in float16, too."""
    for precision, rel in (("float32", 1e-5), ("fp16", 0.02)):
        trainer, plain = (build("--model.dropout", "0", "--train.precision", precision) for _ in range(2))
        batch = next(trainer.train_loader.epoch(0))
        norm = trainer.train_step(batch, with_norm=True)[3].item()
        torch.nn.functional.cross_entropy(plain.model(batch.images), batch.labels).backward()
        reference = torch.nn.utils.clip_grad_norm_(plain.model.parameters(), 1e9).item()
        assert norm == pytest.approx(reference, rel=rel)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_skipped_samples(
    build: Any, numbered_shards: Make, plain_basis: Eigenbasis, ranks: int, accumulation: int
) -> None:
    """With damaged samples that are skipped, in a global batch of 16 of which one micro-batch is damage alone, the
    gradient, averaged over ranks, is in float64 that of the sum of the losses of valid samples over 16, whatever the
    ranks and micro-batches; never NaN, and the skipped are counted."""
    shards = numbered_shards(48, 2)
    (clean,) = loaders(shards, plain_basis, 1, True, batch_size=16)
    first = next(iter(clean))
    lost = first.labels[[0, 1, 2, 3, 9]].tolist()
    for number in lost:
        row = shards.samples[number]
        with Path(shards.tars[row["shard"]]).open("r+b") as file:
            file.seek(int(row["offset"]))
            file.write(bytes(int(row["size"])))
    options = [
        "--data.on_corrupt",
        "skip",
        "--model.dropout",
        "0",
        "--train.grad_accum_steps",
        str(accumulation),
    ]
    trainer = build(*options)
    trainer.model.double()
    sums: dict[str, torch.Tensor] = {}

    def collect(**_: Any) -> None:
        for name, weight in trainer.model.named_parameters():
            sums[name] = sums.get(name, torch.zeros_like(weight)) + weight.grad / ranks
            weight.grad = None

    trainer.optimizer.step = collect
    skipped = 0
    for loader in loaders(shards, plain_basis, ranks, True, batch_size=16 // ranks, on_corrupt="skip"):
        images, labels = next(iter(loader))
        labels = torch.where(labels >= 0, labels % 10, labels)
        loss, _, count, _ = trainer.train_step((images.double(), labels))
        assert loss.isfinite()
        skipped += int(count)
    assert skipped == len(lost)
    valid = torch.tensor([label not in lost for label in first.labels.tolist()])
    logits = trainer.model(first.images[valid].double())
    expected = torch.nn.functional.cross_entropy(logits, first.labels[valid] % 10, reduction="sum") / 16
    expected.backward()
    for name, weight in trainer.model.named_parameters():
        torch.testing.assert_close(sums[name], weight.grad, rtol=1e-9, atol=1e-12)
