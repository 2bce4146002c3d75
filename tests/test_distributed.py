"""Several processes learn what one does, agree before they start, stop together, resume; an error is printed once."""

import os
import re
import shutil
import signal
import subprocess
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._dynamo.exc import TorchDynamoException

from pipeline.errors import DataError, UserError
from tests.helpers import (
    TORCHRUN,
    TRAIN,
    final,
    rows_of,
    run_ok,
    run_python,
    same_weights,
    shared_run,
    signal_worker,
    start_python,
    wait_for,
)
from train.config import ParallelConfig
from train.distributed import ECHO_S, SIGNALS, START_TIMEOUT, Distributed, StopFlag, StopSignal

STEPS = 1438 // 128


@pytest.mark.slow
def test_towers_learn_what_replicas_learn(shards: Path, tmp_path: Path) -> None:
    """Without dropout, the rows and weights of a pair of towers are those of two replicas, whose images are the same,
    but for rounding."""
    same = ["--model.dropout", "0", "--run.log_every", "1"]
    for mode in ("replicas", "towers"):
        command = shared_run(shards, tmp_path / mode, *same, "--parallel.mode", mode)
        out = run_ok(*TORCHRUN, *TRAIN, *command, run=run_python)
        assert out.count("ten-view top-1 accuracy") == 1 and "in each of 2 processes" in out
    one, two = (rows_of(tmp_path / name) for name in ("replicas", "towers"))
    assert [row["step"] for row in one] == [row["step"] for row in two] == [*range(1, STEPS + 1), STEPS]
    for a, b in zip(one[:-1], two[:-1], strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
        assert b["gradient_norm"] == pytest.approx(a["gradient_norm"], rel=1e-3)
        assert b["top1_error"] == pytest.approx(a["top1_error"], abs=2)
    for part in ("model", "optimizer"):
        expected, got = (final(tmp_path / name)[part] for name in ("replicas", "towers"))
        for name, tensor in expected.items():  # type: ignore[attr-defined]
            # Gradients are small sums at the start, so velocities, and biases that began at 0, have fewer digits.
            tolerance = 1e-6 if part == "model" and name.endswith("weight") else 5e-3
            assert (got[name] - tensor).abs().max() <= tolerance * tensor.abs().max()  # type: ignore[index]


@pytest.mark.slow
def test_stopped_together_and_resumed(shards: Path, tmp_path: Path) -> None:
    """SIGTERM to one of two towers stops both, which save; the same command then ends with bitwise the weights of an
    undisturbed run. Only rank 0 prints and writes. (Replicas: test_chaos.py.)"""
    towers = ("--parallel.mode", "towers")
    undisturbed, stopped = (
        shared_run(shards, tmp_path / name, *towers) for name in ("undisturbed", "stopped")
    )
    run_ok(*TORCHRUN, *TRAIN, *undisturbed, run=run_python)
    process = start_python(*TORCHRUN, *TRAIN, *stopped, stderr=subprocess.STDOUT)
    wait_for(lambda: rows_of(tmp_path / "stopped"), process)
    assert signal_worker(process, 1, signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and output.count("run the same command again") == 1, output
    between = final(tmp_path / "stopped")
    assert 0 < between["step"] < STEPS and len(between["ranks"]) == 2  # type: ignore[operator,arg-type]
    run_ok(*TORCHRUN, *TRAIN, *stopped, run=run_python)
    end, expected = final(tmp_path / "stopped"), final(tmp_path / "undisturbed")
    assert end["step"] == STEPS and same_weights(end, expected)
    dropout = [[rank["random"]["cpu"] for rank in each["ranks"]] for each in (end, expected)]  # type: ignore[attr-defined]
    assert all(map(torch.equal, *dropout)) and not torch.equal(*dropout[0])


@pytest.mark.slow
def test_another_number_of_processes(shards: Path, tmp_path: Path) -> None:
    """What two processes began, one, three, or a pair of towers resume in mid-epoch: without dropout the losses of all
    later steps are those of the undisturbed run of two, up to rounding, to the end of the next epoch. So the same
    samples followed with the same crops, flips and colours; with others losses differ by far more."""
    same = (
        "--model.dropout 0 --run.log_every 1 --run.save_minutes 0 --run.keep_last 99 --train.batch_size 126"
    )
    first, more = tmp_path / "2", same.split()
    run_ok(*TORCHRUN, *TRAIN, *shared_run(shards, first, *more, "--train.epochs", "2"), run=run_python)
    expected = [row["loss"] for row in rows_of(first) if row["kind"] == "train"]
    tolerance = 2e-5  # rows have six digits
    assert len(expected) == 22 and np.std(expected[:11]) > 10 * tolerance, expected
    for processes, mode in ((1, "replicas"), (3, "replicas"), (2, "towers")):
        copy = tmp_path / f"{processes} {mode}"
        shutil.copytree(first, copy)
        within = [
            path for path in sorted((copy / "checkpoints").glob("step-*.pt")) if 2 < int(path.stem[5:]) < 11
        ]
        (copy / "checkpoints" / "LATEST").write_text(f"{within[0].name}\n")
        launcher = [*TORCHRUN[:-1], str(processes)] if processes > 1 else []
        command = shared_run(shards, copy, *more, "--train.epochs", "2", "--parallel.mode", mode)
        assert f"resuming from {within[0]}" in run_ok(*launcher, *TRAIN, *command, run=run_python)
        losses = [row["loss"] for row in rows_of(copy) if row["kind"] == "train"]
        assert losses == pytest.approx(expected, rel=tolerance)


@pytest.mark.slow
def test_divergence_is_reported_once(shards: Path, tmp_path: Path) -> None:
    """By rank 0, with the last good checkpoint."""
    jump = ["--optimizer.schedule", "manual", "--optimizer.changes", "[{epoch: 1, lr: 1e9}]"]
    done = run_python(*TORCHRUN, *TRAIN, *shared_run(shards, tmp_path, *jump, "--train.epochs", "2"))
    assert done.returncode == 1 and done.stderr.count("error: training diverged") == 1
    assert f"{tmp_path}/checkpoints/step-{STEPS:08d}.pt" in done.stderr


def start_two(command: list[str], second: list[str]) -> list["subprocess.Popen[str]"]:
    """Two processes of a run, of which the second has more options."""
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20000 + os.getpid() % 10000)}
    ranks = [os.environ | place | {"RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1")]
    options = zip(([], second), ranks, strict=True)
    return [start_python(*TRAIN, *command, *more, env=env) for more, env in options]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("both", "second", "message"),
    [
        ("", "--train.seed 6", "train.seed is 6 in process 1 on "),
        ("", "--data.shards nowhere", "process 1 on "),
        ("--parallel.mode towers --model.towers 1", "", "model.towers"),
    ],
)
def test_processes_that_differ(shards: Path, tmp_path: Path, both: str, second: str, message: str) -> None:
    """A difference, an error of one process or of all: refused before the first step, in one sentence, by rank 0, with
    code 2 in both, and without a trace."""
    processes = start_two(shared_run(shards, tmp_path / "run", *both.split()), second.split())
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [2, 2], outputs
    (out, error), other = outputs
    assert other == ("", "") and out == "" and len(error.splitlines()) == 1 and message in error
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_lost_process(shards: Path, tmp_path: Path) -> None:
    """Where one is killed the other ends with a sentence and code 3, and the same command resumes."""
    command = shared_run(shards, tmp_path, "--train.epochs", "9", "--run.save_minutes", "0")
    first, second = start_two(command, [])
    wait_for(lambda: (tmp_path / "checkpoints" / "LATEST").exists(), first)
    second.kill()
    _, error = first.communicate(timeout=120)
    assert first.returncode == 3 and "another process is gone" in error and "Traceback" not in error, error
    assert "resuming from" in run_ok(*TORCHRUN, *TRAIN, *command, "--train.epochs", "2", run=run_python)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("passes", [1, 4])
