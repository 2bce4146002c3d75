"""The benchmark of the network times what it says."""

from pathlib import Path

import pytest
import torch

from pipeline.errors import DataError
from tests.helpers import TORCHVISION
from tests.test_bench import rows_of
from tools.benchmarks import model
from tools.benchmarks.common import Rate


def test_torchvisions_layers() -> None:
    """Shapes of weights in its published state dict, in its order."""
    with torch.device("meta"):
        shapes = [tuple(p.shape) for p in model.build_torchvision_alexnet().parameters() if p.ndim > 1]
    assert shapes == list(TORCHVISION.values())


def test_the_claim_of_the_paper() -> None:
    """It holds in all turns, in none, or is undecided."""
    for words, rates in (("holds here", [22, 33]), ("does not hold", [10, 20]), ("undecided", [10, 60])):
        two, one = ([Rate(number, 1.0) for number in numbers] for numbers in (rates, [20, 30]))
        assert words in model.judge_claim({model.TWO_DEVICES: two, model.ONE_GPU: one})


@pytest.mark.slow
def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two tables with a row for each contender; what a pair of towers sends is docs/towers.md's formula."""
    model.bench_model([1], "float32", 0.05, 1, tmp_path / "rows.jsonl")
    rows = rows_of(tmp_path / "rows.jsonl")
    tables = ["training steps, batch 1", "two towers, batch 1"]
    assert list(dict.fromkeys(row["table"] for row in rows)) == tables
    assert [row["contender"] for row in rows[-3:]] == [model.TWO_DEVICES, model.ONE_GPU, model.ONE_DEVICE]
    megabytes = 4 * (256 * 13 * 13 + 9216 + 2 * 4096 + 500) / 1e6
    assert f"each of the two sends {megabytes:.1f} MB a step" in capsys.readouterr().out
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
