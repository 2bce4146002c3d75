"""One tower of AlexNet on each of two processes, as on the two GPUs of 2012.

    mesh = Mesh.join(device)                       # under torchrun: world = replicas x 2 towers
    model = TowerAlexNet(config, mesh.peer)        # this process's half of every layer
    logits = mesh.replicated(model)(images)        # of all classes, on both processes

Every layer's outputs are cut in two along their first dimension; each process holds its half of the parameters, and so
of gradients, optimizer state and activations. Inputs of the other tower are needed where the towers meet: conv3, fc6,
fc7 and fc8; the logits are gathered. While the other half travels, a process computes with its own:

    forward      send own x                     | own half of the layer    | other x arrives, its half is added
    backward     gradient of other x, send it   | gradients of own half    | own x's other gradient arrives, is added

Both processes compute the loss from all logits, so its gradient with respect to a process's own logits is whole, and
nothing is exchanged for it.
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
from torch.nn.parallel import DistributedDataParallel

from model.alexnet import AlexNet, AlexNetConfig
from model.peer import TIMEOUT, Peer, Transfer

TOWERS = 2


@dataclass
class Meeting:
    """One exchange of activations in a forward pass, and of their gradients in its backward pass.

    Autograd runs the newest operation that is ready first: in the backward pass `Arrive`, which is younger than the own
    half of the layer, before that, and `Depart`, which is older, behind it.
    """

    peer: Peer
    transfer: Transfer | None = None


class Depart(torch.autograd.Function):
    """Send own activations; backward: receive the rest of their gradient."""

    @staticmethod
    def forward(ctx: Any, own: torch.Tensor, meeting: Meeting) -> torch.Tensor:
        """Returns an empty token, which ties `Arrive` to it in the backward pass."""
        ctx.meeting = meeting
        meeting.transfer = meeting.peer.exchange(own)
        return own.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        """The gradient that the peer computed."""
        return ctx.meeting.transfer.wait(), None


class Arrive(torch.autograd.Function):
    """Receive the other tower's activations; backward: send their gradient."""

    @staticmethod
    def forward(ctx: Any, token: torch.Tensor, meeting: Meeting) -> torch.Tensor:
        """Returns what the peer sent, of the shape of what was sent to it."""
        ctx.meeting = meeting
        assert meeting.transfer is not None, "Depart comes first"
        return meeting.transfer.wait()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        """An empty gradient of the token."""
        ctx.meeting.transfer = ctx.meeting.peer.exchange(grads[0])
        return grads[0].new_empty(0), None


def meet(
    layer: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor],
    own: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    peer: Peer,
) -> torch.Tensor:
    """A layer that is linear in inputs of both towers, tower 0's first: `layer(both, weight, bias)`."""
    meeting = Meeting(peer)
    token = Depart.apply(own, meeting)
    halves = weight.chunk(TOWERS, 1)
    y = layer(own, halves[peer.tower], bias)
    other = Arrive.apply(token, meeting)
    return y + layer(other, halves[1 - peer.tower], None)


class MeetingConv2d(nn.Conv2d):
    """A convolution over the maps of both towers, given this one's."""

    peer: Peer

    def forward(self, own: torch.Tensor) -> torch.Tensor:
        """(N, in_channels / 2, H, W) -> (N, out_channels, H, W)."""
        return meet(
            lambda x, w, b: F.conv2d(x, w, b, padding=self.padding), own, self.weight, self.bias, self.peer
        )


class MeetingLinear(nn.Linear):
    """A fully connected layer over the units of both towers, given this one's."""

    peer: Peer

    def forward(self, own: torch.Tensor) -> torch.Tensor:
        """(N, in_features / 2) -> (N, out_features)."""
        return meet(F.linear, own, self.weight, self.bias, self.peer)


