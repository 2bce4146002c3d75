"""The benchmark of the network times what it says."""

from pathlib import Path

import pytest
import torch

from pipeline.errors import DataError
from tests.helpers import TORCHVISION
from tests.test_bench import rows_of
from tools.benchmarks import model


def test_layers_are_torchvisions() -> None:
    """Shapes of weights in its published state dict, in its order."""
    with torch.device("meta"):
        shapes = [tuple(p.shape) for p in model.build_torchvision_alexnet().parameters() if p.ndim > 1]
    assert shapes == list(TORCHVISION.values())


@pytest.mark.slow
def test_every_contender_has_a_row(tmp_path: Path) -> None:
    """Two tables with a row for each contender."""
    model.bench_model([1], "float32", 0.05, 1, tmp_path / "rows.jsonl")
    rows = rows_of(tmp_path / "rows.jsonl")
    tables = ["training steps, batch 1", "two towers, batch 1"]
    assert list(dict.fromkeys(row["table"] for row in rows)) == tables
    assert [row["contender"] for row in rows[-3:]] == [model.TWO_DEVICES, model.ONE_GPU, model.ONE_DEVICE]
    with pytest.raises(ValueError, match="--batch-sizes"):
        model.bench_model([0], "float32", 0.01, 1, None)


@pytest.mark.slow
def test_a_lost_tower_ends_the_measurement() -> None:
    """When the other process of the pair is killed, a step raises `DataError` instead of waiting for it."""
    with (
        pytest.raises(DataError, match="the other process"),
        model.train_pair(1, torch.float32, torch.device("cpu")) as steps,
    ):
        steps[model.TWO_DEVICES]()
        (other,) = model.multiprocessing.active_children()
        other.kill()
        for _ in range(3):
            steps[model.TWO_DEVICES]()
