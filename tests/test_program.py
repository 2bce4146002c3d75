"""Exit codes tell how a program ended; only a user's mistake hides the traceback."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT, refuses, run_ok, run_python
from train.cli import BROKEN_PIPE, DIVERGED

CASES = {
    "raise ValueError('give a folder')": (2, "error: give a folder\n"),
    "raise FileNotFoundError('no such shard')": (2, "error: no such shard\n"),
    "from pipeline.errors import DataError; raise DataError('shard 3 is cut')": (
        3,
        "error: shard 3 is cut\n",
    ),
    "raise DivergedError('the loss is nan')": (4, "error: the loss is nan\n"),
    r"raise ValueError('\x1b[2Ja\nb\x00')": (2, "error: \\x1b[2Ja b\\x00\n"),
    "raise ValueError('give ' + 'x' * 10**6 + '; a remedy')": (
        2,
        f"error: give {'x' * 995} ... {'x' * 490}; a remedy\n",
    ),
    "open('/proc/none/file')": (
        2,
        "error: cannot use /proc/none/file: No such file or directory; give another place or set its permissions\n",
    ),
    "pass": (0, ""),
}


@pytest.mark.parametrize("body", CASES)
def test_exit_codes(body: str, capsys: pytest.CaptureFixture[str]) -> None:
    """0, 2, 3 and 4, each with one line."""
    place = ROOT / "tools" / "__init__.py"  # a ValueError is the user's only if raised in one of our rooms
    text = f"from train.cli import *\ndef main() -> None:\n    {body}\nexit_with(main)\n"
    with pytest.raises(SystemExit) as ended:
        exec(compile(text, str(place), "exec"), {})
    assert (ended.value.code, capsys.readouterr().err) == CASES[body]


def test_a_librarys_value_error() -> None:
    """It keeps its traceback: the mistake is ours."""
    done = run_python("-c", "from train.cli import run_main; import json; run_main(lambda: json.loads('{'))")
    assert done.returncode == 1 and "Traceback" in done.stderr


def test_help_of_every_program() -> None:
    """Each program explains itself in plain words and with dashed options, as a script and as a module."""
    programs = [path for path in (ROOT / "tools").glob("*.py") if "__main__" in path.read_text()]
    assert len(programs) >= 9
    for path in programs:
        assert "usage:" in run_ok("-m", f"tools.{path.stem}", "--help")
    for form in (["tools/make_shards.py"], ["-m", "tools.make_shards"]):
        assert "--samples-per-shard" in run_ok(*form, "pack", "--help", run=run_python)
    told = refuses("tools/bench.py", "model", "--batch-sizes", "[0]")  # a list
    assert "--batch-sizes" in told


HEAVY = {"torch", "nvidia.dali", "matplotlib.pyplot", "scipy", "sklearn", "webdataset"}
PROGRAMS = sorted(
    f"tools.{path.stem}" for path in (ROOT / "tools").glob("*.py") if "__main__" in path.read_text()
)


@pytest.mark.parametrize("program", [*PROGRAMS, "train.run", "train.evaluate"])
def test_help_comes_at_once(program: str) -> None:
    """--help of no program imports a library that takes long."""
    code = f"""import runpy, sys
sys.argv = ["program", "--help"]
try:
    runpy.run_module("{program}", run_name="__main__")
except SystemExit as ended:
    assert ended.code == 0
print(sorted({HEAVY} & sys.modules.keys()))"""
    assert run_python("-c", code).stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    "words", ["tools/make_shards.py pack a b", "tools/doctor.py", "-m train.run --config paper"]
)
def test_outside_of_the_environment(tmp_path: Path, words: str) -> None:
    """A Python without our packages says how to get into the environment, with code 2 and no traceback."""
    run_ok("-m", "venv", "--without-pip", tmp_path, run=run_python)
    command = [tmp_path / "bin/python", *words.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and ".venv/bin/python" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("options", "reason"),
    [(["--train.epoch", "3"], "unrecognized arguments"), (["--data.shards", "/nowhere"], "/nowhere/train")],
)
def test_a_mistake_under_torchrun(tmp_path: Path, options: list[str], reason: str) -> None:
    """torchrun's summary ends with the sentence that tells what was wrong."""
    place = ["--data.shards", str(tmp_path), "--run.dir", str(tmp_path / "run"), *options]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = run_python(*torchrun, "-m", "train.run", "--config", "quickstart", *place)
    *_, last, rule = done.stderr.strip().splitlines()
    assert done.returncode and set(rule.strip()) == {"="} and reason in last


