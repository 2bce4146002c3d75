"""Where this process stands among those that torchrun or srun started, and which part of the network it holds."""

import math
import os
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import nn
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
from pipeline.loader import Batch
from pipeline.shards import DataError
from train.config import ParallelConfig
from train.launch import find_task
from train.program import DATA_FAILED, WRONG_INPUT, report_to_torchrun

State = dict[str, torch.Tensor]
T = TypeVar("T")


class Placement:
    """This process's place; alone, it holds everything and exchanges nothing."""

    def __init__(self, config: ParallelConfig, device: torch.device) -> None:
        """Meet the other processes. Raises `ValueError` when their number does not fit."""
        self.rank, self.world = find_task(os.environ)[:2]
        towers = config.placement == "towers"
        if towers and self.world % TOWERS:
            raise ValueError(
                f"parallel.placement=towers takes an even number of processes, not {self.world}; start it with "
                "torchrun --nproc-per-node 2, for example"
            )
        if self.world > 1:
            if device.type == "cuda":
                torch.cuda.set_device(device)  # where NCCL takes what is on no device of its own
            store, rank, world = next(dist.rendezvous("env://", timeout=TIMEOUT))
            # torchrun keeps one store through restarts; the addresses of the dead still stand in it (pytorch#135712).
            attempt = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
            backend = "nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=attempt, rank=rank, world_size=world, timeout=TIMEOUT)
            self._control = dist.new_group(backend="gloo", timeout=TIMEOUT)
        self._mesh = TowerMesh.create() if towers else None
        mesh = self._mesh
        self.replica, self.num_replicas = (
            (mesh.replica, mesh.num_replicas) if mesh else (self.rank, self.world)
        )
        self.loader_rank, self.num_loader_ranks = self.rank, self.world

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes and tells."""
        return self.rank == 0

    @property
    def where(self) -> str:
        """This process, for people."""
        return f"process {self.rank} on {platform.node()}"

    def loader_batch(self, batch_size: int) -> int:
        """Images that this process loads for an update, which `check_batch` has seen."""
        return batch_size // self.num_loader_ranks

    def check_batch(self, batch_size: int, accumulate: int, images_per_crop: int, num_images: int) -> None:
        """Raise `ValueError`, with sizes that work, where the images of an update cannot be shared out equally: over
        the processes that load them, in groups with one window, and in the passes of a replica."""
        unit = math.lcm(self.num_loader_ranks * images_per_crop, self.num_replicas * accumulate)
        most = num_images // self.num_loader_ranks * self.num_loader_ranks // unit * unit
        shared = f"{self.num_loader_ranks} processes" if self.num_loader_ranks > 1 else ""
        shared += f"{' and ' * bool(shared)}data.augmentation.images_per_crop {images_per_crop}" * (
            images_per_crop > 1
        )
        shared += f"{' and ' * bool(shared)}train.accumulate {accumulate}" * (accumulate > 1)
        if not most:
            raise ValueError(
                f"{num_images} training images do not fill the smallest batch, {unit}, for {shared}; take fewer "
                "processes or a smaller data.augmentation.images_per_crop"
            )
        if batch_size > most:
            raise ValueError(
                f"{num_images} training images do not fill a batch of {batch_size}; train.batch_size can be {most}"
            )
        if batch_size % unit:
            fitting = [
                str(size)
                for size in (batch_size // unit * unit, -(-batch_size // unit) * unit)
                if size <= most
            ]
            remedy = f"take {' or '.join(size for size in fitting if size != '0')}"
            if (
                images_per_crop > 1
                and batch_size % math.lcm(self.num_loader_ranks, self.num_replicas * accumulate) == 0
            ):
                smaller = math.gcd(images_per_crop, batch_size // self.num_loader_ranks)
                remedy += f", or data.augmentation.images_per_crop {smaller}"
            raise ValueError(
                f"train.batch_size ({batch_size}) has to be a multiple of {unit} for {shared}; {remedy}"
            )

    def build(self, config: AlexNetConfig, seed: int) -> AlexNet:
        """This process's part of the network, the same initial weights everywhere; then seed dropout, differently."""
        torch.manual_seed(seed)
        model = TowerAlexNet(config, self._mesh) if self._mesh else AlexNet(config)
        if self.world > 1:
            seed_process(seed, self.rank)
        return model

    def replicated(self, network: nn.Module) -> nn.Module:
        """The network with gradients averaged over replicas."""
        if self._mesh:
            return self._mesh.wrap_ddp(network)
        return DistributedDataParallel(network, gradient_as_bucket_view=True) if self.world > 1 else network

    def exchanging(self, network: nn.Module, wanted: bool) -> AbstractContextManager[None]:
        """In this block `backward` averages gradients over replicas only if `wanted`."""
        if wanted or not isinstance(network, DistributedDataParallel):
            return nullcontext()
        return network.no_sync()

    def share(self, batch: Batch) -> Batch:
        """What the network gets from what was loaded: with the other tower's half, if each loads one."""
        return Batch(*self._mesh.gather_batch(*batch)) if self._mesh else batch

    def whole(self, state: State, config: AlexNetConfig) -> State:
        """A state (weights or velocities) of this process's part, in the single-device layout. All have to ask."""
        return gather_state_dict(state, config, self._mesh) if self._mesh else state

    def part(self, state: State) -> State:
        """The inverse."""
        return shard_state_dict(state, self._mesh.tower) if self._mesh else state

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over replicas; a new tensor."""
        total = tensor.clone()
        if self.num_replicas > 1:
            dist.all_reduce(total, group=self._mesh.replica_group if self._mesh else None)
        return total

    def total_over_parts(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over the parts of one network: the towers of a pair; a new tensor."""
        total = tensor.clone()
        if self._mesh:
            dist.all_reduce(total)
            total /= self.num_replicas  # whose gradients are the same
        return total

    def any_on_device(self, flag: torch.Tensor) -> torch.Tensor:
        """Whether a bool on the device is true in any process, without waiting for it; a new tensor."""
        told = flag.float()
        if self.world > 1:
            dist.all_reduce(told, dist.ReduceOp.MAX)
        return told > 0

    def any(self, flag: bool) -> bool:
        """Whether it is so in any process. All have to ask."""
        return bool(self.largest(int(flag))[0])

    def largest(self, *numbers: int) -> list[int]:
        """The largest of each number over all processes, who all have to ask."""
        if self.world == 1:
            return list(numbers)
        told = torch.tensor(numbers)
        dist.all_reduce(told, dist.ReduceOp.MAX, group=self._control)
        return [int(number) for number in told.tolist()]

    def gather(self, mine: Any) -> list[Any]:
        """What every process has, by rank, on all of them; pickled between processes of one run, never from a file."""
        if self.world == 1:
            return [mine]
        everyone = [None] * self.world
        dist.all_gather_object(everyone, mine, group=self._control)
        return everyone

    def together(self, work: Callable[[], T]) -> T:
        """Do something in every process. Where it fails in one, that one's error is raised in the first process, and
        the others leave quietly with it."""
        if self.world == 1:
            return work()
        result, error = None, None
        try:
            result = work()
        except (ValueError, OSError, DataError) as raised:
            error = raised
        errors = [(where, each) for where, each in self.gather((self.where, error)) if each is not None]
        if not errors:
            return cast(T, result)
        where, first = errors[0]
        if not self.is_first:
            report_to_torchrun(str(first))
            sys.exit(DATA_FAILED if isinstance(first, DataError) else WRONG_INPUT)
        if len(errors) < self.world and getattr(first, "errno", None) is None:
            raise type(first)(f"{where}: {first}")
        raise first

    def first_does(self, work: Callable[[], None]) -> None:
        """Let the first process do something; where it fails, the others leave quietly with it."""
        self.together(work if self.is_first else lambda: None)

    def agree(self, facts: dict[str, Any]) -> None:
        """Check that facts are the same in every process. Raises `ValueError` that names the first that is not, and
        where."""
        (first, expected), *others = self.gather((self.where, facts))
        differing = [
            f"{name} is {theirs[name]} in {where}, {expected[name]} in {first}"
            for where, theirs in others
            for name in expected
            if theirs[name] != expected[name]
        ]
        if differing:
            if not self.is_first:
                sys.exit(WRONG_INPUT)
            more = f" ({len(differing) - 1} more such)" if len(differing) > 1 else ""
            raise ValueError(f"the processes differ: {differing[0]}{more}; start all of them alike")

    def leave(self) -> None:
        """Part from the others."""
        if self.world > 1:
            dist.destroy_process_group()


@contextmanager
def lost_processes_told() -> Iterator[None]:
    """Turn what a backend raises when another process is gone into `DataError`: the run cannot go on."""
    try:
        yield
    except RuntimeError as error:
        told = any(word in str(error).lower() for word in ("gloo", "nccl", "connection", "timed out", "peer"))
        told = told or isinstance(error, dist.DistError)
        if find_task(os.environ).world == 1 or isinstance(error, DataError) or not told:
            raise
        line = str(error).splitlines()[0]  # without the place in the backend's source
        reason = line.rpartition(".cc:")[2].partition("] ")[2].partition(". ")[0] or line
        raise DataError(
            f"another process is gone or has been silent for {TIMEOUT.seconds} s; what it said last tells why "
            f"({reason}); the same command goes on from the last checkpoint"
        ) from None
