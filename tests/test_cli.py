"""Programs end with the code and one sentence of their error; settings are read strictly; recipes have names."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.errors import DataError, UserError
from tests.helpers import ROOT, TORCHRUN, TRAIN, refuses, run_ok, run_python, train_refuses
from train.cli import BROKEN_PIPE, DIVERGED, RECIPES, DivergedError, find_recipe, run_main
from train.config import parse_config

PROGRAMS = [f"tools.{path.stem}" for path in (ROOT / "tools").glob("*.py") if "__main__" in path.read_text()]
RUN = ("--config", "quickstart", "--data.shards", "s", "--run.dir", "r")
ENDS: list[tuple[BaseException, int, str]] = [
    (UserError("give a folder"), 2, "error: give a folder\n"),
    (FileNotFoundError("no such shard"), 2, "error: no such shard\n"),
    (DataError("shard 3 is cut"), 3, "error: shard 3 is cut\n"),
    (DivergedError("the loss is nan"), 4, "error: the loss is nan\n"),
    (KeyboardInterrupt(), 130, "error: interrupted\n"),
    (UserError("\x1b[2Ja\nb\x00"), 2, "error: \\x1b[2Ja b\\x00\n"),
    (UserError(f"give {'x' * 10**6}; do"), 2, f"error: give {'x' * 995} ... {'x' * 496}; do\n"),
    (OSError(2, "None", "f"), 2, "error: cannot use f: None; give another path\n"),
    (OSError(28, "Full", "f"), 2, "error: cannot use f: Full; free some space and run it again\n"),
]


@pytest.mark.parametrize(("error", "code", "message"), ENDS)
def test_exit_codes(
    error: BaseException, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each kind of error has its code and costs one short line of printable characters."""

    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as ended:
        run_main(main)
    assert (ended.value.code, capsys.readouterr().err) == (code, message)


def test_a_mistake_of_ours_keeps_its_traceback() -> None:
    """A library's ValueError is not taken for the user's."""
    with pytest.raises(json.JSONDecodeError):
        run_main(lambda: json.loads("{"))


def test_a_killed_worker() -> None:
    """One sentence and code 2, from a real pool of processes."""
    code = "import os; from concurrent.futures import ProcessPoolExecutor; from train.cli import run_main;"
    done = run_python("-c", code + "run_main(lambda: ProcessPoolExecutor(1).submit(os._exit, 9).result())")
    assert done.returncode == 2 and done.stderr.startswith("error: a worker process was killed"), done.stderr


def test_a_full_disk_under_the_log() -> None:
    """A program that logs where nothing can be written works on, and ends with its own code."""
    text = "from train.cli import *\ndef main():\n    for _ in range(100):\n        log('x' * 1000)\n"
    text += "    raise DivergedError('nan')\nrun_main(main)"
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([sys.executable, "-c", text], cwd=ROOT, stdout=full, stderr=full, check=False)
    assert done.returncode == DIVERGED


def test_a_reader_that_leaves() -> None:
    """`| head -1` ends a program that prints more than a pipe holds, without a word, with the code of SIGPIPE."""
    text = "from train.cli import *\ndef main():\n    for _ in range(100_000):\n        print('x')\nrun_main(main)"
    command = f"set -o pipefail; {shlex.quote(sys.executable)} -c {shlex.quote(text)} | head -1"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr, done.stdout.count("\n")) == (BROKEN_PIPE, "", 1)


def test_help_comes_at_once() -> None:
    """--help of every program works, and imports no library that takes long."""
    code = f"""import runpy, sys
for program in {[*PROGRAMS, "train.run", "train.evaluate"]}:
    sys.argv = [program, "--help"]
    try:
        runpy.run_module(program, run_name="__main__")
    except SystemExit as ended:
        assert ended.code == 0, program
    heavy = {{"torch", "nvidia.dali", "matplotlib.pyplot", "scipy", "sklearn", "webdataset"}}
    assert not heavy & sys.modules.keys(), program"""
    assert run_ok("-c", code, run=run_python).lower().count("usage: ") >= len(PROGRAMS) + 2


