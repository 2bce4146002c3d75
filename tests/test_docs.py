"""Commands in README, CONTRIBUTING, docs/ and the recipes are what programs take; links lead somewhere; the
reading order and the file table in docs/design.md are true."""

import ast
import re
import runpy
import shlex
import subprocess
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from jsonargparse import ArgumentParser, auto_cli, capture_parser
from torch.distributed.run import get_args_parser

import train.cli
from tests.helpers import ROOT
from tools import predict
from train.config import parse_config

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "RECORDS.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
OF_OTHERS = ("pytest", "ruff", "mypy", "tensorboard", "docker", "pip")


def commands(text: str) -> Iterator[str]:
    """Those of the fenced `sh` blocks, a line each, continued lines joined."""
    for block in re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        yield from filter(None, (line.strip() for line in block.replace("\\\n", " ").splitlines()))


def parser_of(program: Path, monkeypatch: pytest.MonkeyPatch) -> ArgumentParser:
    """The parser that a program makes, which then does not run."""
    made: list[ArgumentParser] = []

    def only_parser(functions: Any, parser_class: Any) -> None:
        made.append(capture_parser(lambda: auto_cli(functions, parser_class=parser_class)))

    with monkeypatch.context() as patched:
        patched.setattr(train.cli, "run_main", lambda main: main())
        patched.setattr(train.cli, "auto_cli", only_parser)
        runpy.run_path(str(program), run_name="__main__")
    return made[0]


