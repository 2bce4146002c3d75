"""How fast the network trains on a batch that is there already, beside torchvision's network and other ways to write
ours; and with its towers on two devices, beside the paper's network for one."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import nn

from model.alexnet import AlexNet, AlexNetConfig
from model.lrn import local_response_norm
from tools.benchmarks import towers
from tools.benchmarks.measure import Table, take_turns, timed
from tools.benchmarks.record import check_out, record
from tools.benchmarks.synthetic import training_on
from train.device import can_compile, compiled, keep_freed_memory, pick_device, set_arithmetic

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Precision = Literal["float32", "bf16", "fp16"]
THEIRS, COPIES = "torch.nn.functional.local_response_norm", "2.5 copies: the fewest possible bytes"
AS_TRAINED = "ours, compiled as the trainer does"
TORCHVISION = "torchvision's alexnet, without normalization"


def bench_model(
    batch_sizes: list[int] | None,
    precision: Precision | None,
    seconds: float,
    repeats: int,
    device: str,
    profile: bool,
    out: Path | None,
) -> None:
    """See `tools/bench.py model`."""
    place = pick_device(device)
    sizes = batch_sizes or ([128, 256, 1024] if place.type == "cuda" else [32])
    if min([*sizes, repeats]) < 1 or seconds <= 0:
        raise ValueError("--batch-sizes and --repeats must be at least 1, --seconds positive")
    check_out(out)
    precision = precision or ("bf16" if place.type == "cuda" else "float32")
    keep_freed_memory()  # this and the next as the trainer does
    set_arithmetic(deterministic=False)
    tables, missing = [], {}
    for part, contenders, reference in (
        ("normalization of (N, 96, 55, 55), forward and backward", normalizations, THEIRS),
        ("training steps", trainings, TORCHVISION),
    ):
        for size in sizes:
            steps = contenders(size, DTYPES[precision], place)
            measured = take_turns(
                {name: timed(step, size, seconds, place) for name, step in steps.items()}, repeats
            )
            print(f"batch {size}, {precision}, {repeats} repeats, on {place}")
            tables.append(Table(f"{part}, batch {size}", "images/s", measured, reference))
            tables[-1].show()
    steps.clear()  # what they hold is room for the next
    if place.type == "cuda":
        torch.cuda.empty_cache()
    sent = towers.bytes_per_step(towers.FULL, sizes[0], DTYPES[precision])
    try:
        tables.append(towers.measure_towers(sizes[0], DTYPES[precision], place, seconds, repeats))
        tables[-1].show()
        print(
            f"{towers.verdict(tables[-1])}\neach of the two sends {sent / 1e6:.1f} MB in a step (docs/towers.md)"
        )
    except towers.NotMeasuredError as error:
        missing = {towers.TITLE: str(error)}
        print(f"{towers.TITLE}: not measured: {error}")
    if out:
        settings: dict[str, Any] = {"batch_sizes": sizes, "precision": precision, "not_measured": missing}
        settings |= {"seconds": seconds, "device": place.type}
        record(
            out,
            "model",
            tables,
            "random numbers",
            settings,
            {towers.TWO_DEVICES: {"bytes_sent_per_step": sent}},
        )
    if profile:
        print(profiled(sizes[-1], DTYPES[precision], place))


def normalizations(batch_size: int, dtype: torch.dtype, place: torch.device) -> dict[str, Callable[[], Any]]:
    """Forward and backward behind conv1, in channels-last memory."""
    x = torch.randn(batch_size, 96, 55, 55, device=place, dtype=dtype).to(memory_format=torch.channels_last)
    x.requires_grad_()
    gradient = torch.randn_like(x)

    def step(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        x.grad = None
        function(x).backward(gradient)

    source, target = x.detach(), torch.empty_like(gradient)

    def copy() -> None:  # forward reads x and writes y, backward reads x and a gradient and writes one
        for _ in range(2):
            target.copy_(source)
        target[::2].copy_(source[::2])

    def theirs(x: torch.Tensor) -> torch.Tensor:
        wide = x if place.type == "cuda" else x.float()  # on a CPU it takes nothing less
        return F.local_response_norm(wide, 5, 1e-4, 0.75, 2.0).to(dtype)

    ours = partial(local_response_norm, convention="original")
    steps: dict[str, Callable[[], Any]] = {
        THEIRS: partial(step, theirs),
        "ours": partial(step, ours),
    }
    if can_compile(place):
        steps["ours, compiled"] = partial(step, torch.compile(ours, dynamic=False))
    return steps | {COPIES: copy}


def trainings(batch_size: int, dtype: torch.dtype, place: torch.device) -> dict[str, Callable[[], Any]]:
    """Forward, backward and update on one synthetic batch."""
    training = training_on(batch_size, dtype, place)

    def graphs(model: nn.Module) -> nn.Module:
        return cast(nn.Module, torch.compile(model, mode="reduce-overhead", fullgraph=True, dynamic=False))

    config = AlexNetConfig()
    steps = {
        TORCHVISION: training(torchvision_alexnet()),
        "ours": training(AlexNet(config)),
        "ours, two convolutions for a grouped one": training(with_layers(SplitConv2d, "conv2 conv4 conv5")),
        "ours, conv1 as 3x3 on 48 maps": training(with_layers(UnshuffledConv2d, "conv1")),
    }
    if can_compile(place):
        steps[AS_TRAINED] = training(AlexNet(config), partial(compiled, device=place))
    if place.type == "cuda":
        steps |= {
            f"{TORCHVISION}, CUDA graphs": training(torchvision_alexnet(), graphs),
            "ours, CUDA graphs": training(AlexNet(config), graphs),
            "ours, conv1 as 3x3 on 48 maps, CUDA graphs": training(
                with_layers(UnshuffledConv2d, "conv1"), graphs
            ),
        }
    return steps


def profiled(batch_size: int, dtype: torch.dtype, place: torch.device) -> str:
    """Where the time of a training step goes, as the trainer takes it."""
    as_trained = partial(compiled, device=place) if can_compile(place) else lambda model: model
    step = training_on(batch_size, dtype, place)(AlexNet(AlexNetConfig()), as_trained)
    for _ in range(3):
        step()
    with torch.profiler.profile() as profile:
        for _ in range(3):
            step()
    by = "self_cuda_time_total" if place.type == "cuda" else "self_cpu_time_total"
    return str(profile.key_averages().table(sort_by=by, row_limit=15, max_name_column_width=60))


def torchvision_alexnet() -> nn.Module:
    """torchvision's definition, layer by layer (torchvision 0.26, models/alexnet.py), in channels-last memory."""
    layers = nn.Sequential(
        nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(inplace=True),
        nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(inplace=True),
        nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2),
        nn.AdaptiveAvgPool2d(6), nn.Flatten(),
        nn.Dropout(0.5), nn.Linear(256 * 6 * 6, 4096), nn.ReLU(inplace=True),
        nn.Dropout(0.5), nn.Linear(4096, 4096), nn.ReLU(inplace=True),
        nn.Linear(4096, 1000),
    )  # fmt: skip
    return layers.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def with_layers(kind: type[nn.Conv2d], names: str) -> AlexNet:
    """Our network with some convolutions computed in another way."""
    model = AlexNet(AlexNetConfig())
    for name in names.split():
        getattr(model, name).__class__ = kind
    return model


class SplitConv2d(nn.Conv2d):
    """A convolution in two groups, as two convolutions."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As `nn.Conv2d`."""
        assert self.bias is not None
        towers = zip(x.chunk(2, 1), self.weight.chunk(2), self.bias.chunk(2), strict=True)
        return torch.cat([F.conv2d(x, weight, bias, padding=self.padding) for x, weight, bias in towers], 1)


class UnshuffledConv2d(nn.Conv2d):
    """conv1 over blocks of 4x4 pixels, which become 48 maps: exactly the same sums, with zeros in a 12th row and column
    of the kernel."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, 3, 227, 227) -> (N, C, 55, 55)."""
        blocks = F.pixel_unshuffle(F.pad(x, (0, 1, 0, 1)), 4)
        kernel = F.pixel_unshuffle(F.pad(self.weight, (0, 1, 0, 1)), 4)
        return F.conv2d(blocks, kernel, self.bias)
