"""The search finds the best knobs of a machine that is made up; the program writes what a run's parser takes."""

from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.settings import Speed
from pipeline.shards import DataError
from tests.helpers import ROOT, refuses, run_ok
from tools.tune_pipeline import data_settings, table
from tools.tuning.search import Knobs, Trial, Waits, list_axes, pick, search
from train.config import parse_config


def waits(p99_ms: float, mean_ms: float = 1.0) -> Waits:
    """Figures of which the search looks at two."""
    return Waits(1000 / mean_ms, mean_ms, p99_ms, mean_ms, 200)


def distance_to(best: Knobs) -> Callable[[Knobs], Waits]:
    """A machine whose wait grows with every knob that is off."""

    def measure(knobs: Knobs) -> Waits:
        off: float = abs(knobs.threads - best.threads) + abs(knobs.prefetch - best.prefetch)
        off += abs(knobs.read_ahead - best.read_ahead) + (knobs.affinity != best.affinity)
        off += 8 * abs(knobs.hw_decoder_load - best.hw_decoder_load) + 20 * (knobs.decode != best.decode)
        return waits(p99_ms=5 + 5 * off)

    return measure


@pytest.mark.parametrize("threads", [1, 8, 16, 24])
@pytest.mark.parametrize(
    ("prefetch", "read_ahead", "affinity", "load"), [(2, 1, False, 0.65), (8, 4, True, 0.3)]
)
@pytest.mark.parametrize("decode", ["cpu", "gpu"])
def test_finds_the_optimum(
    threads: int, prefetch: int, read_ahead: int, affinity: bool, load: float, decode: str
) -> None:
    """Where knobs do not act on each other, the best of their values are found, each candidate measured once besides
    the last two, and never more of them than announced."""
    on_gpu = decode == "gpu"
    optimum = Knobs(threads, prefetch, affinity, read_ahead, load if on_gpu else Speed.hw_decoder_load, "gpu")
    optimum = optimum if on_gpu else Knobs(threads, prefetch, affinity, read_ahead)
    axes = list_axes(16, on_gpu)
    start = Knobs(16, decode="gpu" if on_gpu else "cpu")
    trials, best = search(start, axes, distance_to(optimum))
    assert best.knobs == optimum
    assert len(trials) <= 3 + sum(map(len, axes))
    again = 0 if optimum == start else 2
    tried = [trial.knobs for trial in trials[: len(trials) - again]]
    assert tried[0] == start and len(set(tried)) == len(tried)
    assert [trial.knobs for trial in trials[len(tried) :]] == [start, optimum][:again]


def test_decoding_on_the_cpu_gets_every_core() -> None:
    """Where the CPU decodes best, it is found though few threads are best for decoding on the GPU."""

    def measure(knobs: Knobs) -> Waits:
        return waits(p99_ms=(40 + knobs.threads) if knobs.decode == "gpu" else 160 / knobs.threads)

    _, best = search(Knobs(16, decode="gpu"), list_axes(16, on_gpu=True), measure)
    assert (best.knobs.threads, best.knobs.decode) == (17, "cpu")
    assert data_settings(best.knobs, on_gpu=True)["data"]["decode"] == "cpu"
    assert "hw_decoder_load" not in best.knobs.speed()


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
def test_order(figures: list[tuple[float, float]], winner: int) -> None:
    """The 99th percentile first, the mean among equals, the earlier among equals of both."""
    trials = [Trial(Knobs(number), waits(*pair)) for number, pair in enumerate(figures, start=1)]
    assert pick(trials) is trials[winner]


def test_luck_is_not_taken() -> None:
    """A candidate that was good once only gives way to the defaults."""
    lucky = iter([1.0])

    def measure(knobs: Knobs) -> Waits:
        return waits(next(lucky, 30.0) if knobs.prefetch == 8 else 20.0)

    trials, best = search(Knobs(4), [[{"prefetch": 4}, {"prefetch": 8}]], measure)
    assert best.knobs == Knobs(4) and len(trials) == 5


def test_failures_are_passed_over() -> None:
    """What fails is listed with its reason and never chosen; a first candidate that fails does not end the search; a
    mistake of ours does, and so do only failures."""

    def measure(knobs: Knobs) -> Waits:
        if knobs.prefetch == 8:
            raise DataError("out of memory\nfor 8 batches")
        if knobs.threads == 4:
            raise MemoryError
        return waits(100 / knobs.prefetch)

    trials, best = search(Knobs(4), list_axes(4, on_gpu=False), measure)
    assert best.knobs.prefetch == 4 and best.knobs.threads < 4
    assert {trial.error for trial in trials if trial.waits is None} == {"out of memory", "MemoryError"}
    text = table(trials, best)
    assert "failed: out of memory\n" in text
    assert [line.split()[1:3] for line in text.splitlines() if line.startswith("*")] == [
        [str(best.knobs.threads), "4"]
    ]

    def broken(knobs: Knobs) -> Waits:
        raise DataError(f"{knobs.prefetch} batches are gone")

    with pytest.raises(DataError, match="2 batches are gone"):
        search(Knobs(4), list_axes(4, on_gpu=False), broken)

    def mistaken(knobs: Knobs) -> Waits:
        raise KeyError(knobs)

    with pytest.raises(KeyError):
        search(Knobs(4), list_axes(4, on_gpu=False), mistaken)


def test_program(few: Path, tmp_path: Path) -> None:
    """A real run announces its time, marks one row, and writes settings that a run takes after its own configuration,
    whose other values stay; it writes over its own file."""
    out = tmp_path / "new" / "speed.yaml"
    arguments = ("--batch-size", "32", "--seconds", "0.02", "--device", "cpu", "--out", out)
    text = run_ok("tools/tune_pipeline.py", few, *arguments)
    assert " s in all" in text.splitlines()[0]
    rows = [line.removeprefix("*") for line in text.splitlines() if line.count("|") == 1][1:]
    assert len(rows) >= 6 and len([line for line in text.splitlines() if line.startswith("*")]) == 1

    base = ["--config", str(ROOT / "train/configs/quickstart.yaml")]
    place = ["--data.shards", str(few), "--run.dir", "r"]
    command = next(line for line in text.splitlines() if line.startswith("python -m train.run")).split()
    assert command[3:7] == ["--config", "BASE.yaml", "--config", str(out)]
    tuned, plain = parse_config([*base, "--config", str(out), *place]), parse_config([*base, *place])
    best = next(line for line in text.splitlines() if line.startswith("*")).split()
    speed = tuned.data.speed
    assert best[1:5] == [
        str(speed.threads),
        str(speed.prefetch),
        str(speed.affinity).lower(),
        str(speed.read_ahead),
    ]
    assert (tuned.train, tuned.model, tuned.optimizer) == (plain.train, plain.model, plain.optimizer)
    assert (
        tuned.data.augmentation == plain.data.augmentation
        and tuned.data.decode == plain.data.decode == "auto"
    )

    lines = out.read_text().splitlines()
    told = [line for line in lines if line.startswith("#")]
    assert lines[: len(told)] == told  # the comment comes first
    for what in ("machine: ", "cores: ", "gpu: none", "shards: ", "batch size: 32", "--seconds 0.02"):
        assert any(what in line for line in told), what


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [(("--seconds", "0"), "--seconds positive"), (("--out", "README.md"), "was not written by this program")],
)
def test_mistakes(tmp_path: Path, arguments: tuple[str, ...], sentence: str) -> None:
    """One sentence, exit code 2, before anything is opened."""
    assert sentence in refuses("tools/tune_pipeline.py", tmp_path, *arguments)
