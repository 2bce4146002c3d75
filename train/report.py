"""The table that a finished run ends with."""

import statistics
from pathlib import Path

from train.evaluate import Accuracy
from train.loop import Trainer
from train.metrics import read_metrics


def report(trainer: Trainer, accuracy: Accuracy, pictures: list[Path]) -> None:
    """Print what was trained on, how well and how fast, and where the pictures lie."""
    rows = [row for row in read_metrics(trainer.config.run.dir / "metrics.jsonl") if row["kind"] == "train"]
    table = [
        ("images", f"{trainer.train_shards.num_samples} train, {accuracy.samples} validation"),
        ("shards", f"{len(trainer.train_shards.tars)} train, {len(trainer.val_shards.tars)} validation"),
    ]
    table += accuracy.rows()
    if rows:
        # Medians over the log rows: the first one holds the compilation.
        table += [
            ("training speed", f"{statistics.median(row['images_per_s'] for row in rows):.0f} images/s"),
            ("waiting for input", f"{statistics.median(row['wait_percent'] for row in rows):.1f} % of the time"),
        ]
    print()
    for name, value in table:
        print(f"{name + ':':<27} {value}")
    print("pictures:")
    for picture in pictures:
        print(f"  {picture}")
