"""A comparison's figures are those of its runs, the shipped ablations are what their names say, and a comparison
resumes where it stopped or says why not."""

import json
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UserError
from pipeline.files import read_json, write_json
from tests.helpers import rows_of, run_ok, start_python, wait_for
from tools import ablate as program
from tools.ablate import ANY_WIDTH, Run, ablate, train_run
from tools.ablation_report import PAPER, Entry, Figures, draw_curves, format_markdown, pick_rate, read_figures
from train.cli import ABLATIONS
from train.config import flatten, parse_config

FIGURE_1 = {
    "data.augmentation.crop": "center", "data.augmentation.flip": 0, "data.augmentation.lighting.strength": 0,
    "model.dropout": 0, "optimizer.weight_decay": 0,
}  # fmt: skip
CHANGES: dict[str, dict[str, Any]] = {
    "no-lrn": {"model.lrn": "none"},
    "no-overlapping-pooling": {"model.pooling": "plain"},
    "one-gpu": {"model.towers": 1, "model.channels": [48, 128, 192, 192, 256]},
    "no-conv4": {"model.channels": [96, 256, 384, 0, 256]},
    "no-lighting": {"data.augmentation.lighting.strength": 0},
    "no-windows-and-flips": {"data.augmentation.crop": "center", "data.augmentation.flip": 0},
    "no-dropout": {"model.dropout": 0},
    "no-weight-decay": {"optimizer.weight_decay": 0},
    "unregularized": FIGURE_1,
    "relu": FIGURE_1,
    "tanh": FIGURE_1 | {"model.activation": "tanh"},
    "sigmoid": FIGURE_1 | {"model.activation": "sigmoid"},
    "abs-tanh": FIGURE_1 | {"model.activation": "abs_tanh"},
}
"""What each has to change in the paper's configuration, and nothing else. (The parameters of one-gpu and no-conv4 are
counted in test_alexnet.)"""
TINY = "--model.channels [8,16,16,16,16] --model.fc_dim 32 --train.epochs 1 --run.device cpu"


def test_shipped_ablations_change_what_they_name() -> None:
    """Over the paper's configuration each changes what its name says and nothing else; none is unknown here, and the
    default ones and those of the paper's figures are among them."""

    def settings(*more: str) -> dict[str, Any]:
        place = ["--data.shards", "s", "--run.dir", "r"]
        return flatten(parse_config(["--config", "paper", *more, *place]).to_json())

    paper, changes = settings(), {}
    for path in ABLATIONS.glob("*.yaml"):
        ablated = settings("--config", str(path))
        changes[path.stem] = {key: value for key, value in ablated.items() if value != paper[key]}
    assert changes == CHANGES and changes.keys() > {*ANY_WIDTH, *PAPER}


def rows(train: list[tuple[int, int, float]], val: list[tuple[int, int, float]]) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl from (step, epoch, error)."""
    kinds = (("train", "top1_error", train), ("eval", "centre_top1_error", val))
    found = [
        {"kind": kind, "step": s, "epoch": e, name: error} for kind, name, of in kinds for s, e, error in of
    ]
    return sorted(found, key=lambda row: int(row["step"]))


def test_figures_are_those_of_the_rows() -> None:
    """The training error is the mean of the last epoch's rows, the validation error the last one, and the epoch of the
    first row at or below the error in question is counted in steps."""
    train = [(4, 0, 90.0), (12, 1, 40.0), (16, 1, 26.0), (20, 1, 25.0), (24, 2, 30.0), (28, 2, 20.0)]
    found = read_figures(rows(train, [(10, 1, 60.0), (20, 2, 33.0), (30, 3, 35.0)]), 7, 25)
    assert found == Figures(7, 25.0, (60.0, 33.0, 35.0), 2.0) and found.val_error == 35
    assert read_figures(rows(train, [(10, 1, 60.0)]), 7, 19.9).epochs_to_error is None


def run(seed: int, train_error: float, val_error: float, epochs: float | None = None) -> Figures:
    """A run's figures."""
    return Figures(seed, train_error, (90.0, val_error), epochs)


