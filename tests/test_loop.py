"""A step is one update of the paper's rule, however it is cut up and in whatever precision, and never waits in
between."""

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from train.loop import Trainer
from train.placement import Placement
from train.state import TrainState
from train.stop import StopVote

from tests.helpers import small_run
from train.config import parse_config


@pytest.fixture
def state_of(shards: Path, tmp_path: Path) -> Iterator[Any]:
    """Builds states of a small network on the demo, in this process."""
    made: list[TrainState] = []

    def build(*more: str, device: str = "cpu") -> TrainState:
        config = parse_config(small_run(shards, tmp_path / f"run{len(made)}", *more))
        place = torch.device(device)
        state = TrainState(config, place, Placement(config.parallel, place))
        state.build()
        made.append(state)
        return state

    yield build
    for state in made:
        state.close()


def trainer_of(state: TrainState, stop: Callable[[], bool] = lambda: False, log: Any = None) -> Trainer:
    """Trains it, until `stop` says so."""
    return Trainer(state, log, StopVote(state.placement, stop))


def test_deterministic_does_without_jpeg_engines(state_of: Any) -> None:
    """Those of a GPU may give other bits in another call; the configuration keeps what the user set."""
    for words, load in (((), 0.65), (("--run.deterministic", "true"), 0.0)):
        state = state_of(*words)
        assert {each._config.speed.hw_decoder_load for each in (state.train_loader, state.val_loader)} == {
            load
        }
        assert state.config.data.speed.hw_decoder_load == 0.65