class GatherLogits(torch.autograd.Function):
    """Logits of all classes from both halves; the gradient needs no exchange."""

    @staticmethod
    def forward(ctx: Any, own: torch.Tensor, peer: Peer, classes: int) -> torch.Tensor:
        """(N, own classes) -> (N, classes)."""
        ctx.peer, ctx.classes = peer, classes
        other = peer.exchange(own, torch.Size((len(own), classes - own.shape[1]))).wait()
        return torch.cat([own, other] if peer.tower == 0 else [other, own], 1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """The columns of own classes."""
        return grads[0].tensor_split(TOWERS, 1)[ctx.peer.tower], None, None


class TowerAlexNet(AlexNet):
    """This process's tower; drop-in for `AlexNet` of the same configuration, whose initial weights it takes its part
    of, and whose logits it gives.

    Gradients with respect to images are this tower's part alone. Raises `ValueError` when the network has not two
    towers that meet in conv3.
    """

    def __init__(self, config: AlexNetConfig, peer: Peer) -> None:
        nn.Module.__init__(self)
        if config.num_towers != TOWERS or not config.maps[2]:
            raise ValueError(
                "parallel.placement=towers needs model.towers=2 and a conv3, where the towers meet"
            )
        whole = AlexNet(config).state_dict()  # drawn before anything else is
        self.peer = peer
        _, c2, c3, c4, c5 = config.maps
        maps = [c // TOWERS for c in config.maps]
        self.conv1 = nn.Conv2d(3, maps[0], 11, stride=4, padding=config.padding)
        self.conv2 = nn.Conv2d(maps[0], maps[1], 5, padding=2)
        self.conv3 = MeetingConv2d(c2, maps[2], 3, padding=1)
        self.conv4 = nn.Conv2d(maps[2], maps[3], 3, padding=1) if c4 else None
        self.conv5 = nn.Conv2d(maps[3] or maps[2], maps[4], 3, padding=1) if c5 else None
        self.fc6 = MeetingLinear((c5 or c4 or c3) * 6 * 6, config.fc_dim // TOWERS)
        self.fc7 = MeetingLinear(config.fc_dim, config.fc_dim // TOWERS)
        own_classes = (config.outputs + 1 - peer.tower) // TOWERS  # as tensor_split cuts them
        self.fc8 = MeetingLinear(config.fc_dim, own_classes)
        for layer in (self.conv3, self.fc6, self.fc7, self.fc8):
            layer.peer = peer
        self.set_functions(config, towers=1)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.load_state_dict(split_state(whole, peer.tower))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Raw logits of all classes."""
        own = super().forward(images)
        logits: torch.Tensor = GatherLogits.apply(own, self.peer, self.config.outputs)
        return logits


def split_state(state: Mapping[str, torch.Tensor], tower: int) -> dict[str, torch.Tensor]:
    """A tower's part of a state of the whole network (weights, or velocities by parameter name)."""
    return {name: tensor.tensor_split(TOWERS)[tower] for name, tensor in state.items()}


def join_state(
    state: Mapping[str, torch.Tensor], config: AlexNetConfig, peer: Peer
) -> dict[str, torch.Tensor]:
    """The state of the whole network from both towers' parts, on both processes; both have to call it."""
    with torch.device("meta"):
        whole = AlexNet(config).state_dict()
    joined = {}
    for name, mine in state.items():
        theirs = whole[name].tensor_split(TOWERS)[1 - peer.tower].shape
        other = peer.exchange(mine.detach(), theirs).wait()
        joined[name] = torch.cat([mine, other] if peer.tower == 0 else [other, mine])
    return joined


@dataclass(frozen=True)
class Mesh:
    """Where this process stands among replicas x towers; neighbouring ranks are a pair."""

    peer: Peer
    replica: int
    num_replicas: int
    replica_group: dist.ProcessGroup
    """The processes that hold the same tower."""

    @property
    def groups(self) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
        """Of the pair, and of the same tower."""
        return self.peer.group, self.replica_group

    @classmethod
    def join(cls, device: torch.device, timeout: timedelta = TIMEOUT) -> "Mesh":
        """Meet the other processes of a torchrun. Raises `ValueError` when they are no pairs."""
        if not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
        world = dist.get_world_size()
        if world % TOWERS:
            raise ValueError(f"parallel.placement=towers takes an even number of processes, not {world}")
        replica, tower = divmod(dist.get_rank(), TOWERS)
        # Not `init_device_mesh`, whose groups wait for half an hour. Every process takes part in making every group.
        pairs = [dist.new_group([first, first + 1], timeout) for first in range(0, world, TOWERS)]
        same_tower = [dist.new_group(list(range(first, world, TOWERS)), timeout) for first in range(TOWERS)]
        return cls(Peer(pairs[replica], timeout), replica, world // TOWERS, same_tower[tower])

    def replicated(self, model: nn.Module) -> nn.Module:
        """The model with gradients averaged over replicas, in buckets that travel while others are computed.

        What DDP asks for holds: one backward pass for each forward pass.
        """
        if self.num_replicas == 1:
            return model
        return DistributedDataParallel(model, process_group=self.replica_group, gradient_as_bucket_view=True)

    def share_batch(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The pair's batch, tower 0's half first, from halves of one size that both have loaded: nothing is decoded
        twice."""
        transfers = [self.peer.exchange(images), self.peer.exchange(labels)]
        others = [transfer.wait() for transfer in transfers]
        pairs = zip((images, labels), others, strict=True)
        both = [torch.cat(pair if self.peer.tower == 0 else pair[::-1]) for pair in pairs]
        return both[0], both[1]


def seed_process(*numbers: int) -> None:
    """Seed torch with a stream of its own for every (seed, rank, ...)."""
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    torch.manual_seed(int(state[0] >> 1))


def bytes_per_image(config: AlexNetConfig, element_bytes: int, pixel_bytes: int = 0) -> float:
    """What each process of a pair sends for an image of their batch in one training step: activations where the towers
    meet, forward, and their gradients; logits; half of the pixels, if each loads one half.

    Args:
        config: The network.
        element_bytes: Of an activation on the wire: 4 in float32, 2 in half precision.
        pixel_bytes: Of a colour value of an image on the wire; 0: each process loads the whole batch.
    """
    _, c2, c3, c4, c5 = config.maps
    inputs = c2 * 13 * 13 + (c5 or c4 or c3) * 6 * 6 + 2 * config.fc_dim  # of conv3, fc6, fc7, fc8
    logits = max(4, element_bytes) * config.outputs / TOWERS  # at least float32; the mean of both, if odd
    return element_bytes * inputs + logits + pixel_bytes * 3 * 224 * 224 / TOWERS
