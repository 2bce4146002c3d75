"""The search finds the best knobs of a machine that is made up; the program writes what a run's parser takes."""

from pathlib import Path
from unittest.mock import Mock

import pytest
import yaml

from pipeline.errors import DataError
from tests.helpers import refuses, run_ok
from tools.tune_pipeline import (
    Settings,
    Trial,
    default_settings,
    format_table,
    list_axes,
    pick_best,
    search,
    to_config,
)
from train.config import flatten, parse_config


@pytest.mark.parametrize("threads", [1, 8, 24])
@pytest.mark.parametrize(("ready", "read", "load"), [(2, 4, 0.65), (8, 16, 0.3)])
@pytest.mark.parametrize("on_gpu", [False, True])
def test_finds_the_optimum(threads: int, ready: int, read: int, load: float, on_gpu: bool) -> None:
    """Where settings do not act on each other, the best of their values are found, each candidate measured once before
    the last two, and never more of them than announced."""
    default, axes = default_settings(16), list_axes(16, on_gpu)
    optimum = default | {"threads": threads, "prefetch_queue_depth": ready, "reader_queue_depth": read}
    optimum |= {"hw_decoder_load": load} if on_gpu else {}

    def measure(settings: Settings) -> Trial:
        off = sum(abs(settings[name] - optimum[name]) for name in settings if name != "decode")
        return Trial(settings, 5 + 5 * (off + 20 * (settings["decode"] != optimum["decode"])), 1.0)

    trials, best = search(default, axes, measure)
    tried = [trial.settings for trial in trials]
    assert best.settings == optimum and len(trials) <= 3 + sum(map(len, axes))
    if optimum != default:  # these two decide
        assert tried[-2:] == [default, optimum]
        tried = tried[:-2]
    assert tried[0] == default and all(one not in tried[:k] for k, one in enumerate(tried))


def test_settings_that_act_on_each_other() -> None:
    """Where the CPU decodes best, it is found though few threads are best for decoding on the GPU; a candidate that was
    good once only gives way to the defaults."""

    def measure(settings: Settings) -> Trial:
        threads = settings["threads"]
        return Trial(settings, (40 + threads) if settings["decode"] == "auto" else 160 / threads, 1.0)

    _, best = search(default_settings(16), list_axes(16, on_gpu=True), measure)
    found = to_config(best.settings)["data"]
    assert (found["speed"]["threads"], found["decode"]) == (17, "cpu")
    luck = iter([20.0, 1.0])  # the defaults, then another
    trials, best = search(
        default_settings(4), [[{"threads": 8}]], lambda settings: Trial(settings, next(luck, 30.0), 1.0)
    )
    assert best.settings == default_settings(4) and len(trials) == 4


@pytest.mark.parametrize(
    ("figures", "winner"),
    [
        ([(10.0, 5.0), (10.9, 3.0)], 1),  # within 10 %: the mean decides
        ([(10.0, 5.0), (11.2, 3.0)], 0),
        ([(0.2, 0.2), (0.6, 0.1)], 1),  # within half a millisecond
        ([(10.9, 3.0), (10.0, 5.0), (11.5, 1.0)], 0),  # measured against the lowest, not against a neighbour
        ([(10.0, 5.0), (10.0, 4.98)], 0),  # a change has to pay
        ([(10.0, 5.0), (10.0, 4.5), (10.0, 4.5)], 1),
    ],
)
def test_p99_decides_before_the_mean(figures: list[tuple[float, float]], winner: int) -> None:
    """The 99th percentile first, the mean among equals, the earlier among equals of both."""
    trials = [Trial({}, *pair) for pair in figures]
    assert pick_best([Trial({}, error="out of memory"), *trials]) is trials[winner]


def test_failed_settings_are_listed_and_not_chosen() -> None:
    """What fails is listed with its reason and never chosen; only failures end the search, and so does a mistake of
    ours."""

    def measure(settings: Settings) -> Trial:
        if settings["prefetch_queue_depth"] == 8:
            raise DataError("out of memory\nfor 8 batches")
        if settings["threads"] == 4:  # that of the defaults, too
            raise MemoryError
        return Trial(settings, 100 / settings["prefetch_queue_depth"], 1.0)

    trials, best = search(default_settings(4), list_axes(4, on_gpu=False), measure)
    assert best.settings["prefetch_queue_depth"] == 4 and best.settings["threads"] < 4
    assert {trial.error for trial in trials if trial.error} == {"out of memory", "MemoryError"}
    assert "| out of memory\n" in format_table(trials)
    for error, raised in ((RuntimeError("no batches"), DataError), (KeyError("mistake"), KeyError)):
        with pytest.raises(raised, match=str(error.args[0])):
            search(default_settings(4), [], Mock(side_effect=error))


@pytest.mark.slow
def test_written_settings_are_taken_by_a_run(few: Path, tmp_path: Path) -> None:
    """A real run writes settings that a run takes after its own configuration, whose other values stay, and where they
    come from; it writes over its own file, and no other."""
    out = tmp_path / "new" / "speed.yaml"
    arguments = ("--batch-size", "32", "--seconds", "0.02", "--out", out)
    text = run_ok("tools/tune_pipeline.py", few, *arguments)
    assert "--seconds 0.02" in out.read_text()
    settings = yaml.safe_load(out.read_text())
    assert yaml.safe_dump(settings, sort_keys=False) in text
    base, place = ["--config", "quickstart"], ["--data.shards", str(few), "--run.dir", "r"]
    tuned, plain = (
        flatten(parse_config([*base, *more, *place]).to_json()) for more in (["--config", str(out)], [])
    )
    assert tuned == plain | flatten(settings)
    run_ok("tools/tune_pipeline.py", few, *arguments)
    out.write_text("mine: 1\n")
    assert "--out" in refuses("tools/tune_pipeline.py", few, *arguments)
