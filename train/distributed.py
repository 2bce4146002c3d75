"""Ranks, collectives, and how all ranks stop or save at the same step.

One process group serves both devices: gloo for CPU tensors (control messages), NCCL for those on a GPU. If a call by
`run_on_all_ranks` fails on any rank, rank 0 raises the error and the others exit. A `RuntimeError` of torch.distributed
is taken for a lost process and raised as `DataError`. NCCL's watchdog may end this process by SIGABRT before that;
torchrun's summary then names the process that failed first (docs/clusters.md).
"""

import math
import os
import platform
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from time import perf_counter
from types import FrameType
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.exc import TorchDynamoException
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.nn.parallel import DistributedDataParallel

from model.alexnet import AlexNet, AlexNetConfig
from model.towers import (
    TIMEOUT,
    TOWERS,
    TowerAlexNet,
    TowerMesh,
    gather_state_dict,
    seed_process,
    shard_state_dict,
)
from pipeline.errors import DataError, UserError
from pipeline.loader import Batch
from train.cli import DATA_FAILED, WRONG_INPUT, report_to_torchrun
from train.config import ParallelConfig
from train.launch import find_task

START_TIMEOUT = timedelta(minutes=10)
"""How long a rank waits for others until the first step is done, which may compile for a minute."""

State = dict[str, torch.Tensor]
T = TypeVar("T")


