"""Two towers on two processes, and on two replicas of two, are the network on one device; over gloo, in real
processes."""

import multiprocessing
import os
import re
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._inductor.utils import run_fw_bw_and_get_code
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from model.alexnet import AlexNet, AlexNetConfig
from model.towers import (
    COMPILE_OPTIONS,
    TowerAlexNet,
    TowerMesh,
    gather_state_dict,
    seed_process,
    shard_state_dict,
)
from train.config import OptimizerConfig
from train.optimizer import AlexNetSGD

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


def batch(step: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The images and labels of a step, the same in every process."""
    generator = torch.Generator().manual_seed(step)
    images = 50 * torch.randn(BATCH, 3, 224, 224, generator=generator, dtype=torch.float64)
    return images.to(dtype), torch.randint(CONFIG.num_classes, (BATCH,), generator=generator)


def train(
    network: torch.nn.Module, model: AlexNet, rows: slice, dtype: torch.dtype, steps: int
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Take some steps; returns the first one's loss, logits and gradients, and the weights in the end."""
    optimizer = AlexNetSGD(model.named_parameters(), OptimizerConfig())
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    first: dict[str, Any] = {}
    for step in range(steps):
        images, labels = (each[rows] for each in batch(step, dtype))
        logits = network(images)
        loss = F.cross_entropy(logits, labels % model.config.outputs)
        loss.backward()
        if step == 0:
            gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
            first = {"loss": loss.detach(), "logits": logits.detach(), "gradients": gradients}
        optimizer.step()
    return first, {name: p.detach() for name, p in model.named_parameters()}


class Log(TorchDispatchMode):
    """Notes exchanges and convolutions (those of own inputs have a bias), and the bytes that are sent."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[str] = []
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation."""
        name = func.__name__.partition(".")[0]
        if name == "all_to_all_single":
            self.bytes += args[0].nbytes
        if name == "convolution":
            name = f"forward {'own' if args[2] is not None else 'other'}"
        if name == "convolution_backward":
            name = f"backward {'own' if args[-1][2] else 'other'}"
        self.events.append(name)
        return func(*args, **(kwargs or {}))


def work(folder: Path, rank: int, world: int) -> None:
    """One process: everything that is compared with the single device, left in a file."""
    dist.init_process_group("gloo", f"file://{folder}/store", world_size=world, rank=rank)
    mesh = TowerMesh.create()
    per_replica = BATCH // mesh.num_replicas
    rows = slice(mesh.replica * per_replica, (mesh.replica + 1) * per_replica)
    found: dict[str, Any] = {"replica": mesh.replica, "tower": mesh.tower}
    for dtype, steps in ((torch.float64, STEPS), (torch.float32, 1)):
        torch.manual_seed(0)
        model = TowerAlexNet(CONFIG, mesh).to(dtype)
        initial = gather_state_dict(model.state_dict(), CONFIG, mesh)
        first, weights = train(mesh.wrap_ddp(model), model, rows, dtype, steps)
        first["gradients"] = gather_state_dict(first["gradients"], CONFIG, mesh)
        found[str(dtype)] = first | {
            "weights": gather_state_dict(weights, CONFIG, mesh),
            "initial": initial,
        }
    found["others"] = []
    for config in OTHERS:
        torch.manual_seed(0)
        other = TowerAlexNet(config, mesh).double()
        first, _ = train(mesh.wrap_ddp(other), other, rows, torch.float64, 1)
        found["others"].append(gather_state_dict(first["gradients"], config, mesh))
    groups = (mesh.pair_group, mesh.replica_group)
    found["timeouts"] = [group._get_backend(torch.device("cpu")).options._timeout.seconds for group in groups]
    found["parameters"] = sum(p.numel() for p in model.parameters())

    # What is sent, in both precisions, and what replicas exchange.
    network = mesh.wrap_ddp(model)
    found["averaged"], found["sent"] = 0, []

    def average(found: dict[str, Any], bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        found["averaged"] += bucket.buffer().nbytes
        return allreduce_hook(mesh.replica_group, bucket)

    if isinstance(network, DistributedDataParallel):
        network.register_comm_hook(found, average)
    images, labels = (each[rows] for each in batch(0, torch.float32))
    for half in (False, True):
        with Log() as log:
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                loss = F.cross_entropy(network(images), labels)
            loss.backward()
        found["sent"].append(log.bytes / per_replica)
    found["half loss"] = loss.detach()

    # The pair's batch, of which each has loaded a half.
    images, labels = batch(0, torch.float32)
    own = slice(mesh.tower * BATCH // 2, (mesh.tower + 1) * BATCH // 2)
    gathered = mesh.gather_batch(images[own].contiguous(memory_format=torch.channels_last), labels[own])
    found["gathered"] = torch.equal(gathered[0], images) and torch.equal(gathered[1], labels)

    # What dropout silences.
    dropped = TowerAlexNet(AlexNetConfig(channels=CONFIG.channels, fc_dim=512, num_classes=7), mesh)
    silent: list[torch.Tensor] = []
    dropped.fc7.register_forward_pre_hook(lambda _, inputs: silent.append(inputs[0] == 0))
    dropped.fc6.bias.data.fill_(1e6)  # so that dropout alone makes zeros
    for _ in range(2):
        seed_process(5, rank)
        dropped(images)
    found["silent"] = silent
    torch.save(found, folder / f"rank{rank}.pt")


def compile_tower(folder: Path, rank: int, world: int, backend: str) -> None:
    """One process: the same step eager and compiled, in replicas whose gradients travel in several buckets."""
    dist.init_process_group("gloo", f"file://{folder}/store", world_size=world, rank=rank)
    mesh = TowerMesh.create()
    dist._DEFAULT_FIRST_BUCKET_BYTES = 1000  # type: ignore[attr-defined]
    torch.manual_seed(0)
    model = TowerAlexNet(CONFIG, mesh)
    options = COMPILE_OPTIONS if backend == "inductor" else None
    compiled = torch.compile(model, backend=backend, options=options, fullgraph=True, dynamic=False)
    images, labels = batch(0, torch.float32)
    found = []
    for network in (model, compiled):
        model.zero_grad()
        F.cross_entropy(mesh.wrap_ddp(network)(images), labels).backward()  # type: ignore[arg-type]
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    torch.save(found, folder / f"rank{rank}.pt")


def lose_peer(folder: Path, rank: int, world: int, how: str) -> None:
    """Rank 1 leaves or stands still after the first step; rank 0 writes what it notices."""
    dist.init_process_group("gloo", f"file://{folder}/store", world_size=world, rank=rank)
    network = TowerAlexNet(CONFIG, TowerMesh.create(timedelta(seconds=2)))
    images, _ = batch(0, torch.float32)
    network(images).sum().backward()
    if rank == 1:
        if how == "stands still":
            time.sleep(60)
        os._exit(0)
    try:
        network(images).sum().backward()
    except RuntimeError as error:
        (folder / "error").write_text(str(error))


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


def results(work: Callable[..., None], folder: Path, world: int, *more: str) -> list[Any]:
    """What every process left."""
    for rank, process in enumerate(start(work, folder, world, *more)):
        process.join(200)
        assert process.exitcode == 0, (folder / f"error{rank}").read_text()
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(world)]


@pytest.fixture(scope="module")
def single() -> dict[torch.dtype, dict[str, Any]]:
    """The same training on one device, with the rows in the same order."""
    results = {}
    for dtype, steps in ((torch.float64, STEPS), (torch.float32, 1)):
        torch.manual_seed(0)
        model = AlexNet(CONFIG).to(dtype)
        initial = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        first, weights = train(model, model, slice(None), dtype, steps)
        images, labels = batch(0, dtype)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            half = F.cross_entropy(model(images), labels)
        results[dtype] = first | {"weights": weights, "initial": initial, "half loss": half}
    return results


@pytest.fixture
def mesh() -> Iterator[TowerMesh]:
    """Tower 0 of a pair whose other process does not exist: exchanges return at once, with garbage."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield TowerMesh.create()
    dist.destroy_process_group()


def assert_close(got: torch.Tensor, expected: torch.Tensor, bound: float) -> None:
    """max|a - b| <= bound max|b|."""
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= bound * expected.abs().max()


@pytest.mark.parametrize("world", [2, 4])
def test_towers_are_the_network_on_one_device(tmp_path: Path, world: int, single: Any) -> None:
    """Loss, logits and every gradient within 1e-11 of the largest in float64, 1e-4 in float32; weights after 50 steps
    within 1e-9; the same initial weights to the bit; half of the parameters; as many bytes as the formula says;
    independent dropout."""
    found = results(work, tmp_path, world)
    assert [(each["replica"], each["tower"]) for each in found] == [(r // 2, r % 2) for r in range(world)]
    replicas = world // 2
    for dtype, bound in ((torch.float64, 1e-11), (torch.float32, 1e-4)):
        expected = single[dtype]
        for each in found:
            got = each[str(dtype)]
            rows = slice(each["replica"] * BATCH // replicas, (each["replica"] + 1) * BATCH // replicas)
            assert_close(got["logits"], expected["logits"][rows], bound)
            for name, weight in expected["weights"].items():
                assert_close(got["gradients"][name], expected["gradients"][name], bound)
                assert torch.equal(got["initial"][name], expected["initial"][name])
                assert_close(got["weights"][name], weight, max(bound, 1e-9))
                assert torch.equal(got["weights"][name], found[0][str(dtype)]["weights"][name])
        losses = [found[rank][str(dtype)]["loss"] for rank in range(0, world, 2)]
        assert_close(torch.stack(losses).mean(), expected["loss"], bound)

    whole = sum(p.numel() for p in AlexNet(CONFIG).parameters())
    for first, second in zip(found[::2], found[1::2], strict=True):
        assert first["parameters"] + second["parameters"] == whole
        assert abs(first["parameters"] / whole - 0.5) < 0.02
        for element_bytes, sent, others in zip((4, 2), first["sent"], second["sent"], strict=True):
            # docs/towers.md: pooled conv2 and conv5, fc6 and fc7, forward and backward; half of the logits
            assert (sent + others) / 2 == element_bytes * (16 * 13 * 13 + 16 * 6 * 6 + 2 * 32) + 4 * 7 / 2
    halves = torch.stack([found[rank]["half loss"] for rank in range(0, world, 2)])
    assert_close(halves.mean(), single[torch.float32]["half loss"], 0.01)
    assert all(each["averaged"] == (2 * 4 * each["parameters"] if replicas > 1 else 0) for each in found)
    assert all(each["timeouts"] == [45, 45] and each["gathered"] for each in found)
    for number, config in enumerate(OTHERS):
        torch.manual_seed(0)
        model = AlexNet(config).double()
        expected, _ = train(model, model, slice(None), torch.float64, 1)
        for each in found:
            for name, gradient in expected["gradients"].items():
                assert_close(each["others"][number][name], gradient, 1e-11)
    masks = [each["silent"] for each in found]
    for once, again in masks:
        assert torch.equal(once, again) and abs(once.float().mean() - 0.5) < 0.05
    for n, (one, _) in enumerate(masks):
        assert all(abs((one == other).float().mean() - 0.5) < 0.05 for other, _ in masks[:n])


@pytest.mark.parametrize(
    ("backend", "bound"), [("aot_eager", 0.0), pytest.param("inductor", 1e-4, marks=pytest.mark.slow)]
)
def test_compiled_towers_are_the_eager_ones(tmp_path: Path, backend: str, bound: float) -> None:
    """A tower is compiled as a whole, by replicas, too: traced alone, gradients are the same to the bit."""
    for eager, compiled in results(compile_tower, tmp_path, 4, backend):
        for name, gradient in eager.items():
            assert_close(compiled[name], gradient, bound)


@pytest.mark.parametrize("how", ["leaves", "stands still"])
def test_lost_peer_raises(tmp_path: Path, how: str) -> None:
    """A process whose peer has died, or is silent for longer than the timeout, gets an error."""
    first, second = start(lose_peer, tmp_path, 2, how)
    first.join(60)
    second.kill()
    assert "gloo" in (tmp_path / "error").read_text()


EXCHANGE_ORDER = [
    "all_to_all_single", "forward own", "wait_tensor", "forward other",
    "backward other", "all_to_all_single", "backward own", "wait_tensor",
]  # fmt: skip


def test_eager_exchanges_overlap_with_the_own_half(mesh: TowerMesh) -> None:
    """Forward: sent before the own half, received before the other. Backward: the other's gradient first, sent before
    the own half's, received after it."""
    model = TowerAlexNet(CONFIG, mesh)
    own = torch.ones(2, 8, 13, 13, requires_grad=True)
    with Log() as log:
        model.conv3(own * 1).sum().backward()  # type: ignore[misc]
    assert [event for event in log.events if event in EXCHANGE_ORDER] == EXCHANGE_ORDER
    assert own.grad is not None


@pytest.mark.slow
def test_compiled_exchanges_overlap_with_the_own_half(mesh: TowerMesh) -> None:
    """In Inductor's code each exchange but that of logits has a layer between its start and its end."""
    model = TowerAlexNet(CONFIG, mesh)
    compiled = torch.compile(model, options=COMPILE_OPTIONS, fullgraph=True, dynamic=False)
    images, _ = batch(0, torch.float32)
    _, codes = run_fw_bw_and_get_code(lambda: compiled(images).sum())
    exchanges = []
    for code in codes:
        body = code[code.index("def call") :]
        calls = r"c10d_functional\.(?:all_to_all_single|wait_tensor)|extern_kernels\.\w+|convolution_backward"
        text = " ".join(call.rpartition(".")[2] for call in re.findall(calls, body))
        exchanges += re.findall(r"all_to_all_single(.*?)wait_tensor", text)
    layers = [each.replace("all_to_all_single", "").split() for each in exchanges]
    assert len(layers) == 9 and sum(map(bool, layers)) == 8


def test_states_shard_and_are_refused(mesh: TowerMesh) -> None:
    """Parts of a state make the whole again; networks whose towers do not meet in conv3 are refused."""
    state = AlexNet(CONFIG).state_dict()
    parts = [shard_state_dict(state, tower) for tower in (0, 1)]
    for name, tensor in state.items():
        assert torch.equal(torch.cat([part[name] for part in parts]), tensor)
    for config in (AlexNetConfig(towers=1), AlexNetConfig(channels=(96, 256, 0, 384, 256))):
        with pytest.raises(ValueError, match=r"model\.towers=2"):
            TowerAlexNet(config, mesh)
