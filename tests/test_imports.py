"""Who knows whom: `pipeline` and `model` nothing of ours, `train` both, `tools` all; and nobody himself in a circle."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

from tests.helpers import ROOT

MAY_KNOW = {
    "pipeline": {"pipeline"},
    "model": {"model"},
    "train": {"train", "pipeline", "model"},
    "tools": {"tools", "train", "pipeline", "model"},
}


def imports(path: Path, modules: set[str]) -> set[str]:
    """Of our modules, those that a file imports anywhere in it, if only for its types."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names & modules


def test_no_arrow_upwards_and_no_circle() -> None:
    """Of any import; a circle is raised with its members."""
    files = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path
        for room in MAY_KNOW
        for path in (ROOT / room).rglob("*.py")
    }
    graph = {name: imports(path, set(files)) for name, path in files.items()}
    assert len(graph) > 50 and graph["train.run"]
    rooms = {name: {other.split(".")[0] for other in others} for name, others in graph.items()}
    assert {name: known for name, known in rooms.items() if not known <= MAY_KNOW[name.split(".")[0]]} == {}
    TopologicalSorter(graph).prepare()
