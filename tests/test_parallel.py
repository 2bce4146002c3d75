"""Two towers on two processes, and on two replicas of two, are the network on one device; over gloo, in processes of
their own.

Longer than others: the processes that it starts call functions of this file, which belong beside the tests.
"""

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from model.alexnet import AlexNet, AlexNetConfig
from model.parallel import (
    MeetingConv2d,
    Mesh,
    TowerAlexNet,
    bytes_per_image,
    join_state,
    seed_process,
    split_state,
)
from model.peer import PeerLostError
from train.config import OptimizerConfig
from train.optimizer import PaperSGD

CONFIG = AlexNetConfig(channels=(8, 16, 24, 24, 16), fc_dim=32, num_classes=7, dropout=0)
"""An odd number of classes, so that towers get different halves."""
OTHERS = (
    AlexNetConfig(
        "original", channels=(8, 16, 24, 24, 0), fc_dim=32, num_classes=6, activation="tanh", dropout=0
    ),
    AlexNetConfig("torchvision", towers=2, channels=(8, 16, 24, 0, 16), fc_dim=32, num_classes=3, dropout=0),
    AlexNetConfig(
        channels=(8, 16, 24, 0, 0), fc_dim=32, num_classes=2, lrn="none", pooling="plain", dropout=0
    ),
)
"""Of which one step is compared."""
BATCH, STEPS = 4, 50
RATE = 1e-3