class Distributed:
    """Rank and collectives of this process; without other processes world_size is 1 and nothing is sent."""

    def __init__(self, config: ParallelConfig) -> None:
        """Join the other processes. Raises `UserError` when their number does not fit."""
        self.rank, self.world_size = find_task(os.environ)[:2]
        self._timeout = START_TIMEOUT
        if self.world_size > 1:
            store, rank, world_size = next(dist.rendezvous("env://", timeout=START_TIMEOUT))
            # torchrun keeps one store through restarts, with the addresses of dead processes in it (pytorch#135712).
            store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(
                backend, store=store, rank=rank, world_size=world_size, timeout=START_TIMEOUT
            )
        towers = config.mode == "towers"
        if towers and self.world_size % TOWERS:
            self.run_on_all_ranks(lambda: refuse_odd_world_size(self.world_size))
        self._mesh = TowerMesh.create(START_TIMEOUT) if towers else None
        """With towers: this rank's tower and its process groups."""
        self.replica, self.num_replicas = self.rank, self.world_size
        if self._mesh:
            self.replica, self.num_replicas = self._mesh.replica, self._mesh.num_replicas

    @property
    def is_rank_zero(self) -> bool:
        """True on rank 0, which prints and writes files."""
        return self.rank == 0

    @property
    def name(self) -> str:
        """Name of this process in messages."""
        return f"process {self.rank} on {platform.node()}"

    def check_batch(self, batch_size: int, grad_accum_steps: int, num_images: int) -> None:
        """Raise `UserError`, with sizes that work, unless a batch divides by the ranks and by the micro-batches of a
        replica."""
        unit = math.lcm(self.world_size, self.num_replicas * grad_accum_steps)
        most = num_images // unit * unit
        parts = [f"{self.world_size} processes"] * (self.world_size > 1)
        parts += [f"train.grad_accum_steps {grad_accum_steps}"] * (grad_accum_steps > 1)
        reason = " and ".join(parts)
        if not most:
            raise UserError(
                f"{num_images} training images do not fill the smallest batch, {unit}, for {reason}; take fewer"
            )
        if batch_size > most:
            raise UserError(
                f"train.batch_size: {num_images} training images do not fill a batch of {batch_size}; take {most} or "
                "less"
            )
        if batch_size % unit:
            lower = batch_size // unit * unit
            sizes = [str(size) for size in (lower, lower + unit) if 0 < size <= most]
            raise UserError(
                f"train.batch_size: expected a multiple of {unit} for {reason}, got {batch_size}; take "
                f"{' or '.join(sizes)}"
            )

    def build_model(self, config: AlexNetConfig, seed: int) -> AlexNet:
        """Build this rank's model or tower, with the same initial weights on all ranks; seed dropout by rank."""
        torch.manual_seed(seed)
        try:
            model = TowerAlexNet(config, self._mesh) if self._mesh else AlexNet(config)
        except ValueError as error:  # a configuration without two towers
            raise UserError(str(error)) from None
        if self.world_size > 1:
            seed_process(seed, self.rank)
        return model

    def wrap_ddp(self, model: nn.Module) -> nn.Module:
        """Wrap the model so that gradients are averaged over replicas."""
        if self._mesh:
            return self._mesh.wrap_ddp(model)
        return DistributedDataParallel(model, gradient_as_bucket_view=True) if self.world_size > 1 else model

    def grad_sync(self, model: nn.Module, enabled: bool) -> AbstractContextManager[None]:
        """Open a block in which `backward` averages gradients over replicas only if `enabled`."""
        return nullcontext() if enabled or not isinstance(model, DistributedDataParallel) else model.no_sync()

    def gather_batch(self, batch: Batch) -> Batch:
        """Return the batch of this rank's model: a pair of towers concatenates its two halves."""
        return Batch(*self._mesh.gather_batch(*batch)) if self._mesh else batch

    def gather_state_dict(self, state: State, config: AlexNetConfig) -> State:
        """Gather weights or velocities of both towers, as for one device. A collective."""
        with self.detect_lost_process():
            return gather_state_dict(state, config, self._mesh) if self._mesh else state

    def shard_state_dict(self, state: State) -> State:
        """Return this rank's part of the weights or velocities of both towers."""
        return shard_state_dict(state, self._mesh.tower) if self._mesh else state

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over replicas; a new tensor."""
        total = tensor.clone()
        if self.num_replicas > 1:
            with self.detect_lost_process():
                dist.all_reduce(total, group=self._mesh.replica_group if self._mesh else None)
        return total

    def sum_over_towers(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over the towers of one model; a new tensor."""
        total = tensor.clone()
        if self._mesh:
            with self.detect_lost_process():
                dist.all_reduce(total)
            total /= self.num_replicas  # whose gradients are equal
        return total

    def any_rank(self, flag: torch.Tensor) -> torch.Tensor:
        """Compute whether a bool tensor is true on any rank, without waiting for the device; a new tensor."""
        most = flag.float()
        if self.world_size > 1:
            with self.detect_lost_process():
                dist.all_reduce(most, dist.ReduceOp.MAX)
        return most > 0

    def all_reduce_max(self, *numbers: int) -> list[int]:
        """Compute the maximum of each number over all ranks."""
        if self.world_size == 1:
            return list(numbers)
        most = torch.tensor(numbers)
        with self.detect_lost_process():
            dist.all_reduce(most, dist.ReduceOp.MAX)
        return [int(number) for number in most.tolist()]

    def all_gather(self, value: Any) -> list[Any]:
        """Gather a value of every rank, in rank order, on all ranks. Values are pickled, between our processes only."""
        values = [value] * self.world_size
        if self.world_size > 1:
            with self.detect_lost_process():
                dist.all_gather_object(values, value)
        return values

    def run_on_all_ranks(self, work: Callable[[], T]) -> T:
        """Call `work` on every rank. If it fails on any, rank 0 raises that error, and the others exit silently."""
        if self.world_size == 1:
            return work()
        result, error = None, None
        try:
            result = work()
        except (ValueError, OSError, DataError) as raised:
            error = raised
        errors = [(name, each) for name, each in self.all_gather((self.name, error)) if each is not None]
        if not errors:
            return cast(T, result)
        name, first = errors[0]
        if not self.is_rank_zero:
            report_to_torchrun(str(first))
            sys.exit(DATA_FAILED if isinstance(first, DataError) else WRONG_INPUT)
        if len(errors) < self.world_size and getattr(first, "errno", None) is None:
            raise type(first)(f"{name}: {first}")
        raise first

    def run_on_rank_zero(self, work: Callable[[], None]) -> None:
        """Call `work` on rank 0; if it fails, the others exit silently."""
        self.run_on_all_ranks(work if self.is_rank_zero else lambda: None)

    def assert_same_on_all_ranks(self, values: dict[str, Any]) -> None:
        """Raise `UserError` on rank 0 for the first value that differs between ranks; the others exit silently."""
        everyone = self.all_gather((self.name, values))

        def compare() -> None:
            (first, expected), *others = everyone
            for name, value in expected.items():
                for other, theirs in others:
                    if theirs[name] != value:
                        raise UserError(
                            f"{name} is {theirs[name]} in {other}, {value} in {first}; start all processes alike"
                        )

        self.run_on_rank_zero(compare)

    @contextmanager
    def detect_lost_process(self) -> Iterator[None]:
        """Turn what torch.distributed raises when another process is gone into `DataError`."""
        try:
            yield
        except (torch.OutOfMemoryError, torch.AcceleratorError, TorchDynamoException, DataError):
            raise  # a fault of this process
        except RuntimeError as error:
            if self.world_size == 1:
                raise
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            raise DataError(
                f"another process is gone or was silent for {self._timeout.seconds} s; see its last output for the "
                f"reason ({reason}); the same command resumes from the last checkpoint"
            ) from error

    def end_startup(self) -> None:
        """Reduce the wait for other ranks from `START_TIMEOUT` to `TIMEOUT`; called after every step."""
        if self.world_size > 1 and self._timeout != TIMEOUT:
            for group in (None, *((self._mesh.pair_group, self._mesh.replica_group) if self._mesh else ())):
                _set_pg_timeout(TIMEOUT, group)
            self._timeout = TIMEOUT

    def shutdown(self) -> None:
        """Destroy the process group."""
        if self.world_size > 1:
            dist.destroy_process_group()