def check_ours(program: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Parse the arguments of one of our programs. Raises `ValueError` or `SystemExit` for others."""
    assert program.is_file()
    if program.name == "run.py":
        for k, (before, word) in enumerate(pairwise(["", *arguments])):
            if before == "--config" and not (ROOT / word).is_file():
                arguments[k] = "paper"  # in place of the reader's own
        parse_config([word for word in arguments if word != "--print_config"])
    elif program.name == "doctor.py":
        assert set(arguments) <= {"SHARDS", "--json"}
    elif program.name == "predict.py":
        capture_parser(predict.main).parse_args(arguments)
    else:
        parser_of(program, monkeypatch).parse_args(arguments)


def module_file(name: str) -> Path:
    """Where `-m NAME` lies."""
    return ROOT / f"{name.replace('.', '/')}.py"


def check(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One command of a page."""
    words = shlex.split(command, comments=True)
    while "=" in words[0] or words[0] == "srun":  # variables, and what starts our program
        words = (
            words[1:]
            if "=" in words[0]
            else words[next(k for k, word in enumerate(words) if ".venv" in word) :]
        )
    program, *arguments = words
    if program == "make":
        names = [word for word in arguments if "=" not in word]
        assert (
            subprocess.run(["make", "-n", *names], cwd=ROOT, capture_output=True, check=False).returncode == 0
        )
    elif program == ".venv/bin/torchrun":
        parsed = get_args_parser().parse_args(arguments)
        assert parsed.module
        check_ours(module_file(parsed.training_script), parsed.training_script_args, monkeypatch)
    elif program == ".venv/bin/python" and arguments[0] == "-m" and arguments[1] not in OF_OTHERS:
        check_ours(module_file(arguments[1]), arguments[2:], monkeypatch)
    elif program == ".venv/bin/python" and arguments[0].endswith(".py"):
        check_ours(ROOT / arguments[0], arguments[1:], monkeypatch)
    else:
        assert Path(program).name in OF_OTHERS or arguments[1] in OF_OTHERS, f"what is {program}?"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is taken by the parser of its program; a setting that is none would be refused."""
    monkeypatch.chdir(ROOT)
    for command in commands(page.read_text()):
        try:
            check(command, monkeypatch)
        except (SystemExit, Exception) as error:
            pytest.fail(f"{page.name}: {command}: {error!r}")


@pytest.mark.parametrize("command", [
    ".venv/bin/python tools/make_shards.py pack RAW SHARDS --wrokers 3",
    ".venv/bin/python tools/bench.py loaders SHARDS",
    ".venv/bin/python -m train.run --config train/configs/paper.yaml --data.shards S --run.dir R --train.epoch 3",
    ".venv/bin/python tools/no_such_tool.py",
    "make quickstrat",
    ".venv/bin/torchrun --nproc-per-nod 8 -m train.run --config train/configs/paper.yaml",
])  # fmt: skip
def test_mistakes_are_seen(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the test above can fail."""
    monkeypatch.chdir(ROOT)
    with pytest.raises((SystemExit, ValueError, AssertionError)):
        check(command, monkeypatch)


@pytest.mark.parametrize(
    "recipe", sorted((ROOT / "train" / "configs").rglob("*.yaml")), ids=lambda path: path.stem
)
def test_commands_of_recipes(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those in their comments."""
    monkeypatch.chdir(ROOT)
    text = re.sub(r"\\\n#", " ", recipe.read_text())
    for line in re.findall(r"^# +(python .*)$", text, re.MULTILINE):
        check(line.replace("python", ".venv/bin/python", 1), monkeypatch)


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    headings = re.findall(
        r"^#+ (.*)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), re.MULTILINE
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: str(page.relative_to(ROOT))
)
def test_links(page: Path) -> None:
    """Files and headings that pages point to are there."""
    for target in re.findall(r"\]\(([^)#\s]*(?:#[^)\s]*)?)\)", page.read_text()):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        assert file.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(file), f"{page.name}: {target}"


def find_definition(place: str) -> tuple[Path, ast.AST]:
    """The file and the syntax tree of `file: function`, `file: Class.method` or `file`. Raises `LookupError`."""
    name, _, path = place.partition(": ")
    file = ROOT / name
    node: ast.AST = ast.parse(file.read_text())
    for part in filter(None, path.split(".")):
        found = [each for each in node.body if getattr(each, "name", "") == part]  # type: ignore[attr-defined]
        if not found:
            raise LookupError(f"{place}: no {part} in {name}")
        node = found[0]
    return file, node


def check_call(callee: str, caller: str) -> None:
    """Check one row of a reading order: both exist, the caller's file is the callee's or imports from it, and the
    caller uses its name (for `forward`, which torch calls, its file uses the class). Raises `LookupError`."""
    (file, _), (caller_file, body) = find_definition(callee), find_definition(caller)
    tree = ast.parse(caller_file.read_text())
    module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    if file != caller_file and module not in imported:
        raise LookupError(f"{caller} does not import from {module}")
    *owners, name = callee.partition(": ")[2].split(".")
    if name == "forward":
        name, body = owners[0], tree
    used = {getattr(node, "id", getattr(node, "attr", None)) for node in ast.walk(body)}
    if name not in used:
        raise LookupError(f"{caller} does not use {name}")


def reading_orders() -> list[list[tuple[str, str]]]:
    """Of docs/design.md: rows (where, called by) of packing, of tar to loss, and of one setting."""
    text = (ROOT / "docs/design.md").read_text()
    tables = re.findall(r"^\| where \| called by \|.*\n\|.*\n((?:\|.*\n)+)", text, re.MULTILINE)
    return [re.findall(r"^\| `([^`]+)` \| `([^`]+)` \|", table, re.MULTILINE) for table in tables]


def test_reading_order() -> None:
    """Every row of design.md names code that is there and calls the other; nine files at most from tar to loss,
    five from YAML to use."""
    packing, image, setting = reading_orders()
    for row in (*packing, *image, *setting):
        check_call(*row)
    counts = [len({place.partition(": ")[0] for row in rows for place in row}) for rows in (image, setting)]
    assert [len(packing), len(image), len(setting)] == [5, 9, 5]
    assert counts[0] <= 9 and counts[1] <= 5


@pytest.mark.parametrize("row", [
    ("pipeline/graph.py: read_graph", "pipeline/graph.py: val_graph"),
    ("pipeline/graph.py: no_such", "pipeline/graph.py: train_pipeline"),
    ("model/lrn.py: local_response_norm", "train/trainer.py: Trainer.train_step"),
    ("model/alexnet.py: AlexNet.forward", "train/metrics.py: StepMeter.read"),
])  # fmt: skip
def test_wrong_reading_order_is_seen(row: tuple[str, str]) -> None:
    """So that the test above can fail."""
    with pytest.raises(LookupError):
        check_call(*row)


def test_file_table() -> None:
    """docs/design.md lists every file of the four packages, by its folder, and none that is not there."""
    (table,) = re.findall(
        r"^## Files\n\n```text\n(.*?)^```", (ROOT / "docs/design.md").read_text(), re.M | re.S
    )
    listed, folders = set(), [""]
    for line in table.splitlines():
        indent, names = re.fullmatch(r"( *)(\S+(?:, \S+)*)  .*|()(\S+)", line).group(1, 2)  # type: ignore[union-attr]
        depth = len(indent or "") // 2
        for name in (names or line.split()[0]).split(", "):
            folders[depth + 1 :] = [name] if name.endswith("/") else []
            listed.add("".join(folders[: depth + 1]) + name)
    git = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    files = {
        name for name in git.stdout.split() if re.match(r"(pipeline|model|train|tools)/.*\.(py|j2)$", name)
    }
    there = {name for name in files if not name.endswith("__init__.py") and (ROOT / name).is_file()}
    assert {name for name in listed if re.search(r"\.(py|j2)$", name)} - there == set()
    assert there - listed == set()
