"""Imports between rooms: `pipeline` and `model` import nothing of ours, `train` both, `tools` all; no circles."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

from tests.helpers import ROOT

ALLOWED = {
    "pipeline": {"pipeline"},
    "model": {"model"},
    "train": {"train", "pipeline", "model"},
    "tools": {"tools", "train", "pipeline", "model"},
}


def imports(path: Path, modules: set[str]) -> set[str]:
    """Our modules that a file imports, also inside functions and for types."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names & modules


def test_rooms_and_circles() -> None:
    """Every import obeys `ALLOWED`, and the graph of modules has no circle."""
    files = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path
        for room in ALLOWED
        for path in (ROOT / room).rglob("*.py")
    }
    graph = {name: imports(path, set(files)) for name, path in files.items()}
    assert len(graph) > 50 and graph["train.run"]
    rooms = {name: {other.split(".")[0] for other in others} for name, others in graph.items()}
    assert [name for name, used in rooms.items() if not used <= ALLOWED[name.split(".")[0]]] == []
    TopologicalSorter(graph).prepare()