def batch(step: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The images and labels of a step, the same in every process."""
    generator = torch.Generator().manual_seed(step)
    images = 50 * torch.randn(BATCH, 3, 224, 224, generator=generator, dtype=torch.float64)
    return images.to(dtype), torch.randint(CONFIG.num_classes, (BATCH,), generator=generator)


def train(
    network: torch.nn.Module, model: AlexNet, rows: slice, dtype: torch.dtype, steps: int, classes: int = 7
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Take some steps; returns the first one's loss, logits and gradients, and the weights in the end."""
    optimizer = PaperSGD(model.named_parameters(), OptimizerConfig())
    rates = {name: RATE for name, _ in model.named_parameters()}
    first: dict[str, Any] = {}
    for step in range(steps):
        images, labels = (each[rows] for each in batch(step, dtype))
        logits = network(images)
        loss = F.cross_entropy(logits, labels % classes)
        loss.backward()
        if step == 0:
            gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
            first = {"loss": loss.detach(), "logits": logits.detach(), "gradients": gradients}
        optimizer.step(rates)
    return first, {name: p.detach() for name, p in model.named_parameters()}


def work(folder: Path, rank: int, world: int) -> None:
    """One process: everything that is compared with the single device, left in a file."""
    dist.init_process_group("gloo", f"file://{folder}/store", world_size=world, rank=rank)
    mesh = Mesh.join(torch.device("cpu"))
    per_replica = BATCH // mesh.num_replicas
    rows = slice(mesh.replica * per_replica, (mesh.replica + 1) * per_replica)
    found: dict[str, Any] = {"replica": mesh.replica, "tower": mesh.peer.tower}
    for dtype, steps in ((torch.float64, STEPS), (torch.float32, 1)):
        torch.manual_seed(0)
        model = TowerAlexNet(CONFIG, mesh.peer).to(dtype)
        initial = join_state(model.state_dict(), CONFIG, mesh.peer)
        sent = mesh.peer.bytes_sent
        first, weights = train(mesh.replicated(model), model, rows, dtype, steps)
        found["bytes"] = (mesh.peer.bytes_sent - sent) / steps / per_replica
        first["gradients"] = join_state(first["gradients"], CONFIG, mesh.peer)
        found[str(dtype)] = first | {"weights": join_state(weights, CONFIG, mesh.peer), "initial": initial}
    found["others"] = []
    for config in OTHERS:
        torch.manual_seed(0)
        other = TowerAlexNet(config, mesh.peer).double()
        first, _ = train(mesh.replicated(other), other, rows, torch.float64, 1, config.num_classes)
        found["others"].append(join_state(first["gradients"], config, mesh.peer))
    groups = (mesh.peer.group, mesh.replica_group)
    found["timeouts"] = [group._get_backend(torch.device("cpu")).options._timeout.seconds for group in groups]
    found["parameters"] = sum(p.numel() for p in model.parameters())

    # Half precision, on the wire too; what replicas exchange.
    sent, network = mesh.peer.bytes_sent, mesh.replicated(model)
    found["averaged"] = 0

    def average(found: dict[str, Any], bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        found["averaged"] += bucket.buffer().nbytes
        return allreduce_hook(mesh.replica_group, bucket)

    if isinstance(network, DistributedDataParallel):
        network.register_comm_hook(found, average)
    images, labels = (each[rows] for each in batch(0, torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(network(images), labels)
    loss.backward()
    found["half loss"], found["half bytes"] = loss.detach(), (mesh.peer.bytes_sent - sent) / per_replica

    # The pair's batch, of which each has loaded a half.
    images, labels = batch(0, torch.float32)
    half = slice(mesh.peer.tower * BATCH // 2, (mesh.peer.tower + 1) * BATCH // 2)
    shared = mesh.share_batch(images[half].contiguous(memory_format=torch.channels_last), labels[half])
    found["shared"] = torch.equal(shared[0], images) and torch.equal(shared[1], labels)

    # What dropout silences.
    dropped = TowerAlexNet(AlexNetConfig(channels=CONFIG.channels, fc_dim=512, num_classes=7), mesh.peer)
    silent: list[torch.Tensor] = []
    dropped.fc7.register_forward_pre_hook(lambda _, inputs: silent.append(inputs[0] == 0))
    dropped.fc6.bias.data.fill_(1e6)  # so that dropout alone makes zeros
    for _ in range(2):
        seed_process(5, rank)
        dropped(images)
    found["silent"] = silent
    torch.save(found, folder / f"rank{rank}.pt")


def silent_peer(folder: Path, rank: int, world: int, how: str) -> None:
    """Rank 1 leaves or stands still after the first step; rank 0 tells what it notices."""
    dist.init_process_group("gloo", f"file://{folder}/store", world_size=world, rank=rank)
    mesh = Mesh.join(torch.device("cpu"), timedelta(seconds=2))
    network = TowerAlexNet(CONFIG, mesh.peer)
    images, _ = batch(0, torch.float32)
    network(images).sum().backward()
    if rank == 1:
        if how == "stands still":
            time.sleep(60)
        os._exit(0)
    started = time.monotonic()
    try:
        network(images).sum().backward()
    except PeerLostError as error:
        (folder / "told").write_text(f"{time.monotonic() - started:.0f} s: {error}")


def start(work: Callable[..., None], folder: Path, world: int, *more: str) -> list[BaseProcess]:
    """Processes that call a function of this file, forked from one that has imported PyTorch and done nothing with it;
    with one thread each, as there are more of them than cores."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    processes: list[BaseProcess] = [
        context.Process(target=alone, args=(work, folder, rank, world, *more)) for rank in range(world)
    ]
    for process in processes:
        process.start()
    return processes


def alone(work: Callable[..., None], folder: Path, rank: int, *more: object) -> None:
    """Call it; what fails is left in a file."""
    torch.set_num_threads(1)
    try:
        work(folder, rank, *more)
    except BaseException:
        (folder / f"error{rank}").write_text(traceback.format_exc())
        raise


@pytest.fixture(scope="module")
def single() -> Callable[[torch.dtype, slice], dict[str, Any]]:
    """The same training on one device, with the rows in the same order."""
    results: dict[torch.dtype, dict[str, Any]] = {}

    def run(dtype: torch.dtype) -> dict[str, Any]:
        if dtype not in results:
            torch.manual_seed(0)
            model = AlexNet(CONFIG).to(dtype)
            initial = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            first, weights = train(model, model, slice(None), dtype, STEPS if dtype == torch.float64 else 1)
            images, labels = batch(0, dtype)
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                half = F.cross_entropy(model(images), labels)
            results[dtype] = first | {"weights": weights, "initial": initial, "half loss": half}
        return results[dtype]

    return run  # type: ignore[return-value]


def assert_close(got: torch.Tensor, expected: torch.Tensor, bound: float) -> None:
    """max|a - b| <= bound max|b|."""
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= bound * expected.abs().max()


@pytest.mark.parametrize("world", [2, 4])
def test_towers_are_the_network_on_one_device(tmp_path: Path, world: int, single: Any) -> None:
    """Loss, logits and every gradient within 1e-11 of the largest in float64, 1e-4 in float32; weights after 50 steps
    within 1e-9; the same initial weights to the bit; half of the parameters; as many bytes as the formula says;
    independent dropout."""
    for rank, process in enumerate(start(work, tmp_path, world)):
        process.join(200)
        assert process.exitcode == 0, (tmp_path / f"error{rank}").read_text()
    found = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(world)]
    assert [(each["replica"], each["tower"]) for each in found] == [(r // 2, r % 2) for r in range(world)]
    replicas = world // 2
    for dtype, bound in ((torch.float64, 1e-11), (torch.float32, 1e-4)):
        expected = single(dtype)
        for each in found:
            got = each[str(dtype)]
            rows = slice(each["replica"] * BATCH // replicas, (each["replica"] + 1) * BATCH // replicas)
            assert_close(got["logits"], expected["logits"][rows], bound)
            for name, gradient in expected["gradients"].items():
                assert_close(got["gradients"][name], gradient, bound)
            for name, weight in expected["weights"].items():
                assert torch.equal(got["initial"][name], expected["initial"][name])
                assert_close(got["weights"][name], weight, max(bound, 1e-9))
            assert all(
                torch.equal(got["weights"][name], found[0][str(dtype)]["weights"][name])
                for name in got["weights"]
            )
        losses = [found[rank][str(dtype)]["loss"] for rank in range(0, world, 2)]
        assert_close(torch.stack(losses).mean(), expected["loss"], bound)

    whole = sum(p.numel() for p in AlexNet(CONFIG).parameters())
    for first, second in zip(found[::2], found[1::2], strict=True):
        assert first["parameters"] + second["parameters"] == whole
        assert abs(first["parameters"] / whole - 0.5) < 0.02
        # The last dtype was float32.
        assert (first["bytes"] + second["bytes"]) / 2 == bytes_per_image(CONFIG, 4)
        assert (first["half bytes"] + second["half bytes"]) / 2 == bytes_per_image(CONFIG, 2)
    halves = torch.stack([found[rank]["half loss"] for rank in range(0, world, 2)])
    assert_close(halves.mean(), single(torch.float32)["half loss"], 0.01)
    assert all(each["averaged"] == (4 * each["parameters"] if replicas > 1 else 0) for each in found)
    assert all(each["timeouts"] == [45, 45] and each["shared"] for each in found)
    for number, config in enumerate(OTHERS):
        torch.manual_seed(0)
        model = AlexNet(config).double()
        expected, _ = train(model, model, slice(None), torch.float64, 1, config.num_classes)
        for each in found:
            for name, gradient in expected["gradients"].items():
                assert_close(each["others"][number][name], gradient, 1e-11)
    masks = [each["silent"] for each in found]
    for once, again in masks:
        assert torch.equal(once, again) and abs(once.float().mean() - 0.5) < 0.05
    for n, (one, _) in enumerate(masks):
        assert all(abs((one == other).float().mean() - 0.5) < 0.05 for other, _ in masks[:n])


@pytest.mark.parametrize("how", ["leaves", "stands still"])
def test_lost_peer(tmp_path: Path, how: str) -> None:
    """A process whose peer has died, or is silent for longer than the timeout, says so and stops."""
    first, second = start(silent_peer, tmp_path, 2, how)
    first.join(60)
    second.kill()
    told = (tmp_path / "told").read_text()
    assert "rank 1" in told and "gone or has been silent" in told


class Log(TorchDispatchMode):
    """Notes convolutions, forward and backward, among other events."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation."""
        if "convolution" in func.__name__:
            inputs = args[1] if "backward" in func.__name__ else args[0]
            kind = "backward" if "backward" in func.__name__ else "forward"
            self.events.append(f"{kind} {'own' if float(inputs.flatten()[0]) == 1 else 'other'}")
        return func(*args, **(kwargs or {}))


class FakePeer:
    """Sends twos, and notes when it is asked to."""

    tower = 0

    def __init__(self, events: list[str]) -> None:
        self.events = events

    def exchange(self, mine: torch.Tensor) -> "FakePeer":
        """Begin."""
        self.events.append("send")
        self.shape = mine.shape
        return self

    def wait(self) -> torch.Tensor:
        """End."""
        self.events.append("wait")
        return torch.full(self.shape, 2.0)


def test_sends_travel_while_the_own_half_is_computed() -> None:
    """Forward: sent before the own half, received before the other. Backward: the other's gradient first, sent before
    the own half's, received behind it."""
    log = Log()
    layer = MeetingConv2d(4, 3, 3, padding=1)
    layer.peer = FakePeer(log.events)  # type: ignore[assignment]
    own = torch.ones(2, 2, 5, 5, requires_grad=True)
    with log:
        layer(own * 1).sum().backward()
    assert log.events == [
        "send", "forward own", "wait", "forward other",
        "backward other", "send", "backward own", "wait",
    ]  # fmt: skip
    assert own.grad is not None


def test_states_split_and_are_refused() -> None:
    """Parts of a state make the whole again; networks whose towers do not meet in conv3 are refused."""
    state = AlexNet(CONFIG).state_dict()
    parts = [split_state(state, tower) for tower in (0, 1)]
    for name, tensor in state.items():
        assert torch.equal(torch.cat([part[name] for part in parts]), tensor)
    for config in (AlexNetConfig(towers=1), AlexNetConfig(channels=(96, 256, 0, 384, 256))):
        with pytest.raises(ValueError, match="where the towers meet"):
            TowerAlexNet(config, FakePeer([]))  # type: ignore[arg-type]


def test_bytes_of_the_full_network() -> None:
    """By hand: 43,264 values of conv2 pooled, 9,216 of conv5, twice 4,096 units, and 500 logits."""
    config = AlexNetConfig()
    assert bytes_per_image(config, 2) == 2 * (256 * 169 + 9216 + 2 * 4096) + 4 * 500
    assert bytes_per_image(config, 2, pixel_bytes=1) - bytes_per_image(config, 2) == 75_264