def test_best_rate_reaches_the_error_first() -> None:
    """Fewest epochs to the error where every seed came there; else the lowest training error; never a rate at which a
    seed diverged."""
    slow, fast = [run(1, 5, 9, 3.0), run(2, 5, 9, 5.0)], [run(1, 9, 9, 3.0), run(2, 9, 9, 4.0)]
    never, once = [run(1, 20, 9), run(2, 10, 9)], [run(1, 1, 9, 1.0), run(2, 28, 9)]
    assert pick_rate("a", {0.1: slow, 0.2: fast, 0.3: once}) == Entry("a", 0.2, tuple(fast))
    assert [pick_rate("a", {0.1: one, 0.2: two}).rate for one, two in ((once, never), (never, once))] == [
        0.1,
        0.2,
    ]
    assert pick_rate("a", {0.1: slow, 0.2: [run(1, 0, 0, 1.0), None]}).rate == 0.1
    assert pick_rate("a", {0.1: [None, None]}) == Entry("a", None, ())


def test_differences_are_paired_by_seed(tmp_path: Path) -> None:
    """Differences are taken seed by seed, with their spread; the paper's stand next to them, also for an ablation that
    diverged."""
    first = Figures(1, 10.0, (30.0, 20.0), 1.5)
    base = Entry("base", 0.1, (first, run(2, 12, 30, 2.5)))
    single = Entry("one-gpu", 0.2, (run(1, 20, 21), run(2, 22, 34, 2.0)))
    entries = [base, single, Entry("no-lrn", None, ())]
    page = format_markdown(entries, 25, 359)
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if "|" in line]
    cells = {name: others for name, *others in table}
    assert cells["base"] == ["0.1", "11.0", "25.0", "+14.0", "2.0", "", ""]
    assert cells["one-gpu"] == ["0.2", "21.0", "27.5", "+6.5", "-", "+2.5 (+1.0 to +4.0)", "+1.7"]
    assert cells["no-lrn"] == ["", "diverged", "", "", "-", "", "+1.4"]
    assert "one image is 0.28 points" in page
    draw_curves(tmp_path / "a.png", entries)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_weak_comparisons_carry_a_warning() -> None:
    """A comparison warns above its table where seeds are too few to exclude chance, and where the base
    has not learned; another has no warning."""
    learned, not_yet = run(1, 9, 20, 3.0), run(1, 60, 70)
    runs = {"good": [learned] * 3, "two seeds": [learned] * 2, "short": [not_yet] * 3, "both": [not_yet]}
    pages = {name: format_markdown([Entry("base", None, tuple(of))], 25, 100) for name, of in runs.items()}
    warnings = {name: page.split("\n| ")[0].count("shows nothing") for name, page in pages.items()}
    assert warnings == {"good": 0, "two seeds": 1, "short": 1, "both": 2}


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"ablations": ["no-dropuot"]}, "--ablations no-dropuot: .* abs-tanh, no-conv4, "),
        ({"ablations": ["no-lrn", str(ABLATIONS / "no-lrn.yaml")]}, "--ablations: .* no-lrn"),
        ({"seeds": (1, 1)}, "--seeds"),
        ({"rates": []}, "--rates"),
        ({"settings": "--run.log_every 45"}, "--run.log_every 22"),
        ({"settings": "--model.lrn none"}, "no-lrn: expected a change"),
        ({"shards": Path("nowhere")}, "nowhere/train"),
    ],
)
def test_wrong_options_write_nothing(
    shards: Path, tmp_path: Path, options: dict[str, Any], field: str
) -> None:
    """One sentence that names the field, before anything is written."""
    given = {"shards": shards, "ablations": ["no-lrn"], "seeds": (1,)}
    with pytest.raises((UserError, FileNotFoundError), match=field):
        ablate(Path("quickstart"), out=tmp_path / "out", **given | options)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


