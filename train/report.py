"""What a finished run ends with: a table on the screen and the page `report.html`."""

from pathlib import Path

import numpy as np
import torch

from model.alexnet import AlexNet
from pipeline.files import write_bytes
from train.accuracy import Accuracy
from train.charts import Rows, figures_of
from train.findings import Findings
from train.metrics import read_metrics
from train.page import Story, build_page
from train.pictures import example_pixels
from train.state import TrainState


def report(
    state: TrainState, network: AlexNet, accuracy: Accuracy, findings: Findings, pictures: list[Path]
) -> None:
    """Print what was trained on, how well and how fast, and where the pictures lie; write the page. Raises
    `OSError`."""
    rows = read_metrics(state.config.run.dir / "metrics.jsonl")
    data = data_of(state, accuracy)
    print()
    for name, value in [*data, *accuracy.rows(), *speed_of(rows)]:
        print(f"{name + ':':<27} {value}")
    print("pictures:")
    for picture in pictures:
        print(f"  {picture}")
    page = state.config.run.dir / "report.html"
    write_bytes(page, build_page(tell(state, network, accuracy, findings, rows)))
    print(f"all of this on one page:\n  {page}")


def data_of(state: TrainState, accuracy: Accuracy) -> list[tuple[str, str]]:
    """(name, value) of the data's sizes."""
    return [
        ("images", f"{state.train_shards.num_samples} train, {accuracy.samples} validation"),
        ("shards", f"{len(state.train_shards.tars)} train, {len(state.val_shards.tars)} validation"),
    ]


def speed_of(rows: Rows) -> list[tuple[str, str]]:
    """(name, value) of what the rows say of speed and memory."""
    # Medians over the log rows: the first one holds the compilation.
    speed, waits, memory = (
        figures_of(rows, "train", name)[1] for name in ("images_per_s", "wait_percent", "gpu_memory_gb")
    )
    table = [("training speed", f"{np.median(speed):.0f} images/s")] if len(speed) else []
    table += [("waiting for input", f"{np.median(waits):.1f} % of the time")] if len(waits) else []
    return table + ([("GPU memory, at most", f"{memory.max():.1f} GB")] if len(memory) else [])


def tell(state: TrainState, network: AlexNet, accuracy: Accuracy, findings: Findings, rows: Rows) -> Story:
    """What the page tells."""
    config, run_dir = state.config, state.config.run.dir
    return Story(
        name=run_dir.resolve().name,
        summary=summary(accuracy, state.epoch, state.step, state.step * config.train.batch_size),
        accuracy=accuracy.rows(),
        facts=[*data_of(state, accuracy), *facts_of(state, network), *speed_of(rows)],
        rows=rows,
        steps_per_epoch=state.train_loader.steps_per_epoch,
        classes=state.val_shards.classes,
        findings=findings,
        pixels=lambda example: example_pixels(example, state),
        conv1=network.conv1.weight.detach().float().cpu().numpy(),
        towers=config.model.num_towers,
        kernels=(run_dir / "kernels.png").read_bytes(),
        augmentation=(run_dir / "augmentation.png").read_bytes(),
        config=config.to_json(),
    )


def facts_of(state: TrainState, network: AlexNet) -> list[tuple[str, str]]:
    """(name, value) of what was trained, and where."""
    model = state.config.model.resolved()
    towers, maps = f"{model.towers} tower{'s' * (model.towers != 1)}", "-".join(map(str, model.conv_channels))
    facts = [
        ("classes", f"{len(state.val_shards.classes):,}"),
        (
            "network",
            f"{model.variant}, {towers}, maps {maps}, {model.fc_dim} units in fc6, fc7",
        ),
        ("parameters", f"{sum(parameter.numel() for parameter in network.parameters()):,}"),
        ("device", device_name(state.device)),
        ("processes", str(state.placement.world)),
        ("versions", versions()),
    ]
    if state.best:
        error, step = state.best["top1_error"], state.best["step"]
        facts.append(("best epoch", f"up to step {step:,.0f}: centre top-1 accuracy {100 - error:.1f} %"))
    return facts


def summary(accuracy: Accuracy, epochs: int, steps: int, images: int) -> str:
    """One line: how well, after how much."""
    shares = [f"centre crop {accuracy.centre_top1:.1f} % top-1, {accuracy.centre_top5:.1f} % top-5"]
    if accuracy.views:
        shares.append(
            f"{accuracy.views} {accuracy.views_top1:.1f} % top-1, {accuracy.views_top5:.1f} % top-5"
        )
    length = f"after {epochs:,} epoch{'s' * (epochs != 1)}, {steps:,} steps, {images:,} images"
    return f"Accuracy: {'; '.join(shares)}; {length}."


def device_name(device: torch.device) -> str:
    """A GPU's name, or that it is a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def versions() -> str:
    """Those of the libraries that numbers depend on."""
    from nvidia import dali

    return f"torch {torch.__version__}, DALI {dali.__version__}"