def refuse_odd_world_size(world_size: int) -> None:
    """Raise `UserError`, as towers need pairs of processes."""
    raise UserError(
        f"parallel.mode towers: expected an even number of processes, got {world_size}; start it with torchrun "
        "--nproc-per-node 2, for example"
    )


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""Signals that request a stop; Slurm can send SIGUSR1 before a job's time is over (docs/clusters.md)."""
ECHO_S = 1.0
"""Seconds after the first signal in which another one counts as the same request: Slurm sent SIGTERM twice within 13 ms
when it pre-empted a job without a grace time, and torchrun passes on a Ctrl-C that the terminal sends to all anyway."""


class StopSignal:
    """Turns the first of `SIGNALS` into a request to stop; another one ends the process."""

    def __init__(self) -> None:
        self._requested_at: float | None = None
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = perf_counter()
        if self._requested_at is None:
            self._requested_at = now
        elif now - self._requested_at > ECHO_S:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def __call__(self) -> bool:
        """Return True once a stop is requested."""
        return self._requested_at is not None


class StopFlag:
    """Makes all ranks stop after the same step when one of them gets a signal, and save at the same step when one of
    them finds a checkpoint due.

    `check` is called at every step, but ranks communicate only about once a second, as that costs the host a fraction
    of a millisecond. In each exchange they also agree on the number of steps until the next one, by the time that the
    last steps took.
    """

    INTERVAL_S = 1.0

    def __init__(self, distributed: Distributed, requested: Callable[[], bool]) -> None:
        self._distributed, self._requested = distributed, requested
        self._stop = False
        self.sync()

    def sync(self) -> None:
        """Exchange at the next step; for the start of a phase, whose steps take another time than those before."""
        self._steps = self._left = 1
        self._since = perf_counter()

    def check(self, save_due: bool = False) -> tuple[bool, bool]:
        """Return whether to stop, and whether to save. All ranks have to call this at the same steps."""
        if self._distributed.world_size == 1:
            return self._requested(), save_due
        self._left -= 1
        if self._left or self._stop:
            return self._stop, False
        now = perf_counter()
        # At most twice as many steps as last time: the first steps of a phase may be slower or faster than later ones.
        affordable = int(self.INTERVAL_S * self._steps / max(now - self._since, 1e-6))
        interval = max(1, min(affordable, 2 * self._steps))
        stop, save, negative = self._distributed.all_reduce_max(self._requested(), save_due, -interval)
        self._stop, self._since = bool(stop), now
        self._steps = self._left = -negative
        return self._stop, bool(save)
