"""One tower of AlexNet on each of two processes, as on the two GPUs of 2012.

    mesh = TowerMesh.create()                # torch.distributed is initialized: world = replicas x 2 towers
    model = TowerAlexNet(config, mesh)       # this process's half of every layer
    logits = mesh.wrap_ddp(model)(images)    # of all classes, on both processes

Every layer's output channels or units are split between the two processes; each holds its half of the parameters, and
so of gradients, optimizer state and activations. Where the towers meet (conv3, fc6, fc7, fc8), a layer also needs the
other tower's inputs. They are sent while the process computes with its own:

    forward      start sending own x                    | layer of own half         | wait, add the layer of other x
    backward     gradient of other x, start sending it  | gradients of own half     | wait, add the gradient of own x

The exchange is a functional collective (an all-to-all in which a process sends nothing to itself), so torch.compile
compiles the whole model (with `COMPILE_OPTIONS` in this order). Both processes compute the loss from all logits, so the
gradient with respect to a process's own logits is complete, and no exchange is needed for it.

Shapes: N images, C channels of this tower, H, W, K classes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed._functional_collectives import wait_tensor
from torch.nn.parallel import DistributedDataParallel

from model.alexnet import AlexNet, AlexNetConfig

TOWERS = 2
TIMEOUT = timedelta(seconds=45)
"""Longest wait for another process."""
MEETINGS = ("conv3", "fc6", "fc7", "fc8")
"""Layers that see both towers."""
COMPILE_OPTIONS: dict[str, Any] = {
    "reorder_for_compute_comm_overlap": True,
    "reorder_for_compute_comm_overlap_passes": ["raise_comms", "sink_waits"],
}
"""Options for torch.compile; without them Inductor waits for an exchange immediately after its start."""


@dataclass(frozen=True)
class TowerMesh:
    """Position of this process among replicas x towers; neighbouring ranks are a pair."""

    tower: int
    pair_group: dist.ProcessGroup
    """The two processes of a replica."""
    replica: int
    num_replicas: int
    replica_group: dist.ProcessGroup
    """The processes that hold the same tower."""

    @classmethod
    def create(cls, timeout: timedelta = TIMEOUT) -> "TowerMesh":
        """Make the process groups. All processes call this together; their number has to be even."""
        world = dist.get_world_size()
        replica, tower = divmod(dist.get_rank(), TOWERS)
        # Not `init_device_mesh`, whose timeout is half an hour. Every process has to call `new_group` for every group.
        pairs = [dist.new_group([first, first + 1], timeout) for first in range(0, world, TOWERS)]
        same_tower = [dist.new_group(list(range(first, world, TOWERS)), timeout) for first in range(TOWERS)]
        return cls(tower, pairs[replica], replica, world // TOWERS, same_tower[tower])

    def wrap_ddp(self, model: nn.Module) -> nn.Module:
        """Wrap a model so that gradients are averaged over replicas, in buckets that are sent while others are
        computed. As always with DDP, each forward pass needs one backward pass."""
        if self.num_replicas == 1:
            return model
        # Else Dynamo splits the compiled model between buckets, and also an exchange, which makes gradients wrong.
        torch._dynamo.config.optimize_ddp = False
        return DistributedDataParallel(model, process_group=self.replica_group, gradient_as_bucket_view=True)

    def start_exchange(self, own: torch.Tensor, other_rows: int) -> torch.Tensor:
        """Send a tensor to the other tower; returns that tower's, of `other_rows` rows, to be used after
        `wait_tensor`."""
        send, receive = [0, 0], [0, 0]
        send[1 - self.tower], receive[1 - self.tower] = own.shape[0], other_rows
        received: torch.Tensor = torch.ops._c10d_functional.all_to_all_single(
            own.contiguous(), receive, send, self.pair_group.group_name
        )
        return received

    def all_gather(self, own: torch.Tensor, rows: int) -> torch.Tensor:
        """Concatenate both towers' rows, tower 0's first, `rows` in all. The gradient is that of own rows alone."""
        other = wait_tensor(self.start_exchange(own.detach(), rows - own.shape[0]))
        return torch.cat([own, other] if self.tower == 0 else [other, own])

    def gather_batch(
        self, images_NCHW: torch.Tensor, labels_N: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Concatenate the halves of a batch that the two processes have loaded, tower 0's first."""
        rows = TOWERS * len(labels_N)
        images_NHWC = self.all_gather(images_NCHW.permute(0, 2, 3, 1), rows)
        return images_NHWC.permute(0, 3, 1, 2), self.all_gather(labels_N, rows)


