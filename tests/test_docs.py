"""Commands in README, CONTRIBUTING, docs/ and the recipes are accepted by their programs; links lead somewhere; the
tables of docs/design.md (paths of an image and of a setting, files) are true."""

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

PAGES = [ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "RECORDS", "CHANGELOG")]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
RECIPES = sorted((ROOT / "train" / "configs").rglob("*.yaml"))
DESIGN = (ROOT / "docs/design.md").read_text()
EXTERNAL = {"pytest", "ruff", "mypy", "tensorboard", "docker", "pip"}


def commands(page: Path) -> Iterator[str]:
    """Lines of a page's `sh` blocks, or the commands in comments of a recipe; continued lines are joined."""
    text = page.read_text()
    if page.suffix == ".yaml":
        found = re.findall(r"^# +(python .*)$", re.sub(r"\\\n#", " ", text), re.M)
        yield from (f".venv/bin/{line}" for line in found)
    for block in re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S):
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


def check(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One command of a page."""
    words = shlex.split(command, comments=True)
    while "=" in words[0]:
        del words[0]
    if words[0] == "srun":  # and what it starts
        del words[: next(k for k, word in enumerate(words) if ".venv" in word)]
    program, *arguments = words
    if program == ".venv/bin/torchrun":
        parsed = get_args_parser().parse_args(arguments)
        assert parsed.module
        program, arguments = ".venv/bin/python", ["-m", parsed.training_script, *parsed.training_script_args]
    if program == "make":
        names = [word for word in arguments if "=" not in word]
        subprocess.run(["make", "-n", *names], cwd=ROOT, capture_output=True, check=True)
    elif EXTERNAL & {Path(program).name, *arguments[:2]}:
        pass
    elif program == ".venv/bin/python" and arguments[0] == "-m":
        check_ours(ROOT / f"{arguments[1].replace('.', '/')}.py", arguments[2:], monkeypatch)
    else:
        assert program == ".venv/bin/python", f"what is {program}?"
        check_ours(ROOT / arguments[0], arguments[1:], monkeypatch)


@pytest.mark.parametrize("page", [*PAGES, *RECIPES], ids=lambda page: str(page.relative_to(ROOT)))
def test_commands(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is taken by the parser of its program; a setting that is none would be refused."""
    monkeypatch.chdir(ROOT)
    for command in commands(page):
        try:
            check(command, monkeypatch)
        except (SystemExit, Exception) as error:
            pytest.fail(f"{page.name}: {command}: {error!r}")


@pytest.mark.parametrize("command", [
    ".venv/bin/python tools/make_shards.py pack RAW SHARDS --wrokers 3",
    ".venv/bin/torchrun -m train.run --config train/configs/paper.yaml --data.shards S --run.dir R --train.epoch 3",
    ".venv/bin/python tools/no_such_tool.py",
    "make quickstrat",
    ".venv/bin/torchrun --nproc-per-nod 8 -m train.run --config train/configs/paper.yaml",
])  # fmt: skip
def test_mistakes_are_seen(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the test above can fail."""
    monkeypatch.chdir(ROOT)
    with pytest.raises((SystemExit, ValueError, AssertionError, subprocess.CalledProcessError)):
        check(command, monkeypatch)


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page: Path) -> None:
    """Files and headings that pages point to are there."""
    for target in re.findall(r"\]\(([^)#\s]*(?:#[^)\s]*)?)\)", page.read_text()):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        assert file.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(file), f"{page.name}: {target}"


def find_definition(step: str) -> ast.AST:
    """The module, function, class or method of `file`, `file: name` or `file: Class.name`. Raises `StopIteration`."""
    file, _, name = step.partition(": ")
    node: Any = ast.parse((ROOT / file).read_text())
    for part in filter(None, name.split(".")):
        node = next(each for each in node.body if getattr(each, "name", "") == part)
    return node  # type: ignore[no-any-return]


def names_in(node: ast.AST) -> set[str]:
    """Every name and attribute that code uses or imports."""
    names = {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}
    names |= {each.attr for each in ast.walk(node) if isinstance(each, ast.Attribute)}
    return names | {each.name for each in ast.walk(node) if isinstance(each, ast.alias)}


def calls(caller: str, step: str) -> bool:
    """Whether one calls the other by its name, and imports its file if that is another; `forward` is called by PyTorch,
    for files that use its class."""
    find_definition(step)
    file, caller_file = (each.partition(": ")[0] for each in (step, caller))
    definition, module = find_definition(caller), find_definition(caller_file)
    imported = {str(node.module) for node in ast.walk(module) if isinstance(node, ast.ImportFrom)}
    *owner, name = step.partition(": ")[2].split(".")
    used = owner[0] in names_in(module) if name == "forward" else name in names_in(definition)
    return used and (file == caller_file or file.removesuffix(".py").replace("/", ".") in imported)


@pytest.mark.parametrize(("thing", "most"), [("image", 9), ("setting", 5)])
def test_paths(thing: str, most: int) -> None:
    """Each step exists and is called where the tables say; from tar to loss, and from YAML to use, few files."""
    (section,) = re.findall(rf"^## The path of one {thing}\n(.*?)^## ", DESIGN, re.M | re.S)
    for table in section.split("| step |")[1:]:
        steps = re.findall(r"^\| `([^`]+)` \| `([^`]+)` \|", table, re.M)
        assert [step for step, caller in steps if not calls(caller, step)] == []
        assert 3 < len({each.partition(": ")[0] for step in steps for each in step}) <= most


def test_paths_can_fail() -> None:
    """A name that does not exist, and a call that is not made, are seen."""
    with pytest.raises(StopIteration):
        calls("train/run.py: run", "train/trainer.py: Trainer.fly")
    assert not calls("train/run.py: log_summary", "train/config.py: parse_config")
    assert not calls("pipeline/pixel_ops.py: normalize", "model/alexnet.py: AlexNet.forward")


def test_table_of_files() -> None:
    """docs/design.md has a line for every file of the four rooms, in its folder, and no other."""
    (table,) = re.findall(r"^## Files\n\n```text\n(.*?)^```", DESIGN, re.M | re.S)
    listed, folders = set(), [""]
    for line in table.splitlines():
        indent, name = re.fullmatch(r"( *)(\S+)(?:  .*)?", line).groups()  # type: ignore[union-attr]
        folders[len(indent) // 2 + 1 :] = [name]
        listed.add("".join(folders))
    pattern = r"(pipeline|model|train|tools)/.*\.(py|j2)"
    git = ["git", "ls-files", "-co", "--exclude-standard"]
    tracked = subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.split()
    present = {name for name in tracked if re.fullmatch(pattern, name) and (ROOT / name).is_file()}
    assert {each for each in listed if not each.endswith("/")} == {
        each for each in present if not each.endswith("__init__.py")
    }
