"""Report a finished run: a table on the screen, pictures, and one page, `RUN/report.html`.

The page needs no other file, no network and no script. Jinja2 escapes every text in `report.html.j2`, as class names
and paths may hold anything; pictures are PNG files inside the page. scipy, jinja2 and matplotlib take a second to
import, which the start of a run does not wait for, so functions import them.

Shape suffixes: C kernels, H height, W width.
"""

from base64 import b64encode
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from model.alexnet import AlexNet
from pipeline.files import write_bytes
from pipeline.shards import ClassName
from train import pictures
from train.accuracy import Accuracy, EvalStats, Example
from train.cli import log
from train.metrics import read_metrics
from train.pictures import CHARTS, LEARNING, NAMED_CLASSES, draw_png, read_lines, to_pixels
from train.trainer import Trainer

SIGNIFICANT = 0.01
"""Largest p-value of a split by colour: the share of random halves of the kernels that differ as much as the towers."""
THUMBNAIL_SIDE = 160
"""Pixels: twenty photographs of this size are about 1.5 MB."""
HARDEST = 10


@dataclass(frozen=True)
class ReportData:
    """Everything on the page but its pictures; tables are (name, value), the most important first."""

    run_dir: Path
    accuracy: list[tuple[str, str]]
    facts: list[tuple[str, str]]
    rows: list[dict[str, Any]]
    steps_per_epoch: int
    classes: Sequence[ClassName]
    stats: EvalStats
    restore_pixels: Callable[[np.ndarray], np.ndarray]
    """Function from a normalized image, (256, 256, 3), to uint8 RGB."""
    towers: list[np.ndarray]
    """conv1's weights in each tower, (C, 3, 11, 11)."""
    config: dict[str, Any]
    """Resolved, a dictionary per section."""


def write_report(trainer: Trainer, network: AlexNet, accuracy: Accuracy, stats: EvalStats) -> None:
    """Print data, network, speed and accuracy of a finished run; write the pictures and the page. Raises `OSError`."""
    data = build_report_data(trainer, network, accuracy, stats)
    log("")
    for name, value in [*data.facts, *data.accuracy]:
        log(f"{name + ':':<27} {value}")
    config = trainer.config
    images = {
        "curves": draw_png(
            pictures.draw_charts, LEARNING, data.rows, data.steps_per_epoch, len(data.classes)
        ),
        "kernels": draw_png(pictures.draw_kernels, data.towers),
        "augmentation": draw_png(
            pictures.draw_augmentation, trainer.train_shards, trainer.basis, config.data, config.train.seed
        ),
    }
    for name, png in images.items():
        write_bytes(data.run_dir / f"{name}.png", png)
    page = data.run_dir / "report.html"
    write_bytes(page, render_page(data, images))
    log(f"the report, with curves, kernels and mistakes:\n  {page}")


def build_report_data(trainer: Trainer, network: AlexNet, accuracy: Accuracy, stats: EvalStats) -> ReportData:
    """Collect the content of the page."""
    from nvidia import dali

    config, train, val, model = trainer.config, trainer.train_shards, trainer.val_shards, network.config
    rows = read_metrics(config.run.dir / "metrics.jsonl")
    cuda = trainer.device.type == "cuda"
    facts = [
        ("trained", f"{trainer.epoch:,} epochs, {trainer.step:,} steps of {config.train.batch_size} images"),
        ("images", f"{train.num_samples:,} train, {accuracy.samples:,} validation"),
        ("shards", f"{len(train.tars):,} train, {len(val.tars):,} validation"),
        ("classes", f"{len(val.classes):,}"),
        (
            "network",
            f"{model.variant}, towers {model.num_towers}, channels {model.conv_channels}, fc {model.fc_dim}",
        ),
        ("parameters", f"{sum(parameter.numel() for parameter in network.parameters()):,}"),
        ("device", torch.cuda.get_device_name(trainer.device) if cuda else "CPU"),
        ("processes", f"{trainer.distributed.world_size}"),
        ("versions", f"torch {torch.__version__}, DALI {dali.__version__}"),
    ]
    if trainer.best:
        error, step = trainer.best["top1_error"], trainer.best["step"]
        facts.append(("best epoch", f"centre top-1 {100 - error:.1f} %, at step {step:,.0f}"))
    return ReportData(
        run_dir=config.run.dir,
        accuracy=accuracy.rows(),
        facts=facts + summarize_speed(rows),
        rows=rows,
        steps_per_epoch=trainer.train_loader.steps_per_epoch,
        classes=val.classes,
        stats=stats,
        restore_pixels=lambda image: to_pixels(
            image * np.array(config.data.augmentation.stds), trainer.basis.mean
        ),
        towers=np.split(network.conv1.weight.detach().float().cpu().numpy(), model.num_towers),
        config=config.to_json(),
    )