class StartExchange(torch.autograd.Function):
    """Start to exchange activations; backward: wait for their gradient.

    In the backward pass autograd runs the newest operation that is ready first: `FinishExchange`, which is newer than
    the layer of the own half, runs before that layer, and `StartExchange`, which is older, after it.
    """

    @staticmethod
    def forward(ctx: Any, own: torch.Tensor, mesh: TowerMesh) -> torch.Tensor:
        """Return the other tower's activations, which must not be used before `wait_tensor`."""
        return mesh.start_exchange(own, own.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Wait for the gradient that the other tower has computed."""
        return wait_tensor(grads[0]), None


class FinishExchange(torch.autograd.Function):
    """Wait for the other tower's activations; backward: start to exchange their gradients."""

    @staticmethod
    def forward(ctx: Any, other: torch.Tensor, mesh: TowerMesh) -> torch.Tensor:
        """Return the other tower's activations once they have arrived."""
        ctx.mesh = mesh
        return wait_tensor(other)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Return the gradient of own activations, which must not be used before `wait_tensor`."""
        return ctx.mesh.start_exchange(grads[0], grads[0].shape[0]), None


def apply_to_both(
    layer: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor],
    own: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    mesh: TowerMesh,
) -> torch.Tensor:
    """Apply a layer that is linear in the inputs of both towers, `layer(inputs, weight, bias)`, given own inputs."""
    coming = StartExchange.apply(own, mesh)
    halves = weight.chunk(TOWERS, 1)
    y = layer(own, halves[mesh.tower], bias)
    other = FinishExchange.apply(coming, mesh)
    return y + layer(other, halves[1 - mesh.tower], None)


class TowerConv2d(nn.Conv2d):
    """A convolution over the channels of both towers, given those of this tower."""

    mesh: TowerMesh

    def forward(self, own_NCHW: torch.Tensor) -> torch.Tensor:
        """Convolve (N, in_channels / 2, H, W), in channels-last memory, to (N, out_channels, H, W)."""

        def convolve(x_NHWC: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            return F.conv2d(x_NHWC.permute(0, 3, 1, 2), weight, bias, padding=self.padding)

        return apply_to_both(convolve, own_NCHW.permute(0, 2, 3, 1), self.weight, self.bias, self.mesh)


class TowerLinear(nn.Linear):
    """A fully connected layer over the units of both towers, given those of this tower."""

    mesh: TowerMesh

    def forward(self, own_NC: torch.Tensor) -> torch.Tensor:
        """Map (N, in_features / 2) to (N, out_features)."""
        return apply_to_both(F.linear, own_NC, self.weight, self.bias, self.mesh)


class TowerAlexNet(AlexNet):
    """This process's tower of an `AlexNet`, with the same initial weights and the same logits.

    Gradients with respect to images are those of this tower alone. Raises `ValueError` unless the network has two
    towers that meet in conv3.
    """

    def __init__(self, config: AlexNetConfig, mesh: TowerMesh) -> None:
        super().__init__(config)  # draws the weights of both towers, so that they are those of `AlexNet`
        if config.num_towers != TOWERS or not self.conv3:
            raise ValueError("parallel.mode towers needs model.towers=2 and a conv3, where the towers meet")
        self.mesh, self.towers = mesh, 1
        state = shard_state_dict(self.state_dict(), mesh.tower)
        for name, whole in list(self.named_children()):
            rows, columns = state[f"{name}.weight"].shape[:2]
            if isinstance(whole, nn.Conv2d):
                conv = TowerConv2d if name in MEETINGS else nn.Conv2d
                layer: nn.Module = conv(columns, rows, whole.kernel_size, whole.stride, whole.padding)  # type: ignore[arg-type]
            else:
                layer = TowerLinear(columns, rows)
            layer.mesh = mesh  # type: ignore[assignment]
            setattr(self, name, layer)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.load_state_dict(state)

    def forward(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        """Compute raw logits of all classes, (N, K)."""
        own_NK = super().forward(images_NCHW)
        return self.mesh.all_gather(own_NK.T, self.config.outputs).T


def shard_state_dict(state: Mapping[str, torch.Tensor], tower: int) -> dict[str, torch.Tensor]:
    """Return one tower's part of the state of the whole network (weights, or velocities by parameter name)."""
    return {name: tensor.tensor_split(TOWERS)[tower] for name, tensor in state.items()}


def gather_state_dict(
    state: Mapping[str, torch.Tensor], config: AlexNetConfig, mesh: TowerMesh
) -> dict[str, torch.Tensor]:
    """Gather the state of the whole network from both towers' parts; both processes call this, and both get it."""
    with torch.device("meta"):
        whole = AlexNet(config).state_dict()
    return {name: mesh.all_gather(own.detach(), len(whole[name])) for name, own in state.items()}


def seed_process(*numbers: int) -> None:
    """Seed torch with an independent random stream for every (seed, rank, ...)."""
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    torch.manual_seed(int(state[0] >> 1))