@pytest.fixture
def compared(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Make the comparison of no-lrn over the quickstart in tmp_path; training writes made-up rows, and its name to
    `trained`."""
    errors = {"base-seed1": 20.0, "base-seed2": 30.0, "no-lrn-seed1": 26.0, "no-lrn-seed2": 31.0}
    trained: list[str] = []

    def train(run: Run) -> str:
        directory = run.path()
        error = errors[directory.name]
        directory.mkdir(exist_ok=True)
        lines = [json.dumps(row) for row in rows([(20, 0, error - 10)], [(44, 1, error)])]
        (directory / "metrics.jsonl").write_text("\n".join(lines))
        trained.append(directory.name)
        return "trained"

    monkeypatch.setattr(program, "train_run", train)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # that of the tests stays
    monkeypatch.setattr(program, "draw_curves", lambda path, _: path.touch())  # it takes long

    def compare(settings: str = "", seeds: tuple[int, ...] = (1, 2)) -> dict[str, Any]:
        trained.clear()
        ablate(Path("quickstart"), shards, tmp_path, ["no-lrn"], seeds, settings=f"{TINY} {settings}")
        return {"trained": [*trained], **read_json(tmp_path / "ablations.json")}

    return compare


def test_comparison_trains_only_what_is_lacking(
    compared: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """Every run is trained once, base first; the differences are those of the rows. The same command trains nothing and
    writes the same bytes, and what is lacking alone is trained. Where a run that finished had other settings, more
    epochs or other shards, the comparison is refused and nothing is written."""
    first = compared()
    assert first["trained"] == ["base-seed1", "base-seed2", "no-lrn-seed1", "no-lrn-seed2"]
    base, ablated = first["entries"]
    assert (base["val_error"], base["train_error"], base["epochs_to_error"]) == (25, 15, 20 / 44)
    assert base["difference"] is None and ablated["difference"] == {"mean": 3.5, "min": 1, "max": 6}
    assert ablated["paper"] == "+1.4" and ablated["runs"][1]["val_errors"] == [31]
    before = {path: path.read_bytes() for path in tmp_path.glob("ablations.*")}
    assert compared()["trained"] == []
    with pytest.raises(UserError, match=r"base-seed1: .*optimizer.lr.*give another OUT"):
        compared("--optimizer.lr .004")
    result = tmp_path / "no-lrn-seed2.json"
    write_json(result, read_json(result) | {"shards": "0"})
    with pytest.raises(UserError, match="no-lrn-seed2: trained on other shards"):
        compared()
    assert {path.suffix for path in before} == {".json", ".md", ".png"}
    assert all(path.read_bytes() == old for path, old in before.items())
    shutil.rmtree(tmp_path / "no-lrn-seed2")
    for name in ("base-seed2", "no-lrn-seed2"):
        (tmp_path / f"{name}.json").unlink()
    assert compared()["trained"] == ["base-seed2", "no-lrn-seed2"]
    assert len(compared("--train.epochs 2", seeds=(1,))["trained"]) == 2
    with pytest.raises(UserError, match=r"base-seed1: .*train.epochs"):
        compared()


@pytest.mark.parametrize(
    ("script", "outcome"),
    [
        ("touch $DIR/report.html", "trained"),
        ("exit 4", "diverged"),
        ("exit 3", "r: training failed with exit code 3; .*r.log"),
        ("exit 0", "r: unfinished"),
    ],
)
def test_exit_code_and_files_decide_the_outcome(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, outcome: str
) -> None:
    """Exit code and files show how a run ended: it finished, diverged, failed, or was stopped before its report, of
    which an earlier one does not count."""
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\nDIR={tmp_path}/r\n{script}\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    run = Run(
        [], parse_config(["--config", "quickstart", "--data.shards", "s", "--run.dir", f"{tmp_path}/r"])
    )
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "report.html").touch()
    if ":" not in outcome:
        assert train_run(run) == outcome
    else:
        with pytest.raises(UserError, match=outcome):
            train_run(run)


@pytest.mark.slow
def test_stopped_comparison_resumes_bitwise(shards: Path, tmp_path: Path) -> None:
    """Ctrl-C stops the run in progress, saved, with code 130; the same command resumes it, trains what is left, and
    leaves the bits of a comparison that was not stopped."""
    own = tmp_path / "one-gpu.yaml"
    own.write_text("model: {towers: 1, channels: [4, 8, 8, 8, 16]}\n")

    def command(out: Path) -> list[Any]:
        settings = TINY.replace("epochs 1", "epochs 3")
        options = ["--ablations", f"[{own}]", "--seeds", "[5]", "--settings", settings]
        return ["tools/ablate.py", "quickstart", shards, out, *options]

    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    # A shell's background jobs ignore the signal, and so would what they start.
    process = start_python(*command(stopped), preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    wait_for(lambda: rows_of(stopped / "base-seed5"), process)
    process.send_signal(signal.SIGINT)
    _, output = process.communicate(timeout=60)
    assert process.returncode == 130 and output == "error: interrupted\n"
    assert not (stopped / "base-seed5.json").exists() and not (stopped / "ablations.md").exists()
    run_ok(*command(stopped))
    run_ok(*command(whole))
    entries = [read_json(out / "ablations.json")["entries"] for out in (stopped, whole)]
    assert entries[0] == entries[1]
    assert [len(run["val_errors"]) for entry in entries[0] for run in entry["runs"]] == [3, 3]
    assert (stopped / "ablations.png").is_file() and "training," not in run_ok(*command(stopped))
