"""Where this process stands among those that torchrun started, and which part of the network it holds."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from model.alexnet import AlexNet, AlexNetConfig
from model.parallel import TOWERS, Mesh, TowerAlexNet, join_state, seed_process, split_state
from model.peer import TIMEOUT, PeerLostError, reason_of
from pipeline.loader import Batch
from pipeline.shards import DataError
from train.program import WRONG_INPUT

State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class ParallelConfig:
    """How a run is spread over the processes of a torchrun."""

    placement: Literal["single", "towers"] = "single"
    """single: the whole network in every process, gradients are averaged. towers: one tower in each of two neighbouring
    processes, gradients are averaged over such pairs; docs/towers.md tells when that pays."""
    share_images: bool = True
    """towers: each process of a pair decodes half of their images and sends them to the other; false: both decode
    all of them."""


class Placement:
    """This process's place; alone, it holds everything and exchanges nothing."""

    def __init__(self, config: ParallelConfig, device: torch.device) -> None:
        """Meet the other processes. Raises `ValueError` when their number does not fit."""
        self.rank, self.world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        towers = config.placement == "towers"
        if towers and self.world % TOWERS:
            raise ValueError(
                f"parallel.placement=towers takes an even number of processes, not {self.world}; start it with "
                "torchrun --nproc-per-node 2, for example"
            )
        if self.world > 1:
            if device.type == "cuda":
                torch.cuda.set_device(device)  # where NCCL takes what is on no device of its own
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
            self._control = dist.new_group(backend="gloo", timeout=TIMEOUT)
        self._mesh = Mesh.join(device) if towers else None
        mesh = self._mesh
        self.replica, self.num_replicas = (mesh.replica, mesh.num_replicas) if mesh else (self.rank, self.world)
        self._shares = towers and config.share_images
        self.loader_rank = self.rank if self._shares else self.replica
        self.num_loader_ranks = self.world if self._shares else self.num_replicas

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes and tells."""
        return self.rank == 0

    def loader_batch(self, batch_size: int) -> int:
        """Images that this process loads for an update. Raises `ValueError` when the processes cannot share them."""
        if batch_size % self.num_loader_ranks:
            raise ValueError(
                f"train.batch_size ({batch_size}) does not divide by {self.num_loader_ranks} processes that load "
                "images; take a multiple"
            )
        return batch_size // self.num_loader_ranks

    def build(self, config: AlexNetConfig, seed: int) -> AlexNet:
        """This process's part of the network, the same initial weights everywhere; then seed dropout, differently."""
        torch.manual_seed(seed)
        model = TowerAlexNet(config, self._mesh.peer) if self._mesh else AlexNet(config)
        if self.world > 1:
            seed_process(seed, self.rank)
        return model

    def replicated(self, network: nn.Module) -> nn.Module:
        """The network with gradients averaged over replicas."""
        if self._mesh:
            return self._mesh.replicated(network)
        return DistributedDataParallel(network, gradient_as_bucket_view=True) if self.world > 1 else network

    def share(self, batch: Batch) -> Batch:
        """What the network gets from what was loaded: with the other tower's half, if each loads one."""
        return Batch(*self._mesh.share_batch(*batch)) if self._mesh and self._shares else batch

    def whole(self, state: State, config: AlexNetConfig) -> State:
        """A state (weights or velocities) of this process's part, in the single-device layout. All have to ask."""
        return join_state(state, config, self._mesh.peer) if self._mesh else state

    def part(self, state: State) -> State:
        """The inverse."""
        return split_state(state, self._mesh.peer.tower) if self._mesh else state

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over replicas; a new tensor."""
        total = tensor.clone()
        if self.num_replicas > 1:
            dist.all_reduce(total, group=self._mesh.replica_group if self._mesh else None)
        return total

    def any(self, flag: bool) -> bool:
        """Whether it is so in any process. All have to ask."""
        if self.world == 1:
            return flag
        told = torch.tensor(int(flag))
        dist.all_reduce(told, dist.ReduceOp.MAX, group=self._control)
        return bool(told)

    def gather(self, mine: Any) -> list[Any]:
        """What every process has, by rank, on all of them."""
        if self.world == 1:
            return [mine]
        everyone = [None] * self.world
        dist.all_gather_object(everyone, mine, group=self._control)
        return everyone

    def first_does(self, work: Callable[[], None]) -> None:
        """Let the first process do something; where it raises, the others leave quietly with it."""
        error = None
        if self.is_first:
            try:
                work()
            except (ValueError, OSError) as raised:
                error = raised
        if self.any(error is not None):
            if error:
                raise error
            sys.exit(WRONG_INPUT)

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
        alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
        if alone or isinstance(error, DataError) or not (told or isinstance(error, dist.DistError)):
            raise
        reason = str(error)
        if not isinstance(error, PeerLostError):
            reason = (
                f"another process is gone or has been silent for {TIMEOUT.seconds} s; what it said last tells why "
                f"({reason_of(error)})"
            )
        raise DataError(f"{reason}; the same command goes on from the last checkpoint") from None