VALUES = {
    ("--train.epochs", "x"): "a whole number, not x",
    ("--optimizer.lr", "x"): "a number, not x",
    ("--train.compile", "maybe"): "true or false, not maybe",
    ("--model.lrn", "x"): "one of none, paper, original, or null, not x",
    ("--model.channels", "[1, 2]"): "a list in brackets of whole numbers, 5 of them, or null, not [1, 2]",
    ("--optimizer.steps", "[a]"): "a list in brackets of whole numbers, not a",
    (
        "--model",
        "no.yaml",
    ): "its fields one by one, or the name of a YAML file with them; what was given is neither",
    ("--train.seed", ""): "a whole number, not nothing",
    ("--train.seed", "'Got value: 7'"): "a whole number, not Got value: 7",
    ("--train.seed", 'Unable to load config "zz"'): 'a whole number, not Unable to load config "zz"',
}


@pytest.mark.parametrize(("option", "value"), VALUES)
def test_wrong_values_in_plain_words(option: str, value: str) -> None:
    """What an option takes is said as a user would, not as Python does."""
    told = refuses(
        "-m", "train.run", "--config", "quickstart", option, value, "--data.shards", "s", "--run.dir", "r"
    )
    assert told == f"error: {option} takes {VALUES[option, value]} (--help lists every option)\n"


def test_wrong_values_within() -> None:
    """What is wrong in a section or a list given whole is called by its name, not as an option that there is not."""
    for option, value, told in (
        ("--model", "{lrn: foo}", "model.lrn takes one of none, paper, original, or null, not foo"),
        ("--optimizer.changes", "[{epoch: a, lr: 1}]", "epoch takes a whole number, not a"),
    ):
        words = (
            "-m",
            "train.run",
            "--config",
            "quickstart",
            option,
            value,
            "--data.shards",
            "s",
            "--run.dir",
            "r",
        )
        assert f"error: {told}" in refuses(*words)


TALKATIVE = """
from tqdm import tqdm
from train.cli import *
def main():
    for _ in range(100):
        print("x" * 100_000, flush=True)
        tqdm.write("x")
        tqdm(range(9)).update()
    raise DivergedError("the loss is nan")
if sys.argv[1:]:
    outlive_full_disk()
run_main(main)
"""


@pytest.mark.parametrize("unbuffered", ["", "-u"])
def test_a_full_disk_under_the_log(unbuffered: str) -> None:
    """A program that asked for it works on where neither output can be written, and ends with its own code; another
    one ends at its first word. A reader that leaves ends it all the same."""
    codes = []
    for command in ("> /dev/full 2>&1", "outlives > /dev/full 2>&1", "outlives 2>/dev/full | head -c 9"):
        command = f"set -o pipefail; {shlex.quote(sys.executable)} {unbuffered} -c {shlex.quote(TALKATIVE)} {command}"
        codes.append(
            subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, check=False).returncode
        )
    assert codes[0] in (2, 120) and codes[1:] == [
        DIVERGED,
        BROKEN_PIPE,
    ]  # 120: Python's own, where it cannot flush


def test_a_reader_that_leaves(shards: Path) -> None:
    """`| head -1` ends the program without a word."""
    command = f"'{sys.executable}' -u tools/make_shards.py stats '{shards}' | head -1"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) == 1 and done.stderr == ""


def test_a_killed_worker() -> None:
    """One sentence and exit code 2, from whatever pool of processes."""
    code = (
        "import os\n"
        "from concurrent.futures import ProcessPoolExecutor\n"
        "from train.cli import run_main\n"
        "run_main(lambda: ProcessPoolExecutor(1).submit(os._exit, 9).result())\n"
    )
    done = run_python("-c", code)
    assert done.returncode == 2 and done.stderr.startswith("error: a worker process was killed"), done.stderr
