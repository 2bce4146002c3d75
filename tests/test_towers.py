"""Two towers on two processes, and on two replicas of two, are the network on one device; over gloo, in real
processes."""

import itertools
import multiprocessing
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._inductor.utils import run_fw_bw_and_get_code
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from model.alexnet import AlexNet, AlexNetConfig
from model.towers import COMPILE_OPTIONS, TowerAlexNet, TowerMesh, gather_state_dict, seed_process
from train.config import OptimizerConfig
from train.device import can_compile
from train.optimizer import AlexNetSGD

CONFIG = AlexNetConfig(channels=(8, 16, 24, 24, 16), fc_dim=32, num_classes=7, dropout=0)
"""An odd number of classes, so that towers get different halves."""
CONFIGS = (
    CONFIG,
    replace(CONFIG, variant="original", channels=(8, 16, 24, 24, 0), num_classes=6, activation="tanh"),
    replace(CONFIG, variant="torchvision", towers=2, channels=(8, 16, 24, 0, 16), num_classes=3),
    replace(CONFIG, channels=(8, 16, 24, 0, 0), num_classes=2, lrn="none", pooling="plain"),
)
BATCH, STEPS = 4, (50, 1, 1, 1)
"""Images, and steps of each of `CONFIGS`."""


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The images and labels of a step, the same in every process."""
    generator = torch.Generator().manual_seed(step)
    images = 50 * torch.randn(BATCH, 3, 224, 224, generator=generator, dtype=torch.float64)
    return images, torch.randint(CONFIG.num_classes, (BATCH,), generator=generator)


def train(
    network: torch.nn.Module, model: AlexNet, rows: slice, steps: int
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Take some steps; returns the first one's loss, logits and gradients, and the weights in the end."""
    optimizer = AlexNetSGD(model.named_parameters(), OptimizerConfig())
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    first: dict[str, Any] = {}
    for step in range(steps):
        images, labels = (each[rows] for each in batch(step))
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
    torch.set_num_threads(1)  # there are more processes than cores
    dist.init_process_group("gloo", f"file://{folder}/store", world_size=world, rank=rank)
    mesh = TowerMesh.create()
    per_replica = BATCH // mesh.num_replicas
    rows = slice(mesh.replica * per_replica, (mesh.replica + 1) * per_replica)
    found: dict[str, Any] = {"rows": torch.arange(BATCH)[rows], "steps": [], "sent": []}
    for config, steps in zip(CONFIGS, STEPS, strict=True):
        torch.manual_seed(0)
        model = TowerAlexNet(config, mesh).double()
        initial = gather_state_dict(model.state_dict(), config, mesh)
        first, weights = train(mesh.wrap_ddp(model), model, rows, steps)
        first["gradients"] = gather_state_dict(first["gradients"], config, mesh)
        found["steps"].append(
            first | {"weights": gather_state_dict(weights, config, mesh), "initial": initial}
        )
    groups = (mesh.pair_group, mesh.replica_group)
    found["timeouts"] = [group._get_backend(torch.device("cpu")).options._timeout.seconds for group in groups]

    torch.manual_seed(0)
    model = TowerAlexNet(CONFIG, mesh)
    found["parameters"] = sum(p.numel() for p in model.parameters())
    images, labels = (each[rows] for each in batch(0))
    for half in (False, True):
        with Log() as log:
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                loss = F.cross_entropy(model(images), labels)
            loss.backward()
        found["sent"].append(log.bytes / per_replica)
    found["half loss"] = loss.detach()
    torch.save(found, folder / f"rank{rank}.pt")


def compile_tower(folder: Path, rank: int, world: int, backend: str) -> None:
    """One process: the same step eager and compiled, in replicas whose gradients travel in several buckets."""
    torch.set_num_threads(1)  # there are more processes than cores
    dist.init_process_group("gloo", f"file://{folder}/store", world_size=world, rank=rank)
    mesh = TowerMesh.create()
    dist._DEFAULT_FIRST_BUCKET_BYTES = 1000  # type: ignore[attr-defined]
    torch.manual_seed(0)
    model = TowerAlexNet(CONFIG, mesh)
    options = COMPILE_OPTIONS if backend == "inductor" else None
    compiled = torch.compile(model, backend=backend, options=options, fullgraph=True, dynamic=False)
    images, labels = batch(0)
    found = []
    for network in (model, compiled):
        model.zero_grad()
        F.cross_entropy(mesh.wrap_ddp(network)(images), labels).backward()  # type: ignore[arg-type]
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    torch.save(found, folder / f"rank{rank}.pt")


