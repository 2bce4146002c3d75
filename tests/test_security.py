"""Nothing that reads a file runs code from it or writes where the file says, and no program goes through a shell: read
off the source."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import ROOT

ROOMS = ("pipeline", "model", "train", "tools")
FORBIDDEN = {
    "eval", "exec", "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput",
    "pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.load", "marshal.loads", "shelve.open", "dill.load",
    "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "yaml.unsafe_load_all", "yaml.full_load_all",
    "shutil.unpack_archive", "tempfile.mktemp", "torch.jit.load", "torch.hub.load", "joblib.load",
}  # fmt: skip
"""Calls, by full name."""
METHODS = {"extract", "extractall"}
"""Of whatever object."""
ASKED = {
    "torch.load": ("weights_only", True),
    "np.load": ("allow_pickle", False),
    "numpy.load": ("allow_pickle", False),
}
"""What has to be said in a call."""


def complaints(source: str) -> list[str]:
    """What is wrong in a file, by line."""
    nodes = list(ast.walk(ast.parse(source)))
    own = {node.name for node in nodes if isinstance(node, ast.ClassDef)}
    return [f"line {node.lineno}: {told}" for node in nodes for told in of_node(node, own)]  # type: ignore[attr-defined]


def of_node(node: ast.AST, own: set[str]) -> Iterator[str]:
    """What is wrong with one call or class, in a file with classes of its `own`."""
    if isinstance(node, ast.ClassDef):
        for base in map(ast.unparse, node.bases):
            if base.startswith("yaml.") and base.endswith("Loader") and base != "yaml.SafeLoader":
                yield f"{base} makes any object"
    if not isinstance(node, ast.Call):
        return
    name = ast.unparse(node.func)
    if name in FORBIDDEN or (isinstance(node.func, ast.Attribute) and node.func.attr in METHODS):
        yield f"{name} runs or writes what it is given"
    if name == "yaml.load" and ast.unparse(node.args[-1]) not in {"yaml.SafeLoader", *own}:
        yield f"{name} takes a loader that may make any object"
    said = {each.arg: each.value for each in node.keywords if each.arg}
    if "shell" in said and not (isinstance(said["shell"], ast.Constant) and said["shell"].value is False):
        yield f"{name} goes through a shell"
    if name in ASKED:
        keyword, wanted = ASKED[name]
        value = said.get(keyword)
        if not (isinstance(value, ast.Constant) and value.value is wanted):
            yield f"{name} has to say {keyword}={wanted}"


def test_no_file_runs_code() -> None:
    """In every room: safe loaders alone, no shell, nothing unpacked to where an archive says."""
    paths = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
    assert len(paths) > 50
    found = [f"{path.relative_to(ROOT)}, {told}" for path in paths for told in complaints(path.read_text())]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load(path)",
        "import torch\ntorch.load(path, weights_only=False)",
        "np.load(path, mmap_mode='r')",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text, Loader)",
        "class Mine(yaml.UnsafeLoader): pass",
        "subprocess.run(command, shell=True)",
        "subprocess.run(command, shell=asked)",
        "os.system('ls')",
        "with tarfile.open(x) as tar: tar.extractall(folder)",
        "pickle.loads(data)",
        "eval(text)",
    ],
)
def test_the_test_can_fail(source: str) -> None:
    """Each of these is found."""
    assert len(complaints(source)) == 1


@pytest.mark.parametrize(
    "name", ["../x.tar", "/etc/x.tar", "a/b.tar", "..tar/../x.tar", "x.tar\n", "x.tar\0", ".tar", ""]
)
def test_no_shard_lies_elsewhere(tmp_path: Path, name: str) -> None:
    """A manifest whose shard is out of its folder is refused before anything is opened."""
    from pipeline.shards import check_manifest

    row = {"name": "x.tar", "samples": 1, "bytes": 10}
    manifest = {"format_version": 1, "split": "train", "num_samples": 1, "num_classes": 1, "shards": [row]}
    check_manifest(manifest, tmp_path / "manifest.json")
    row["name"] = name
    with pytest.raises(ValueError, match=r"manifest\.json is damaged or not a shard manifest"):
        check_manifest(manifest, tmp_path / "manifest.json")
