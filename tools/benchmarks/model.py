"""Benchmark training on a batch in memory: our network, torchvision's, and ours on two devices.

The last tests the paper's claim: "the two-GPU net takes slightly less time to train than the one-GPU net" (section
3.2). This process and another one train a tower each, as in `model/towers.py`; this one also trains, in turns, the
paper's one-GPU net, with half the channels in conv1-4, and both towers on one device. On a CPU a device is a process
with half of the cores.
"""

import multiprocessing
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline.machine import num_cores
from tools.benchmarks import common
from tools.benchmarks.common import Rates

if TYPE_CHECKING:
    import torch
    from torch import nn

Step = Callable[[], Any]
TORCHVISION = "torchvision's alexnet, without normalization"
TWO_DEVICES, ONE_DEVICE = "two towers, one on each of two devices", "two towers on one device"
ONE_GPU = "the paper's one-GPU net on one device"


def bench_model(
    batch_sizes: list[int] | None = None,
    precision: Literal["float32", "bf16", "fp16"] | None = None,
    seconds: float = 3.0,
    repeats: int = 5,
    out: Path | None = None,
) -> None:
    """Measure training on a batch in memory: our network, torchvision's, two towers.

    Args:
        batch_sizes: Images per batch, one measurement each (default: [128,256,1024] on a GPU, [32] on a CPU); the two
            towers use the first.
        precision: Of activations (default: bf16 on a GPU, float32 on a CPU).
        seconds: Length of one measurement.
        repeats: Measurements of each contender, taken in turns.
        out: File of JSON lines to append one row per contender to.
    """
    import torch

    from train.device import pick_device, set_precision, tune_malloc

    device = pick_device("auto")
    on_gpu = device.type == "cuda"
    sizes = batch_sizes or ([128, 256, 1024] if on_gpu else [32])
    precision = precision or ("bf16" if on_gpu else "float32")
    common.check_options(out, batch_sizes=min(sizes), seconds=seconds, repeats=repeats)
    dtype = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    tune_malloc()  # this and the next as the trainer does
    set_precision(deterministic=False)
    print(f"{precision}, {repeats} repeats, on {device}")
    context = {"data": "random numbers", "precision": precision, "device": device.type}

    def compare(steps: dict[str, Step], size: int) -> Rates:
        turns = {name: partial(common.measure, step, size, seconds, device) for name, step in steps.items()}
        return common.interleave(turns, repeats)

    for size in sizes:
        rates = compare(make_training_steps(size, dtype, device), size)
        common.report_rates(f"training steps, batch {size}", rates, TORCHVISION, out, **context)
    if on_gpu and torch.cuda.device_count() < 2:
        print("two towers: not measured: expected two GPUs, got one")
        return
    with train_pair(sizes[0], dtype, device) as steps:
        rates = compare(steps, sizes[0])
    common.report_rates(f"two towers, batch {sizes[0]}", rates, ONE_GPU, out, **context)


def make_training_steps(batch_size: int, dtype: "torch.dtype", device: "torch.device") -> dict[str, Step]:
    """Make steps of forward, backward and update, by contender."""
    import torch

    from model.alexnet import AlexNet, AlexNetConfig
    from train.device import compile_model

    train_on = make_trainer(batch_size, dtype, device)
    ours = partial(AlexNet, AlexNetConfig())
    networks: dict[str, Callable[[], Any]] = {TORCHVISION: build_torchvision_alexnet, "ours": ours}
    steps = {name: train_on(make()) for name, make in networks.items()}
    steps["ours, compiled as the trainer does"] = train_on(ours(), partial(compile_model, device=device))
    if device.type == "cuda":
        graphs = partial(torch.compile, mode="reduce-overhead", fullgraph=True, dynamic=False)
        steps |= {f"{name}, CUDA graphs": train_on(make(), graphs) for name, make in networks.items()}
    return steps


