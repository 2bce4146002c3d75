"""Benchmark training on a batch in memory: our network, torchvision's, and ours on two devices.

The last tests the paper's claim: "the two-GPU net takes slightly less time to train than the one-GPU net" (section
3.2). Two processes train one tower each, as in `model/towers.py`; rank 0 also trains, in turns, the paper's one-GPU
net, with half the channels in conv1-4, and both towers on one device. On a CPU a device is a process with half of the
cores.
"""

import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

from pipeline.machine import num_cores
from tools.benchmarks import common
from tools.benchmarks.common import Rate, Rates

if TYPE_CHECKING:
    import torch
    from torch import nn

Step = Callable[[], Any]
TORCH_LRN, COPIES = "torch.nn.functional.local_response_norm", "2.5 copies: the fewest possible bytes"
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
    """Measure training on a batch in memory: LRN alone (ours, torch's), our network, torchvision's, two towers.

    Args:
        batch_sizes: Images per batch, one measurement each (default: [128,256,1024] on a GPU, [32] on a CPU); the two
            towers use the first.
        precision: Of activations (default: bf16 on a GPU, float32 on a CPU).
        seconds: Length of one measurement.
        repeats: Measurements of each contender, taken in turns.
        out: File of JSON lines to append one row per contender to.
    """
    import torch
    import torch.multiprocessing as mp
    from torch.multiprocessing.spawn import ProcessException

    from model.alexnet import AlexNetConfig
    from model.towers import bytes_per_image
    from train.device import pick_device, set_arithmetic, tune_malloc

    device = pick_device("auto")
    on_gpu = device.type == "cuda"
    sizes = batch_sizes or ([128, 256, 1024] if on_gpu else [32])
    precision = precision or ("bf16" if on_gpu else "float32")
    common.check_options(out, batch_sizes=min(sizes), seconds=seconds, repeats=repeats)
    dtype = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    tune_malloc()  # this and the next as the trainer does
    set_arithmetic(deterministic=False)
    print(f"{precision}, {repeats} repeats, on {device}")
    rows, missing = [], {}
    for title, contenders, reference in (
        ("normalization of (N, 96, 55, 55), both ways", make_lrn_steps, TORCH_LRN),
        ("training steps", make_training_steps, TORCHVISION),
    ):
        for size in sizes:
            steps = contenders(size, dtype, device)
            turns = {
                name: partial(common.measure, step, size, seconds, device) for name, step in steps.items()
            }
            rates = common.interleave(turns, repeats)
            rows += common.print_table(f"{title}, batch {size}", rates, reference)
            del steps, turns  # release their memory
    with tempfile.TemporaryDirectory() as scratch:
        try:
            if on_gpu and torch.cuda.device_count() < 2:
                raise ProcessException("expected two GPUs, got one", 0, 0)
            mp.spawn(run_tower, (sizes[0], dtype, device.type, seconds, repeats, scratch), nprocs=2)
        except ProcessException as error:  # no second device, or a process failed or was killed
            missing["two towers"] = str(error).strip().splitlines()[-1]
            print(f"two towers: not measured: {missing['two towers']}")
        else:
            found = json.loads(Path(scratch, "rates.json").read_text())
            rates = {name: [Rate(*rate) for rate in values] for name, values in found.items()}
            rows += common.print_table(f"two towers, batch {sizes[0]}", rates, ONE_GPU)
            sent = sizes[0] * bytes_per_image(AlexNetConfig(), dtype.itemsize)
            print(f"{judge_claim(rates)}\neach of the two sends {sent / 1e6:.1f} MB a step (docs/towers.md)")
    about: dict[str, Any] = {"precision": precision, "device": device.type, "not_measured": missing}
    common.append_rows(out, "model", rows, "random numbers", **about)