def test_outside_of_the_environment(tmp_path: Path) -> None:
    """A Python without our packages says how to get into the environment, with code 2 and no traceback."""
    run_ok("-m", "venv", "--without-pip", tmp_path, run=run_python)
    for words in ("tools/make_shards.py pack a b", "tools/doctor.py", "-m train.run --config paper"):
        command = [tmp_path / "bin/python", *words.split()]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 2 and ".venv/bin/python" in done.stderr, done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("options", "reason"),
    [(["--train.epoch", "3"], "unrecognized arguments"), (["--data.shards", "/nowhere"], "/nowhere/train")],
)
def test_a_mistake_under_torchrun(tmp_path: Path, options: list[str], reason: str) -> None:
    """torchrun's summary ends with the sentence that says what was wrong, which is printed once."""
    place = ["--data.shards", str(tmp_path), "--run.dir", str(tmp_path / "run")]
    done = run_python(*TORCHRUN, *TRAIN, *RUN[:2], *place, *options)
    *_, last, rule = done.stderr.strip().splitlines()
    assert done.returncode and set(rule.strip()) == {"="} and reason in last
    assert len([line for line in done.stderr.splitlines() if line.startswith("error: ")]) == 1


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--train.epochs", "x", "--train.epochs: expected an integer, got x"),
        ("--train.seed", "", "--train.seed: expected an integer, got nothing"),
        ("--train.compile", "maybe", "--train.compile: expected true or false, got maybe"),
        ("--model.channels", "[1]", "--model.channels: expected a list in brackets of 5 values, got [1]"),
        ("--model", "no.yaml", "--model: expected settings, or the name of a YAML file with some"),
        ("--model", "{lrn: foo}", "model.lrn: expected one of none, paper, original, got foo"),
    ],
)
def test_wrong_values_in_plain_words(option: str, value: str, message: str) -> None:
    """An option's type is described as a user would, not as Python does."""
    assert f"{message} (--help lists every option)\n" in train_refuses(*RUN, option, value)


MISTAKES = {
    b"# gr\xfc\n": "expected YAML in UTF-8",
    b"[" * 100_000: "expected YAML in UTF-8",
    b"# nothing yet\n": "expected settings",
    b"train: [1\n": "line 2: while parsing a flow sequence",
    b"train: {seed: !!python/object/apply:os.system [id]}\n": "line 1: could not determine a constructor",
    b"train: {lr: 3}\n": "train.lr",
    b"optimizer: {lr: 1}\n\noptimizer: {momentum: 0}\n": "line 3: optimizer is set a second time; keep one",
    b"optimizer:\ntrain: {seed: 1}\n": "expected settings below optimizer, got None",
    b"<<: {optimizer: 3}\n": "expected settings below optimizer, got 3",
    b"model:\n  fc_dim:\n": "model.fc_dim has no value; give one, or leave it out",
    b"train: {seed: one}\n": "train.seed: expected an integer, got one",
    b"model: &m {fc_dim: 1, channels: [*m]}\n": "line 1: an alias is within what it repeats",
}


@pytest.mark.parametrize("text", MISTAKES, ids=lambda text: text[:20].decode(errors="replace"))
def test_mistakes_name_the_file(text: bytes, tmp_path: Path) -> None:
    """Of two files the one that is wrong, in one sentence; and what is wrong there."""
    path = tmp_path / "mine.yaml"
    path.write_bytes(text)
    message = train_refuses("--config", "quickstart", "--config", path, *RUN[2:])
    assert message.startswith(f"error: {path}") and MISTAKES[text] in message


def test_other_programs_and_other_files(tmp_path: Path) -> None:
    """Tools and their subcommands read files as strictly; so is a section read that lies in a file of its own."""
    path, section = tmp_path / "mine.yaml", tmp_path / "section.yaml"
    path.write_text("seed: 1\nseed: 2\n")
    for program in (("tools/preview.py",), ("tools/bench.py", "train")):
        assert f"error: {path}, line 2: seed is set" in refuses(*program, "--config", path, "s")
    path.write_text("model: {fc_dim: 4}\noptimizer: section.yaml\n")
    section.write_text("lr:\n")
    assert f"error: {section}: optimizer.lr has no value" in train_refuses("--config", path, *RUN[2:])