def results(work: Callable[..., None], folder: Path, world: int, *more: str) -> list[Any]:
    """What every process left that calls a function of this file, forked from one that has imported PyTorch and done
    nothing with it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    processes = [context.Process(target=work, args=(folder, rank, world, *more)) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(200)
    assert [process.exitcode for process in processes] == [0] * world  # tracebacks are on stderr
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(world)]


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


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_towers_are_the_network_on_one_device(tmp_path: Path, world: int) -> None:
    """Loss, logits and every gradient within 1e-11 of the largest in float64; weights after 50 steps within 1e-9; the
    same initial weights to the bit; half of the parameters; as many bytes as the formula says; bfloat16 within 1 %."""
    found = results(work, tmp_path, world)
    firsts = found[::2]  # of each replica
    assert torch.cat([each["rows"] for each in firsts]).equal(torch.arange(BATCH))
    for number, (config, steps) in enumerate(zip(CONFIGS, STEPS, strict=True)):
        torch.manual_seed(0)
        model = AlexNet(config).double()
        initial = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        expected, weights = train(model, model, slice(None), steps)
        for each in found:
            got = each["steps"][number]
            assert_close(got["logits"], expected["logits"][each["rows"]], 1e-11)
            for name, weight in weights.items():
                assert torch.equal(got["initial"][name], initial[name])
                assert_close(got["gradients"][name], expected["gradients"][name], 1e-11)
                assert_close(got["weights"][name], weight, 1e-9)
                assert torch.equal(got["weights"][name], found[0]["steps"][number]["weights"][name])
        losses = torch.stack([each["steps"][number]["loss"] for each in firsts])
        assert_close(losses.mean(), expected["loss"], 1e-11)

    whole = sum(p.numel() for p in AlexNet(CONFIG).parameters())
    for first, second in zip(firsts, found[1::2], strict=True):
        assert first["parameters"] + second["parameters"] == whole
        assert abs(first["parameters"] / whole - 0.5) < 0.02
        for element_bytes, sent, others in zip((4, 2), first["sent"], second["sent"], strict=True):
            # docs/towers.md: pooled conv2 and conv5, fc6 and fc7, forward and backward; half of the logits
            assert (sent + others) / 2 == element_bytes * (16 * 13 * 13 + 16 * 6 * 6 + 2 * 32) + 4 * 7 / 2
    torch.manual_seed(0)
    images, labels = batch(0)
    loss = F.cross_entropy(AlexNet(CONFIG)(images), labels)
    assert_close(torch.stack([each["half loss"] for each in firsts]).mean(), loss.detach(), 0.01)
    assert all(each["timeouts"] == [45, 45] for each in found)


def test_processes_have_streams_of_their_own() -> None:
    """Masks of dropout on two ranks, or with two seeds, agree by chance alone; the same numbers give the same mask."""
    masks = []
    for numbers in ((5, 0), (5, 1), (6, 0), (5, 0)):
        seed_process(*numbers)
        masks.append(torch.empty(4000).bernoulli_(0.5))
    assert torch.equal(masks[0], masks[3])
    for one, other in itertools.combinations(masks[:3], 2):
        assert (one == other).float().mean().item() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(
    ("backend", "bound"), [("aot_eager", 0.0), pytest.param("inductor", 1e-4, marks=pytest.mark.slow)]
)
def test_compiled_towers_are_the_eager_ones(tmp_path: Path, backend: str, bound: float) -> None:
    """A tower is compiled as a whole, by replicas, too: traced alone, gradients are the same to the bit."""
    if backend == "inductor" and not can_compile(torch.device("cpu")):
        pytest.skip("torch cannot compile here")
    for eager, compiled in results(compile_tower, tmp_path, 4, backend):
        for name, gradient in eager.items():
            assert_close(compiled[name], gradient, bound)


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
@pytest.mark.skipif(not can_compile(torch.device("cpu")), reason="torch cannot compile here")
def test_compiled_exchanges_overlap_with_the_own_half(mesh: TowerMesh) -> None:
    """In Inductor's code each exchange but that of logits has a layer between its start and its end."""
    model = TowerAlexNet(CONFIG, mesh)
    compiled = torch.compile(model, options=COMPILE_OPTIONS, fullgraph=True, dynamic=False)
    images, _ = batch(0)
    _, codes = run_fw_bw_and_get_code(lambda: compiled(images).sum())
    exchanges = []
    for code in codes:
        body = code[code.index("def call") :]
        calls = r"c10d_functional\.(?:all_to_all_single|wait_tensor)|extern_kernels\.\w+|convolution_backward"
        text = " ".join(call.rpartition(".")[2] for call in re.findall(calls, body))
        exchanges += re.findall(r"all_to_all_single(.*?)wait_tensor", text)
    layers = [each.replace("all_to_all_single", "").split() for each in exchanges]
    assert len(layers) == 9 and sum(map(bool, layers)) == 8


@pytest.mark.parametrize("config", [AlexNetConfig(towers=1), AlexNetConfig(channels=(96, 256, 0, 384, 256))])
def test_towers_that_do_not_meet_are_refused(mesh: TowerMesh, config: AlexNetConfig) -> None:
    """Another network than two towers that meet in conv3."""
    with pytest.raises(ValueError, match=r"model\.towers=2"):
        TowerAlexNet(config, mesh)