def make_trainer(batch_size: int, dtype: "torch.dtype", device: "torch.device") -> Callable[..., Step]:
    """Return a function that makes the training step of a network, optionally compiled, on one synthetic batch."""
    import torch
    import torch.nn.functional as F

    from train.config import OptimizerConfig
    from train.optimizer import AlexNetSGD

    images = 50 * torch.randn(batch_size, 3, 224, 224, device=device).to(memory_format=torch.channels_last)
    labels = torch.randint(1000, (batch_size,), device=device)

    def train_on(model: Any, compile: Callable[[Any], Any] = lambda model: model) -> Step:
        network = compile(model.to(device))
        optimizer = AlexNetSGD(model.named_parameters(), OptimizerConfig())
        if device.type == "cuda":
            optimizer.compile()
        for group in optimizer.param_groups:
            group["lr"] = 1e-9  # the same work, without divergence

        def step() -> None:
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                loss = F.cross_entropy(network(images).float(), labels)
            loss.backward()
            optimizer.step()

        return step

    return train_on


def build_torchvision_alexnet() -> "nn.Module":
    """Build torchvision's network, layer by layer (torchvision 0.26, models/alexnet.py), in channels-last memory."""
    import torch
    from torch import nn

    layers = nn.Sequential(
        nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(inplace=True),
        nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(inplace=True),
        nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2),
        nn.AdaptiveAvgPool2d(6), nn.Flatten(),
        nn.Dropout(0.5), nn.Linear(256 * 6 * 6, 4096), nn.ReLU(inplace=True),
        nn.Dropout(0.5), nn.Linear(4096, 4096), nn.ReLU(inplace=True),
        nn.Linear(4096, 1000)
    )  # fmt: skip
    return layers.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


@contextmanager
def train_pair(batch_size: int, dtype: "torch.dtype", device: "torch.device") -> Iterator[dict[str, Step]]:
    """Yield the steps of the pair, whose other process takes one for each message, and of both networks on one device.

    Raises `DataError` when the other process is killed."""
    import torch.distributed as dist
    import yaml

    from model.alexnet import AlexNet, AlexNetConfig
    from pipeline.errors import DataError
    from train.cli import ABLATIONS

    context = multiprocessing.get_context("spawn")
    messages, theirs = context.Pipe()
    with tempfile.TemporaryDirectory() as scratch:
        options = (Path(scratch, "store"), batch_size, dtype, device.type)
        process = context.Process(target=follow, args=(theirs, *options), daemon=True)
        process.start()
        theirs.close()
        try:
            train_on, tower_step = join_pair(0, *options)

            def step() -> None:
                messages.send_bytes(b"step")
                tower_step()

            one_gpu = yaml.safe_load((ABLATIONS / "one-gpu.yaml").read_text())["model"]
            networks = {ONE_GPU: AlexNetConfig.from_json(one_gpu), ONE_DEVICE: AlexNetConfig()}
            yield {TWO_DEVICES: step} | {name: train_on(AlexNet(config)) for name, config in networks.items()}
        except (RuntimeError, OSError) as error:
            raise DataError(
                f"two towers: the other process failed ({error}); if memory is short, use smaller --batch-sizes"
            ) from None
        finally:
            messages.close()  # ends the other process
            if dist.is_initialized():
                dist.destroy_process_group()
            process.join(60)


def join_pair(
    rank: int, store: Path, batch_size: int, dtype: "torch.dtype", kind: str
) -> tuple[Callable[..., Step], Step]:
    """Join the other process. Returns what makes a network's training step on this process's device, and the step of
    this process's tower, both compiled as the trainer does."""
    import torch
    import torch.distributed as dist

    from model.alexnet import AlexNetConfig
    from model.towers import TIMEOUT, TowerAlexNet, TowerMesh, seed_process
    from train.device import compile_model, set_precision, tune_malloc

    device = torch.device(kind, rank) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, num_cores() // 2))
    tune_malloc()  # this and the next as the trainer does
    set_precision(deterministic=False)
    timeout, backend = 20 * TIMEOUT, "nccl" if kind == "cuda" else "gloo"  # compiling takes long
    dist.init_process_group(backend, f"file://{store}", timeout, rank=rank, world_size=2)
    mesh = TowerMesh.create(timeout)
    torch.manual_seed(0)  # the same batch and weights on both ranks
    train_on = partial(make_trainer(batch_size, dtype, device), compile=partial(compile_model, device=device))
    tower_step = train_on(TowerAlexNet(AlexNetConfig(), mesh))
    seed_process(0, rank)  # dropout
    return train_on, tower_step


def follow(messages: Any, *options: Any) -> None:
    """Train the second tower in this process, a step per message."""
    import torch.distributed as dist

    _, step = join_pair(1, *options)
    with suppress(EOFError):
        while messages.recv_bytes():
            step()
    dist.destroy_process_group()