def summarize_speed(rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """List (label, value) of speed and memory. Medians over the rows, as the first row includes the compilation."""
    summary = []
    for title in list(CHARTS)[len(LEARNING) :]:
        statistic = np.max if title == "Memory" else np.median
        for label, (_, values) in read_lines(rows, title).items():
            summary.append((label, f"{statistic(values):,.1f} {CHARTS[title][0]}"))
    return summary


def render_page(data: ReportData, images: dict[str, bytes]) -> bytes:
    """Render report.html, given the pictures of kernels and augmentation."""
    from jinja2 import StrictUndefined, Template

    size = data.steps_per_epoch, len(data.classes)
    few_classes = len(data.classes) <= NAMED_CLASSES
    charts = [title for title in CHARTS if read_lines(data.rows, title)]
    saturations = [compute_saturation(kernels) for kernels in data.towers]
    template = Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8")
    page = Template(template, autoescape=True, undefined=StrictUndefined).render(
        png_url=lambda png: f"data:image/png;base64,{b64encode(png).decode()}",
        name=data.run_dir.resolve().name,
        accuracy=data.accuracy,
        facts=data.facts,
        charts={title: draw_png(pictures.draw_charts, [title], data.rows, *size) for title in charts},
        colours=describe_towers(saturations),
        kernels=images["kernels"],
        saturation_chart=draw_png(pictures.draw_saturations, saturations),
        saturations=[[f"{value:.2f}" for value in tower] for tower in saturations],
        hardest=list_hardest_classes(data),
        confusion=draw_png(pictures.draw_confusion, data.stats, data.classes) if few_classes else None,
        mistakes=[build_card(example, data) for example in data.stats.mistakes],
        close_calls=[build_card(example, data) for example in data.stats.close_calls],
        augmentation=images["augmentation"],
        command=f"python -m train.run --config {quote(str(data.run_dir / 'config.yaml'))} --run.dir DIR",
        sections=[yaml.safe_dump({name: each}, sort_keys=False) for name, each in data.config.items()],
    )
    return page.encode("utf-8", "replace")  # a file's name may not be UTF-8


def compute_saturation(kernels_C3HW: np.ndarray) -> np.ndarray:
    """Compute the share of each kernel's energy (its sum of squares) that is off the grey axis, float64 (C,) in 0..1.

    With g the mean over the three channels at each place, it is 1 - sum(3 g^2) / sum(w^2): 0 where all channels are
    equal, 1 where they cancel at every place. A kernel of pure noise has about 2/3, as two of three directions in
    colour space are not grey; one of zeros counts as grey.
    """
    wide_C3HW = kernels_C3HW.astype(np.float64)
    energy_C = (wide_C3HW**2).sum((1, 2, 3))
    colour_C = ((wide_C3HW - wide_C3HW.mean(1, keepdims=True)) ** 2).sum((1, 2, 3))
    return colour_C / np.where(energy_C > 0, energy_C, 1)


def describe_towers(saturations: Sequence[np.ndarray]) -> str:
    """Test whether the towers split by colour, given the saturations of their kernels. Returns text for the page.

    The paper's figure 3 and section 6.1: kernels on one GPU were largely colour-agnostic, those on the other largely
    colour-specific, "during every run". A permutation test compares the towers' means with those of random halves of
    all kernels. Eight kernels or fewer have so few halves that they never split.
    """
    from scipy.stats import permutation_test

    means = ", ".join(f"{values.mean():.3f} in tower {tower}" for tower, values in enumerate(saturations))
    if len(saturations) == 1 or len(saturations[0]) == 1:
        return f"Mean saturation: {means}."
    test = permutation_test(
        saturations,
        lambda first, second, axis: np.abs(first.mean(axis) - second.mean(axis)),
        alternative="greater",
        rng=0,
    )
    chance = np.quantile(test.null_distribution, 1 - SIGNIFICANT)
    split = "split" if test.pvalue < SIGNIFICANT else "do not split"
    return (
        f"Mean saturation: {means}. The towers {split} by colour (p = {test.pvalue:.2g}). Random halves of the kernels "
        f"differ by more than {chance:.3f} in 1 of 100 cases."
    )


def list_hardest_classes(data: ReportData) -> list[tuple[str, str, str, str]]:
    """List the classes with the highest top-1 error: words, images, error, the class most often predicted instead."""
    words = {name.wnid: name.words for name in data.classes}
    rows = [row for row in data.stats.table(data.classes) if row["images"]]
    hardest = []
    for row in sorted(rows, key=lambda row: -row["top1_error"])[:HARDEST]:
        times = row.get("times", 0)  # not counted for many classes
        mistaken = f"{words[row['mistaken_for']]} ({times} of {row['images']})" if times else "–"
        hardest.append((row["words"], f"{row['images']:,}", f"{row['top1_error']:.1f} %", mistaken))
    return hardest


def build_card(example: Example, data: ReportData) -> dict[str, Any]:
    """Build an example's thumbnail, caption, and guesses: (class, percentage, whether it is the true one)."""
    names = [name.words.split(",")[0] for name in data.classes]
    pixels_HWC = data.restore_pixels(example.image.permute(1, 2, 0).float().numpy())
    thumbnail = BytesIO()
    Image.fromarray(pixels_HWC).resize((THUMBNAIL_SIDE, THUMBNAIL_SIDE)).save(thumbnail, "PNG")
    guesses = [
        (names[guess], f"{100 * share:.0f}", guess == example.label)
        for guess, share in zip(example.guesses, example.probabilities, strict=True)
    ]
    guess, percentage, _ = guesses[0]
    verdict = "recognized" if example.correct else f"taken for {guess}"
    caption = f"{names[example.label]}, {verdict} at {percentage}\N{NO-BREAK SPACE}%"
    return {"png": thumbnail.getvalue(), "caption": caption, "guesses": guesses}
