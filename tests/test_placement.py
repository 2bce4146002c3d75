"""Runs over several processes, started by torchrun: they learn what one process learns, stop together, and go on."""

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from train.placement import Placement

from pipeline.errors import DataError
from tests.helpers import (
    TRAIN,
    final,
    rows_of,
    run_ok,
    run_python,
    same_weights,
    shared_run,
    start_python,
    train_refuses,
    wait_for,
)

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "train.run")
STEPS = 1438 // 128


@pytest.mark.slow
def test_towers_learn_what_replicas_learn(shards: Path, tmp_path: Path) -> None:
    """Without dropout, the rows and weights of a pair of towers are those of two replicas, whose images are the same,
    but for rounding."""
    same = ["--model.dropout", "0", "--run.log_every", "1"]
    run_ok(*TORCHRUN, *shared_run(shards, tmp_path / "one", *same), run=run_python)
    towers = ["--parallel.mode", "towers"]
    out = run_ok(*TORCHRUN, *shared_run(shards, tmp_path / "two", *same, *towers), run=run_python)
    assert out.count("ten-view top-1 accuracy") == 1 and "in each of 2 processes" in out
    one, two = (rows_of(tmp_path / name) for name in ("one", "two"))
    assert [row["step"] for row in one] == [row["step"] for row in two] == [*range(1, STEPS + 1), STEPS]
    for a, b in zip(one[:-1], two[:-1], strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
        assert b["top1_error"] == pytest.approx(a["top1_error"], abs=2)
    for part in ("model", "optimizer"):
        expected, got = (final(tmp_path / name)[part] for name in ("one", "two"))
        for name, tensor in expected.items():  # type: ignore[attr-defined]
            assert (got[name] - tensor).abs().max() <= 1e-3 * tensor.abs().max()  # type: ignore[index]


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["towers", "single"])
def test_stopped_together_and_continued(shards: Path, tmp_path: Path, placement: str) -> None:
    """SIGTERM to one process stops both, who save; the same command then ends with bitwise the weights of an
    undisturbed run. Only one of them tells and writes."""
    how = ["--parallel.mode", placement]
    run_ok(*TORCHRUN, *shared_run(shards, tmp_path / "undisturbed", *how), run=run_python)
    command = [*TORCHRUN, *shared_run(shards, tmp_path / "stopped", *how)]
    process = start_python(*command, stderr=subprocess.STDOUT)
    wait_for(lambda: rows_of(tmp_path / "stopped"), process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    (second,) = (pid for pid in children if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes())
    os.kill(int(second), signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and output.count("run the same command again") == 1, output
    stopped = final(tmp_path / "stopped")
    assert 0 < stopped["step"] < STEPS and len(stopped["ranks"]) == 2  # type: ignore[operator,arg-type]
    run_ok(*TORCHRUN, *shared_run(shards, tmp_path / "stopped", *how), run=run_python)
    end, undisturbed = final(tmp_path / "stopped"), final(tmp_path / "undisturbed")
    assert end["step"] == STEPS and same_weights(end, undisturbed)
    assert all(
        torch.equal(a["random"]["cpu"], b["random"]["cpu"])
        for a, b in zip(end["ranks"], undisturbed["ranks"], strict=True)  # type: ignore[call-overload]
    )
    assert not torch.equal(*(each["random"]["cpu"] for each in end["ranks"]))  # type: ignore[attr-defined]


@pytest.mark.slow
def test_another_world_goes_on(shards: Path, tmp_path: Path) -> None:
    """What a pair of towers began, one process goes on with, if that is allowed: from the last end of an epoch, also
    where the newest checkpoint is in the midst of one."""
    run = shared_run(shards, tmp_path, "--run.save_every", "5", "--run.keep_last", "9", "--train.epochs", "2")
    run_ok(*TORCHRUN, *run, "--parallel.mode", "towers", run=run_python)
    began = final(tmp_path)
    (tmp_path / "checkpoints" / "LATEST").write_text("step-00000020.pt\n")
    assert "parallel.mode = towers" in train_refuses(*run)
    told = run_ok("-m", "train.run", *run, "--resume.allow_world_change", "true")
    assert f"resuming from {tmp_path}/checkpoints/step-{STEPS:08d}.pt (epoch 2, step {STEPS})" in told
    ended = final(tmp_path)
    assert ended["step"] == 2 * STEPS and len(ended["ranks"]) == 1  # type: ignore[arg-type]
    assert not same_weights(began, ended)
    rows = [row for row in rows_of(tmp_path) if row["kind"] == "eval"]
    assert [row["epoch"] for row in rows] == [1, 2]


class Others(Placement):
    """This process as one of three, whose other two tell what they are given."""

    def __init__(self, *told: object, rank: int = 0) -> None:
        self.rank, self.world, self._told = rank, 3, told

    def gather(self, mine: object) -> list[object]:
        """As `Placement.gather`."""
        return [(f"process {k} on h", told) if k != self.rank else mine for k, told in enumerate(self._told)]


def test_agreement() -> None:
    """Equal facts pass; the first that differs is told with both values and where, by the first process alone."""
    facts = {"train.seed": 5, "torch": "2.13"}
    Others(None, facts, facts).agree(facts)
    with pytest.raises(
        ValueError, match=r"the processes differ: torch is 2.11 in process 2 on h, 2.13 in process 0"
    ):
        Others(None, facts, {**facts, "torch": "2.11"}).agree(facts)
    with pytest.raises(ValueError, match=r"train.seed is 6 in process 1 on h, 5 in .*\(1 more such\)"):
        Others(None, facts | {"train.seed": 6}, facts | {"torch": "2.11"}).agree(facts)
    with pytest.raises(SystemExit) as left:
        Others(facts, None, facts | {"train.seed": 6}, rank=1).agree(facts)
    assert left.value.code == 2


def test_what_fails_in_one_process() -> None:
    """An error of any process is raised in the first, which says where it was, unless all have it; the others leave
    with its exit code."""

    def fails() -> None:
        raise ValueError("no shards here")

    alike = ValueError("no shards here")
    assert Others(None, None, None).together(lambda: 7) == 7
    with pytest.raises(ValueError, match=r"^no shards here$"):
        Others(None, alike, alike).together(fails)
    with pytest.raises(ValueError, match=r"^process 2 on h: no shards here$"):
        Others(None, None, alike).together(lambda: 7)
    for error, code in ((alike, 2), (DataError("damaged"), 3)):
        with pytest.raises(SystemExit) as left:
            Others(error, None, None, rank=1).together(lambda: 7)
        assert left.value.code == code


@pytest.mark.slow
def test_divergence_is_told_once(shards: Path, tmp_path: Path) -> None:
    """By the first process, who knows the last good checkpoint."""
    jump = [
        "--optimizer.schedule",
        "hand",
        "--optimizer.changes",
        "[{epoch: 1, lr: 1e9}]",
        "--train.epochs",
        "2",
    ]
    done = run_python(*TORCHRUN, *shared_run(shards, tmp_path, *jump))
    assert done.returncode == 1 and done.stderr.count("error: training diverged") == 1
    assert f"The last good checkpoint is {tmp_path}/checkpoints/step-{STEPS:08d}.pt" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--train.seed", "6"], "the processes differ: train.seed is 6 in process 1 on "),
        (["--data.shards", "nowhere"], "process 1 on "),
        (["--model.fc_dim", "63"], "model.fc_dim must be positive and divide"),
    ],
)
def test_processes_that_differ(shards: Path, tmp_path: Path, more: list[str], message: str) -> None:
    """Before the first step, in one sentence, by one process, with code 2 in both, and without a trace."""
    both = 2 if "fc_dim" in more[0] else 1  # of which all of a machine's processes have the same
    commands = [shared_run(shards, tmp_path / "run", *(more if k or both == 2 else [])) for k in range(2)]
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20000 + os.getpid() % 10000)}
    processes = [
        start_python(*TRAIN, *command, env=os.environ | place | {"RANK": str(k), "LOCAL_RANK": str(k)})
        for k, command in enumerate(commands)
    ]
    told = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [2, 2], told
    assert (
        told[1] == ("", "")
        and told[0][0] == ""
        and len(told[0][1].splitlines()) == 1
        and message in told[0][1]
    )
    assert not (tmp_path / "run").exists()