def make_lrn_steps(batch_size: int, dtype: "torch.dtype", device: "torch.device") -> dict[str, Step]:
    """Make steps of LRN forward and backward after conv1, channels-last. Asserts that ours equals torch's."""
    import torch
    import torch.nn.functional as F

    from model.lrn import local_response_norm
    from train.device import can_compile

    x = torch.randn(batch_size, 96, 55, 55, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    x.requires_grad_()
    gradient = torch.randn_like(x)

    def step(normalize: Callable[["torch.Tensor"], "torch.Tensor"]) -> None:
        x.grad = None
        normalize(x).backward(gradient)

    source, target = x.detach(), torch.empty_like(gradient)

    def copy() -> None:  # forward reads x and writes y, backward reads x and a gradient and writes one
        for _ in range(2):
            target.copy_(source)
        target[::2].copy_(source[::2])

    def torch_lrn(x: "torch.Tensor") -> "torch.Tensor":
        wide = x if device.type == "cuda" else x.float()  # on a CPU it needs float32
        return F.local_response_norm(wide, 5, 1e-4, 0.75, 2.0).to(dtype)

    ours = partial(local_response_norm, convention="original")
    torch.testing.assert_close(ours(source), torch_lrn(source))
    steps: dict[str, Step] = {TORCH_LRN: partial(step, torch_lrn), "ours": partial(step, ours)}
    if can_compile(device):
        steps["ours, compiled"] = partial(step, torch.compile(ours, dynamic=False))
    return steps | {COPIES: copy}


def make_training_steps(batch_size: int, dtype: "torch.dtype", device: "torch.device") -> dict[str, Step]:
    """Make steps of forward, backward and update, by contender."""
    import torch

    from model.alexnet import AlexNet, AlexNetConfig
    from train.device import can_compile, compiled

    train_on = make_trainer(batch_size, dtype, device)
    ours = partial(AlexNet, AlexNetConfig())
    networks: dict[str, Callable[[], Any]] = {TORCHVISION: build_torchvision_alexnet, "ours": ours}
    steps = {name: train_on(make()) for name, make in networks.items()}
    if can_compile(device):
        steps["ours, compiled as the trainer does"] = train_on(ours(), partial(compiled, device=device))
    if device.type == "cuda":
        graphs = partial(torch.compile, mode="reduce-overhead", fullgraph=True, dynamic=False)
        steps |= {f"{name}, CUDA graphs": train_on(make(), graphs) for name, make in networks.items()}
    return steps


def make_trainer(batch_size: int, dtype: "torch.dtype", device: "torch.device") -> Callable[..., Step]:
    """Return a function that makes the training step of a network, optionally compiled, on one synthetic batch."""
    import torch
    import torch.nn.functional as F

    from train.optimizer import PaperSGD
    from train.schedule import OptimizerConfig

    images = 50 * torch.randn(batch_size, 3, 224, 224, device=device).to(memory_format=torch.channels_last)
    labels = torch.randint(1000, (batch_size,), device=device)

    def train_on(model: Any, compile: Callable[[Any], Any] = lambda model: model) -> Step:
        network = compile(model.to(device))
        optimizer = PaperSGD(model.named_parameters(), OptimizerConfig())
        if device.type == "cuda":
            optimizer.compile()
        rates = {name: 1e-9 for name, _ in model.named_parameters()}

        def step() -> None:
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                loss = F.cross_entropy(network(images).float(), labels)
            loss.backward()
            optimizer.step(rates)

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


def run_tower(
    rank: int, batch_size: int, dtype: "torch.dtype", kind: str, seconds: float, repeats: int, scratch: str
) -> None:
    """Train one tower in turns; rank 0 also trains the networks on one device while rank 1 waits, and writes
    rates.json."""
    import torch
    import torch.distributed as dist
    import yaml

    from model.alexnet import AlexNet, AlexNetConfig
    from model.towers import TIMEOUT, TowerAlexNet, TowerMesh, seed_process
    from train.device import can_compile, compiled, set_arithmetic, tune_malloc
    from train.recipe import ABLATIONS

    device = torch.device(kind, rank) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, num_cores() // 2))
    tune_malloc()  # this and the next as the trainer does
    set_arithmetic(deterministic=False)
    timeout, backend = 20 * TIMEOUT, "nccl" if kind == "cuda" else "gloo"  # compiling takes long
    dist.init_process_group(backend, f"file://{scratch}/store", timeout, rank=rank, world_size=2)
    mesh = TowerMesh.create(timeout)
    torch.manual_seed(0)  # the same batch and weights on both ranks
    train_on, pair = make_trainer(batch_size, dtype, device), AlexNetConfig()
    one_gpu = AlexNetConfig.from_json(yaml.safe_load((ABLATIONS / "one-gpu.yaml").read_text())["model"])
    compile_model = partial(compiled, device=device) if can_compile(device) else lambda model: model
    steps = {TWO_DEVICES: train_on(TowerAlexNet(pair, mesh), compile_model)}
    if rank == 0:
        steps[ONE_GPU] = train_on(AlexNet(one_gpu), compile_model)
        steps[ONE_DEVICE] = train_on(AlexNet(pair), compile_model)
    seed_process(0, rank)  # dropout

    def run(name: str, count: int) -> int:
        for _ in range(count):
            steps[name]()
        if kind == "cuda":
            torch.cuda.synchronize(device)
        return count * batch_size

    def measure(name: str) -> Rate:
        dist.barrier()
        if name not in steps:  # only rank 0 runs it
            return Rate(0, 0)
        count = int(counts[name].item())
        run(name, 1 + count // 4)
        rate = common.measure_job(lambda: run(name, count))
        cpu_s = torch.tensor(1 / rate.per_cpu_s, device=device)  # per image
        if name == TWO_DEVICES:
            dist.all_reduce(cpu_s)
        return rate._replace(per_cpu_s=1 / cpu_s.item())

    counts = {}
    for name in steps:  # how many steps take `seconds`
        run(name, 2)  # compiles
        rate = common.measure_job(partial(run, name, 2))
        counts[name] = torch.tensor(max(1, round(seconds * rate.per_s / batch_size)), device=device)
    dist.broadcast(counts[TWO_DEVICES], 0)  # both ranks run as many
    turns = {name: partial(measure, name) for name in (TWO_DEVICES, ONE_GPU, ONE_DEVICE)}
    rates = common.interleave(turns, repeats)
    if rank == 0:
        Path(scratch, "rates.json").write_text(json.dumps(rates))
    dist.destroy_process_group()


def judge_claim(rates: Rates) -> str:
    """Report whether the paper's claim holds: in all turns, in none, or undecided."""
    ratios = [two.per_s / one.per_s for two, one in zip(rates[TWO_DEVICES], rates[ONE_GPU], strict=True)]
    holds = (
        "holds here" if min(ratios) > 1 else "does not hold here" if max(ratios) < 1 else "is undecided here"
    )
    speed = f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) times as fast as"
    return f"the two-GPU net trains {speed} the one-GPU net: the claim of less time (section 3.2) {holds}"
