"""What is wrong in a YAML file of settings is told in one sentence with its name, whichever program reads it."""

from pathlib import Path

import pytest

from tests.helpers import ROOT, refuses, train_refuses
from train.cli import RECIPES, find_recipe
from train.config import parse_config

QUICKSTART = ROOT / "train" / "configs" / "quickstart.yaml"
PLACE = ["--data.shards", "s", "--run.dir", "r"]
NO_SECTION = "optimizer is a section of settings; write them below it, or leave it out"
LAUGHS = b"a: &a [1, 1]\n" + b"".join(
    b"%c: &%c [%s]\n" % (k + 1, k + 1, b", ".join([b"*%c" % k] * 9)) for k in b"abcdefgh"
)
"""A few hundred bytes that stand for a billion."""
CASES = {
    b"# gr\xfc\n": ", line 1: this is not UTF-8; save the file as UTF-8",
    b"train:\n  seed: 1\noptimizer: 5\n": f", line 3: {NO_SECTION}",
    b"optimizer:\ntrain: {seed: 1}\n": f", line 1: {NO_SECTION}",
    b"data:\n  augmentation: {lighting: 3}\n": ", line 2: data.augmentation.lighting is a section",
    b"optimizer: {lr: 1}\n\noptimizer: {momentum: 0}\n": ", line 3: optimizer comes a second time; keep one",
    b"train: {seed: 1, epochs: 2, seed: 1}\n": ", line 1: seed comes a second time; keep one",
    b"train:\n  seed: 010\n": ", line 2: YAML reads 010 as an octal number; leave its leading zeros out",
    b"train: [1\n": ", line 2: while parsing a flow sequence, expected ',' or ']'",
    b"? [1, 2]\n: 3\n": ", line 1: a list is no name of a setting",
    b"train: \x01\n": " is not YAML: unacceptable character",
    b"[" * 100_000: " is not YAML: maximum recursion depth exceeded",
    b"# nothing yet\n": " holds no settings",
    b"- 5\n": " holds no settings",
    b"train: &a [*a]\n": ", line 1: an alias stands within what it repeats; write it out",
    b"train:\n  seed: 1\nmodel: &m {fc_dim: 1, channels: [*m]}\n": ", line 3: an alias stands within",
    b"train:\n  seed: 1:30\n": ", line 2: YAML reads 1:30 as a number in base 60; write it in base 10, or quote it",
    b"<<: {optimizer: 3}\n": f", line 1: {NO_SECTION}",
    b"<<: [{train: {seed: 1}}, {optimizer: }]\n": f", line 1: {NO_SECTION}",
    b"train:\n  <<: 5\n": ", line 2: << takes settings over from a section; give its alias",
    b"model:\n  fc_dim:\n": ", line 2: model.fc_dim has no value; give one, or leave it out",
    b"data: {augmentation: {lighting: {strength: ~}}}\n": ", line 1: data.augmentation.lighting.strength has no value",
    b"train: {seed: !!float abc}\n": ", line 1: leave the tag tag:yaml.org,2002:float out",
    b"a: !!python/object/apply:os.system [id]\n": ", line 1: leave the tag tag:yaml.org,2002:python/object/apply",
    LAUGHS: " repeats itself, by aliases, to more than 10000 values",
    b"train: {seed: one}\n": ": train.seed takes a whole number, not one",
}


@pytest.mark.parametrize("text", CASES, ids=lambda text: text[:20].decode(errors="replace"))
def test_mistakes_name_the_file(text: bytes, tmp_path: Path) -> None:
    """Of two files the one that is wrong; and the line, where it is on one."""
    path = tmp_path / "mine.yaml"
    path.write_bytes(text)
    assert f"error: {path}{CASES[text]}" in train_refuses("--config", QUICKSTART, "--config", path, *PLACE)


def test_what_is_right_passes(tmp_path: Path) -> None:
    """Anchors, a merge that a key overrides, a text of digits, and a section that is in another file."""
    (tmp_path / "section.yaml").write_text("lr: 0.25\n")
    text = "data:\n  augmentation:\n    lighting: &a {strength: 0.5}\n"
    text += "train: {seed: 0, weights: '007'}\noptimizer: section.yaml\nmodel: {fc_dim: 20}\n"
    text += "run: {log_every: 1_0}  # \N{SNOWMAN}\n"
    path = tmp_path / "mine.yaml"
    path.write_text(text, "utf-8-sig")
    config = parse_config(["--config", str(QUICKSTART), "--config", str(path), *PLACE])
    assert (config.optimizer.lr, config.train.seed, config.model.fc_dim, config.run.log_every) == (
        0.25,
        0,
        20,
        10,
    )
    assert config.train.init_from == Path("007") and config.data.augmentation.lighting.strength == 0.5


def test_other_programs(tmp_path: Path) -> None:
    """Tools read their own options from such a file, too, as do their subcommands."""
    path = tmp_path / "mine.yaml"
    path.write_text("seed: 1\nseed: 2\n")
    for arguments in (
        ("tools/preview.py", "--config", path, "s"),
        ("tools/bench.py", "train", "--config", path, "s"),
    ):
        assert refuses(*arguments) == f"error: {path}, line 2: seed comes a second time; keep one\n"


def test_a_section_in_a_file_of_its_own(tmp_path: Path) -> None:
    """Is looked at, too: what never ends in it is told with its name."""
    (tmp_path / "mine.yaml").write_text("model: {fc_dim: 4}\noptimizer: section.yaml\n")
    for text, told in (("lr: &a [*a]\n", "an alias stands within"), ("lr:\n", "optimizer.lr has no value")):
        (tmp_path / "section.yaml").write_text(text)
        error = train_refuses("--config", QUICKSTART, "--config", tmp_path / "mine.yaml", *PLACE)
        assert f"error: {tmp_path / 'section.yaml'}, line 1: {told}" in error


def test_nothing_where_it_is_a_value(tmp_path: Path) -> None:
    """Settings that may be nothing take it from a file."""
    (tmp_path / "mine.yaml").write_text("train: {weights: }\nmodel: {channels: ~, lrn: null}\n")
    config = parse_config(["--config", str(QUICKSTART), "--config", str(tmp_path / "mine.yaml"), *PLACE])
    assert (config.train.init_from, config.model.channels, config.model.lrn) == (None, None, None)


def test_recipes_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours are found from everywhere; a file of that name comes first, a folder does not; another name is told."""
    monkeypatch.chdir(tmp_path)
    assert find_recipe("paper") == find_recipe("paper.yaml") == RECIPES / "paper.yaml"
    assert find_recipe("no-lrn") == RECIPES / "ablations" / "no-lrn.yaml"
    (tmp_path / "paper").mkdir()
    (tmp_path / "fast").write_text("train: {epochs: 3}\n")
    assert find_recipe("paper") == RECIPES / "paper.yaml" and find_recipe("fast") == Path("fast")
    with pytest.raises(
        FileNotFoundError, match=r"papper is no file, and none of our recipes \(alexnet2012, fast, paper"
    ):
        find_recipe("papper")
