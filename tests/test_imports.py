"""`pipeline` and `model` import no other package of ours, `train` imports both, `tools` all; no import is circular."""

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
    """Find our modules that a file imports anywhere in it, if only for its types."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names & modules


def test_import_order() -> None:
    """No import goes upwards or in a circle (`CycleError` names its members)."""
    files = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path
        for package in ALLOWED
        for path in (ROOT / package).rglob("*.py")
    }
    graph = {name: imports(path, set(files)) for name, path in files.items()}
    assert len(graph) > 50 and graph["train.run"]
    packages = {name: {other.split(".")[0] for other in others} for name, others in graph.items()}
    assert {name: used for name, used in packages.items() if not used <= ALLOWED[name.split(".")[0]]} == {}
    TopologicalSorter(graph).prepare()