def test_good_files_pass(tmp_path: Path) -> None:
    """A BOM, anchors, a merge that a key overrides, a section in another file, text of digits, null where that is a
    value; the later file wins."""
    (tmp_path / "section.yaml").write_text("lr: 0.25\n")
    text = "data: {augmentation: {lighting: {strength: &a 0.5, off_epoch: 3}, flip: *a}}\noptimizer: section.yaml\n"
    text += "train: {<<: {seed: 0, epochs: 9}, epochs: 4, init_from: '007'}\n"
    text += "model: {fc_dim: 20, channels: ~, lrn: }  # \N{SNOWMAN}\n"
    path = tmp_path / "mine.yaml"
    path.write_text(text, "utf-8-sig")
    config = parse_config(["--config", "quickstart", "--config", str(path), *RUN[2:]])
    lighting = config.data.augmentation.lighting
    assert (config.train.seed, config.train.epochs, config.train.init_from) == (0, 4, Path("007"))
    assert (config.model.fc_dim, config.model.channels, config.model.lrn) == (20, None, None)
    assert (config.optimizer.lr, lighting.strength, config.data.augmentation.flip) == (0.25, 0.5, 0.5)


def test_home_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`~` at the beginning of any path is the home folder: in a word, after `=`, in YAML, in the place of a YAML file;
    `./~` is a name. Without a home folder it is refused, and no folder called `~` is made."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "c.yaml").write_text("data: {shards: ~/s}\nrun:\n  dir: ~/runs/b\noptimizer: ~/o.yaml\n")
    (tmp_path / "o.yaml").write_text("lr: 0.25\n")
    more = ["--train.init_from=~/w", "--data.eigenbasis", "./~/p"]
    config = parse_config(["--config", "quickstart", "--config=~/c.yaml", *more])
    assert (config.data.shards, config.run.dir) == (tmp_path / "s", tmp_path / "runs" / "b")
    assert (config.train.init_from, config.data.eigenbasis) == (tmp_path / "w", Path("~/p"))
    assert config.optimizer.lr == 0.25
    programs = [
        ("tools/make_shards.py", "stats", "~/s"),
        ("tools/make_shards.py", "adopt", "~/s", "s", "--split=val", "--pattern=*"),
        ("tools/bench.py", "loader", "~/s"),
        ("tools/export_weights.py", "r", "~/s"),
        ("tools/predict.py", "~/s", ROOT / "docs"),
        ("tools/predict.py", "r", "~/s/x"),
        ("tools/tune_pipeline.py", "s", "--out=~/s"),
        ("-m", "train.evaluate", "r", "s", "--per-class=~/s"),
        ("-m", "train.run", "--run.dir=~/s"),
        ("-m", "train.run", *RUN[:2], "--data.shards=~/s", "--run.dir=~/r"),
    ]
    (tmp_path / "s").touch()
    for words in programs:
        assert f"{tmp_path}/s" in refuses(*words), words
        nobody = [word.replace("~", "~no-such-user") if isinstance(word, str) else word for word in words]
        message = refuses(*nobody)
        assert "~no-such-user/" in message and "; give the whole path" in message, message
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    assert "--train.init_from: ~/w: expected a user with" in train_refuses(*RUN, "--train.init_from", "~/w")
    assert not (ROOT / "~").exists()


def test_recipes_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours are found from everywhere; a file of that name comes first, a directory does not; the error lists ours."""
    monkeypatch.chdir(tmp_path)
    assert find_recipe("paper") == find_recipe("paper.yaml") == RECIPES / "paper.yaml"
    assert find_recipe("no-lrn") == RECIPES / "ablations" / "no-lrn.yaml"
    (tmp_path / "paper").mkdir()
    (tmp_path / "fast").write_text("train: {epochs: 3}\n")
    assert find_recipe("paper") == RECIPES / "paper.yaml" and find_recipe("fast") == Path("fast")
    with pytest.raises(FileNotFoundError, match=r"papper: .* alexnet2012, fast, paper"):
        find_recipe("papper")
