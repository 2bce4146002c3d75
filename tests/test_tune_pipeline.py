"""The search finds the best knobs of a machine that is made up; the program writes what a run's parser takes."""

from pathlib import Path

import pytest
import yaml

from pipeline.errors import DataError
from tests.helpers import ROOT, refuses, run_ok
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
from train.config import parse_config


@pytest.mark.parametrize("threads", [1, 8, 16, 24])
@pytest.mark.parametrize(("ready", "read", "load"), [(2, 1, 0.65), (8, 4, 0.3)])
@pytest.mark.parametrize("on_gpu", [False, True])
def test_finds_the_optimum(threads: int, ready: int, read: int, load: float, on_gpu: bool) -> None:
    """Where settings do not act on each other, the best of their values are found, each candidate measured once before
    the last two, and never more of them than announced."""
    default, axes = default_settings(16), list_axes(16, on_gpu)
    optimum = default | {"threads": threads, "prefetch_queue_depth": ready, "reader_queue_depth": read}
    optimum |= {"hw_decoder_load": load} if on_gpu else {}

    def measure(settings: Settings) -> Trial:
        numbers = [name for name in settings if name != "decode"]
        off = sum(abs(settings[name] - optimum[name]) for name in numbers)
        return Trial(settings, 5 + 5 * (off + 20 * (settings["decode"] != optimum["decode"])), 1.0)

    trials, best = search(default, axes, measure)
    assert best.settings == optimum
    assert len(trials) <= 3 + sum(map(len, axes))
    again = 0 if optimum == default else 2
    tried = [trial.settings for trial in trials[: len(trials) - again]]
    assert tried[0] == default and all(one not in tried[:k] for k, one in enumerate(tried))
    assert [trial.settings for trial in trials[len(tried) :]] == [default, optimum][:again]


def test_decoding_on_the_cpu_gets_every_core() -> None:
    """Where the CPU decodes best, it is found though few threads are best for decoding on the GPU."""

    def measure(settings: Settings) -> Trial:
        threads = settings["threads"]
        return Trial(settings, (40 + threads) if settings["decode"] == "auto" else 160 / threads, 1.0)

    _, best = search(default_settings(16), list_axes(16, on_gpu=True), measure)
    found = to_config(best.settings)["data"]
    assert (found["speed"]["threads"], found["decode"]) == (17, "cpu")


@pytest.mark.parametrize(
    ("figures", "winner"),
    [
        ([(10.0, 5.0), (10.9, 3.0)], 1),  # within 10 %: the mean decides
        ([(10.0, 5.0), (11.2, 3.0)], 0),
        ([(0.2, 0.2), (0.6, 0.1)], 1),  # within half a millisecond
        ([(0.2, 0.2), (0.8, 0.1)], 0),
        ([(10.9, 3.0), (10.0, 5.0), (11.5, 1.0)], 0),  # measured against the lowest, not against a neighbour
        ([(10.0, 5.0), (10.0, 4.98)], 0),  # a change has to pay
        ([(10.0, 5.0), (10.0, 4.5), (10.0, 4.5)], 1),
    ],
)
def test_p99_decides_before_the_mean(figures: list[tuple[float, float]], winner: int) -> None:
    """The 99th percentile first, the mean among equals, the earlier among equals of both."""
    trials = [Trial({}, *pair) for pair in figures]
    assert pick_best([Trial({}, error="out of memory"), *trials]) is trials[winner]


def test_one_lucky_measurement_does_not_win() -> None:
    """A candidate that was good once only gives way to the defaults."""
    lucky = iter([1.0])

    def measure(settings: Settings) -> Trial:
        return Trial(settings, next(lucky, 30.0) if settings["prefetch_queue_depth"] == 8 else 20.0, 1.0)

    trials, best = search(
        default_settings(4), [[{"prefetch_queue_depth": 4}, {"prefetch_queue_depth": 8}]], measure
    )
    assert best.settings == default_settings(4) and len(trials) == 5


def test_failed_settings_are_listed_and_not_chosen() -> None:
    """What fails is listed with its reason and never chosen; a first candidate that fails does not end the search; a
    mistake of ours does, and so do only failures."""

    def measure(settings: Settings) -> Trial:
        if settings["prefetch_queue_depth"] == 8:
            raise DataError("out of memory\nfor 8 batches")
        if settings["threads"] == 4:
            raise MemoryError
        return Trial(settings, 100 / settings["prefetch_queue_depth"], 1.0)

    trials, best = search(default_settings(4), list_axes(4, on_gpu=False), measure)
    assert best.settings["prefetch_queue_depth"] == 4 and best.settings["threads"] < 4
    assert {trial.error for trial in trials if trial.error} == {"out of memory", "MemoryError"}
    assert "| out of memory\n" in format_table(trials)

    def fail(settings: Settings) -> Trial:
        raise DataError(f"{settings['prefetch_queue_depth']} batches are gone")

    with pytest.raises(DataError, match="2 batches are gone"):
        search(default_settings(4), list_axes(4, on_gpu=False), fail)

    def mistake(settings: Settings) -> Trial:
        raise KeyError(settings)

    with pytest.raises(KeyError):
        search(default_settings(4), list_axes(4, on_gpu=False), mistake)


def test_written_settings_are_taken_by_a_run(few: Path, tmp_path: Path) -> None:
    """A real run writes settings that a run takes after its own configuration, whose other values stay, and where they
    come from; it writes over its own file."""
    out = tmp_path / "new" / "speed.yaml"
    arguments = ("--batch-size", "32", "--seconds", "0.02", "--out", out)
    text = run_ok("tools/tune_pipeline.py", few, *arguments)
    lines = out.read_text().splitlines()
    about = [line for line in lines if line.startswith("#")]
    assert lines[: len(about)] == about and any("--seconds 0.02" in line for line in about)
    settings = yaml.safe_load(out.read_text())
    assert yaml.safe_dump(settings, sort_keys=False) in text
    base = ["--config", str(ROOT / "train/configs/quickstart.yaml")]
    place = ["--data.shards", str(few), "--run.dir", "r"]
    tuned, plain = parse_config([*base, "--config", str(out), *place]), parse_config([*base, *place])
    assert {name: getattr(tuned.data.speed, name) for name in settings["data"]["speed"]} == settings["data"][
        "speed"
    ]
    assert (tuned.train, tuned.model, tuned.optimizer) == (plain.train, plain.model, plain.optimizer)
    assert tuned.data.augmentation == plain.data.augmentation
    run_ok("tools/tune_pipeline.py", few, *arguments)


@pytest.mark.parametrize(("option", "value"), [("--seconds", "0"), ("--out", "README.md")])
def test_wrong_options_are_named(tmp_path: Path, option: str, value: str) -> None:
    """One sentence that names the option, exit code 2, before anything is opened."""
    assert option in refuses("tools/tune_pipeline.py", tmp_path, option, value)