WAITS = ("item", "cpu", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__", "nonzero")
"""What makes the host wait for a GPU, on a tensor that lies there."""


def test_no_waiting_outside_log_steps(state_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between log steps nothing asks a tensor of the network, the loss or the meter for its value; at a log step
    something does. (On a CPU the loader's own tensors are numpy's, so they are not counted.)"""
    state = state_of("--run.log_every", "4", "--run.save_every", "1000")
    asked: list[tuple[int, str]] = []
    loader = state.train_loader

    def quietly(*args: Any) -> Any:
        nonlocal watching
        watching = False
        try:
            return run(*args)
        finally:
            watching = True

    watching, run = True, loader._run
    monkeypatch.setattr(loader, "_run", quietly)
    for name in WAITS:
        original = getattr(torch.Tensor, name)

        def spy(
            self: torch.Tensor, *args: Any, _name: str = name, _original: Any = original, **kwargs: Any
        ) -> Any:
            if watching:
                asked.append((state.step, _name))
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, spy)
    steps = 0

    def stop() -> bool:
        nonlocal steps
        steps += 1
        return steps == 10

    trainer_of(state, stop).train_epoch()
    assert state.step == 10
    assert {step for step, _ in asked} == {4, 8}, asked


@pytest.mark.gpu
def test_no_waiting_on_a_gpu(state_of: Any) -> None:
    """Steps between two log rows synchronize with the GPU nowhere, as CUDA itself tells."""
    more = [
        "--run.device",
        "cuda",
        "--train.precision",
        "bf16",
        "--run.log_every",
        "50",
        "--run.save_every",
        "1000",
    ]
    state, steps = state_of(*more, device="cuda:0"), 0

    def stop() -> bool:
        nonlocal steps
        steps += 1
        if steps == 3:  # behind the first steps, which set things up
            torch.cuda.set_sync_debug_mode("error")
        return steps == 13

    try:
        assert trainer_of(state, stop).train_epoch()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_rate_of_a_row_is_the_steps(state_of: Any) -> None:
    """With warm-up and a cosine every row has another rate, that of its step."""
    rarely = ["--run.log_every", "4", "--run.save_every", "99"]
    state = state_of("--optimizer.schedule", "cosine", "--optimizer.warmup_epochs", "1", *rarely)
    rows: list[float] = []

    class Log:
        def write(self, kind: str, step: int, **values: float) -> None:
            rows.append(values["lr"])

    trainer_of(state, lambda: state.step >= 12, Log()).train_epoch()
    assert rows == pytest.approx([0.005 * (step - 0.5) / 44 for step in (4, 8, 12)])


def test_what_saving_tells(state_of: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Why a checkpoint cannot be written is told when the reason is another one than before, with what helps; so is
    the first one that is written again."""
    reasons = iter((errno.ENOSPC, errno.ENOSPC, errno.EACCES, errno.EISDIR, errno.EIO, 0, 0, errno.ENOSPC))

    class Log:
        def sync(self) -> None:
            if reason := next(reasons):
                raise OSError(reason, os.strerror(reason), "metrics.jsonl")

    trainer = trainer_of(state_of(), log=Log())
    for trainer.state.step in range(1, 9):
        trainer.save()
    trainer.tell_trouble()
    lines = capsys.readouterr().out.splitlines()
    helps = ["free some space", "set its permissions", "move away what lies there", "look after the disk"]
    assert [line.split("; ")[-1] for line in [*lines[:4], lines[5]]] == [*helps, helps[0]]
    assert all(line.startswith("could not save: metrics.jsonl: ") for line in [*lines[:4], lines[5]])
    assert (
        lines[4].startswith("saving works again: ")
        and lines[4].endswith("step-00000006.pt")
        and len(lines) == 6
    )


def steps(state: TrainState, count: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of the first steps, and the weights behind them."""
    rates, losses = dict.fromkeys(state.learner.names, 0.001), []
    for _, batch in zip(range(count), state.train_loader.epoch(0), strict=False):
        loss, _, _ = state.learner.step(batch, rates)
        losses.append(loss.item())
    return losses, {name: tensor.clone() for name, tensor in state.learner.model.state_dict().items()}


def test_accumulated_gradients(state_of: Any) -> None:
    """Without dropout, four passes of eight images are one of thirty-two, but for rounding; three are not accepted."""
    whole, pieces = (
        state_of("--model.dropout", "0", "--train.grad_accum_steps", each) for each in ("1", "4")
    )
    (expected, weights), (losses, others) = steps(whole, 5), steps(pieces, 5)
    assert losses == pytest.approx(expected, rel=1e-5)
    for name, weight in weights.items():
        assert (others[name] - weight).abs().max() < 1e-4 * weight.abs().max() > 0
    with pytest.raises(ValueError, match=r"a multiple of 3 for train.grad_accum_steps 3; take 30 or 33"):
        state_of("--train.grad_accum_steps", "3")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision(state_of: Any, precision: str) -> None:
    """The first losses are those of float32, within half precision's rounding; weights stay float32."""
    (expected, _), (losses, weights) = (
        steps(state_of("--model.dropout", "0", "--train.precision", each), 3)
        for each in ("float32", precision)
    )
    assert losses == pytest.approx(expected, rel=0.02) and losses != expected
    assert all(weight.dtype == torch.float32 and weight.isfinite().all() for weight in weights.values())


def test_overflow_leaves_a_step_out(state_of: Any) -> None:
    """A loss scaled beyond float16 changes no weight, halves the factor, and the next steps train."""
    state = state_of("--train.precision", "fp16")
    state.learner.scale.factor.fill_(2.0**40)
    before = {name: tensor.clone() for name, tensor in state.learner.model.state_dict().items()}
    _, after = steps(state, 1)
    assert state.learner.scale.factor == 2.0**39 and all(
        torch.equal(before[name], after[name]) for name in before
    )
    state.learner.scale.factor.fill_(2.0**10)
    rates = dict.fromkeys(before, 0.001)
    state.learner.step(next(state.train_loader.epoch(0)), rates)
    assert not torch.equal(state.learner.model.state_dict()["fc8.weight"], before["fc8.weight"])


def test_gradient_norm(state_of: Any) -> None:
    """That over all parameters, as torch's own clipping computes it, of the true gradient in float16 too."""
    norms = {}
    for precision in ("float32", "fp16"):
        state = state_of("--model.dropout", "0", "--train.precision", precision)
        batch = next(state.train_loader.epoch(0))
        _, _, norm = state.learner.step(batch, dict.fromkeys(state.learner.names, 0.0), True)
        norms[precision] = norm.item()
    model, reference = state_of("--model.dropout", "0"), torch.nn.utils.clip_grad_norm_
    torch.nn.functional.cross_entropy(model.learner.model(batch.images), batch.labels).backward()
    assert norms["float32"] == pytest.approx(
        reference(model.learner.model.parameters(), 1e9).item(), rel=1e-5
    )
    assert norms["fp16"] == pytest.approx(norms["float32"], rel=0.02)
