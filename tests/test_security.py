"""Nothing that reads a file runs code from it or writes where the file says, and no program goes through a shell: read
off the source. (That a shard cannot lie out of its folder is in test_shards.py.)"""

import re

import pytest

from tests.helpers import ROOT

FORBIDDEN = re.compile(
    r"""
    (?<![.\w]) (eval|exec|__import__) \(
    | \b os\.(system|popen) | \b getoutput | \b getstatusoutput | shell=(?!False)
    | \b (c?pickle|marshal|shelve|dill|joblib) \b | torch\.(jit|hub)\.load
    | unsafe_load | full_load | load_all | (Unsafe|Full)Loader | yaml\.Loader
    | yaml\.load\( (?!.*(Strict|Safe)Loader\))
    | \.extract(all)?\( | unpack_archive | mktemp\(
    | \b torch\.load\( (?![^()]*weights_only=True)
    | \b (np|numpy)\.load\( (?!.*allow_pickle=False)
    """,
    re.VERBOSE,
)
"""`train.cli.StrictLoader` is a `yaml.SafeLoader`."""


def test_no_file_runs_code() -> None:
    """In all packages: safe loaders alone, no shell, nothing unpacked to where an archive says."""
    paths = [path for room in ("pipeline", "model", "train", "tools") for path in (ROOT / room).rglob("*.py")]
    assert len(paths) > 50
    found = {path.name: match[0] for path in paths if (match := FORBIDDEN.search(path.read_text()))}
    assert not found


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path)", "torch.load(path, weights_only=False)", "np.load(path, mmap_mode='r')",
        "np.load(path, allow_pickle=True)", "yaml.load(text, Loader)", "class Mine(yaml.UnsafeLoader): pass",
        "subprocess.run(command, shell=asked)", "os.system('ls')", "tar.extractall(folder)", "pickle.loads(data)",
        "value = eval(text)",
    ],
)  # fmt: skip
def test_the_test_can_fail(source: str) -> None:
    """Each of these is found."""
    assert FORBIDDEN.search(source)