def test_batches_that_divide(ranks: int, passes: int) -> None:
    """Accepted are exactly those that processes can share and replicas can cut into passes, no larger than the data;
    what a refusal says to take is accepted."""
    distributed, images = Distributed(ParallelConfig()), 700
    distributed.world_size = distributed.num_replicas = ranks
    for batch in range(1, images + 3):
        own = batch / ranks
        fits = own == int(own) and own % passes == 0 and own <= images // ranks
        try:
            distributed.check_batch(batch, passes, images)
            assert fits, batch
        except UserError as error:
            assert not fits, batch
            for size in re.findall(r"\b(?:take|or) (\d+)", str(error)):
                distributed.check_batch(int(size), passes, images)


@pytest.mark.parametrize(("first", "later"), [*zip(SIGNALS, reversed(SIGNALS), strict=True)])
def test_signals(first: signal.Signals, later: signal.Signals) -> None:
    """The first is a request to stop; any at once after it, as Slurm sends them, is the same one; one that comes later
    ends the process."""
    child = os.fork()
    if child == 0:
        stop = StopSignal()
        before = stop()
        for number in (first, *SIGNALS):
            os.kill(os.getpid(), number)
        time.sleep(ECHO_S + 0.2)
        if stop() and not before:
            os.kill(os.getpid(), later)
            time.sleep(5)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == later


@pytest.mark.parametrize("step_s", [0.001, 0.05, 0.7, 3.0])
def test_exchanged_about_once_a_second(monkeypatch: pytest.MonkeyPatch, step_s: float) -> None:
    """However long a step is, processes ask each other within two seconds, or at every step; and not much more often
    than once a second. One that asks for it sooner decides."""
    now, times, soonest = 0.0, [0.0], -(10**9)

    def all_reduce_max(stop: int, save: int, negative: int) -> list[int]:
        times.append(now)
        return [stop, save, max(negative, soonest)]

    distributed = Distributed(ParallelConfig())
    distributed.world_size = 3
    monkeypatch.setattr(distributed, "all_reduce_max", all_reduce_max)
    monkeypatch.setattr("train.distributed.perf_counter", lambda: now)
    flag = StopFlag(distributed, lambda: False)
    for _ in range(int(30 / step_s)):
        now += step_s
        assert flag.check() == (False, False)
    assert max(after - before for before, after in pairwise(times)) <= max(2.0, step_s * 1.001)
    assert len(times) <= 31 + 12  # from one step to a second's worth by doubling
    flag.sync()
    soonest, sent = -2, len(times)
    for _ in range(100):
        flag.check()
    assert len(times) - sent >= 50


@pytest.mark.parametrize("fault", [torch.OutOfMemoryError, TorchDynamoException, RuntimeError])
def test_faults_of_this_process_are_no_lost_process(fault: type[RuntimeError]) -> None:
    """Memory that is full and a model that does not compile stay what they are; what torch.distributed raises, a
    `RuntimeError` of no kind of its own, is another process that is gone."""
    distributed = object.__new__(Distributed)
    distributed.world_size, distributed._timeout = 2, START_TIMEOUT
    expected = DataError if fault is RuntimeError else fault
    with pytest.raises(expected, match="why"), distributed.detect_lost_process():
        raise fault("why")