def test_refusals(shards: Path, tmp_path: Path) -> None:
    """Towers without a partner, and batches that the processes cannot share."""
    told = train_refuses(*shared_run(shards, tmp_path / "run", "--parallel.mode", "towers"))
    assert "even number of processes, not 1" in told and not (tmp_path / "run").exists()
    placement = object.__new__(Placement)
    placement.num_loader_ranks = placement.num_replicas = 3
    assert placement.loader_batch(33) == 11


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("window", [1, 6, 32])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_batches_that_can_be_shared_out(ranks: int, window: int, accumulate: int) -> None:
    """Exactly those that each process can load in groups of one window and replicas can cut into passes, no larger
    than the data; what a refusal says to take is taken."""
    placement, images = object.__new__(Placement), 700
    placement.num_loader_ranks = placement.num_replicas = ranks
    for batch in range(1, images + 3):
        own = batch / ranks
        fits = own == int(own) and own % window == 0 and own % accumulate == 0 and own <= images // ranks
        try:
            placement.check_batch(batch, accumulate, window, images)
            assert fits, batch
        except ValueError as error:
            assert not fits, batch
            told = str(error)
            for size in re.findall(r"\b(?:take|or|can be) (\d+)", told):
                placement.check_batch(int(size), accumulate, window, images)
            for smaller in re.findall(r"\bor data.augmentation.images_per_crop (\d+)", told):
                placement.check_batch(batch, accumulate, int(smaller), images)
