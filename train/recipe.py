"""YAML files of settings, looked at before jsonargparse reads them: what is wrong in one is told with file and line."""

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

MERGE, NOTHING, TEXT = "tag:yaml.org,2002:merge", "tag:yaml.org,2002:null", "tag:yaml.org,2002:str"
NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
MOST_VALUES = 10_000
"""In a file, aliases written out; recipes have a hundred."""
RECIPES = Path(__file__).resolve().parent / "configs"
ABLATIONS = RECIPES / "ablations"
"""Those that come with this package."""


def find_recipe(name: str) -> Path:
    """The file that a user names: a path, or the bare name of a recipe or an ablation of ours (`paper`, `no-lrn`,
    `paper.yaml`), which an installed package has somewhere. A file of that name in the working directory comes first.

    Raises `FileNotFoundError` for a name that is neither.
    """
    path = Path(name).expanduser()
    if path.exists() and not path.is_dir():
        return path
    ours = {each.stem: each for folder in (RECIPES, ABLATIONS) for each in folder.glob("*.yaml")}
    found = ours.get(name.removesuffix(".yaml"))
    if found is None:
        known = ", ".join(sorted(path.stem for path in RECIPES.glob("*.yaml")))
        raise FileNotFoundError(
            f"{name} is no file, and none of our recipes ({known}); give a YAML file or one of them"
        )
    return found


class StrictLoader(yaml.SafeLoader):
    """PyYAML takes the last of two equal keys, reads 010 as 8 and 1:30 as 90, and follows what holds itself for ever;
    all are mistakes here."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """As its base. Raises `yaml.MarkedYAMLError` for an alias of what it stands in, and for tags (`!!float`)."""
        event = self.peek_event()
        mark = event.start_mark
        if getattr(event, "tag", None):
            raise yaml.MarkedYAMLError(problem=f"leave the tag {event.tag} out", problem_mark=mark)
        node = super().compose_node(parent, index)
        if isinstance(node, yaml.CollectionNode) and node.end_mark is None:  # it is being composed
            raise yaml.MarkedYAMLError(
                problem="an alias stands within what it repeats; write it out", problem_mark=mark
            )
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """As its base. Raises `yaml.MarkedYAMLError` for a key that comes twice."""
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(
                    problem="a list is no name of a setting", problem_mark=key.start_mark
                )
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"{key.value} comes a second time; keep one", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return node

    def compose_scalar_node(self, anchor: Any) -> yaml.ScalarNode:
        """As its base. Raises `yaml.MarkedYAMLError` for a number with leading zeros or colons."""
        node = super().compose_scalar_node(anchor)
        if node.style is None and node.tag in NUMBERS and ":" in node.value:
            raise yaml.MarkedYAMLError(
                problem=f"YAML reads {node.value} as a number in base 60; write it in base 10, or quote it",
                problem_mark=node.start_mark,
            )
        if node.style is None and re.fullmatch(r"[-+]?0[0-7_]+", node.value):
            raise yaml.MarkedYAMLError(
                problem=f"YAML reads {node.value} as an octal number; leave its leading zeros out, or quote it",
                problem_mark=node.start_mark,
            )
        return node


def check_recipe(
    path: Path, options: Collection[str], valued: Collection[str] = (), prefix: str = ""
) -> None:
    """Raise `ValueError` where a file is no YAML, sets something twice, or has no settings where a section is to be.

    Args:
        path: The file.
        options: Dotted names of all settings, such as "optimizer.lr", by which sections are known.
        valued: Those of settings that cannot be nothing (`null`, or no value at all).
        prefix: What stands before the names in this file, such as "optimizer."; it is that section's.
    """
    if not path.expanduser().is_file():
        return  # a pipe can be read once; what is missing is told by jsonargparse
    text = path.expanduser().read_bytes()
    try:
        root = yaml.compose(text.decode(), StrictLoader)
    except UnicodeDecodeError as error:
        line = text[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line}: this is not UTF-8; save the file as UTF-8") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        told = ", ".join(each for each in (error.context, error.problem) if each)
        raise ValueError(f"{path}, line {mark.line + 1 if mark else '?'}: {told}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(
            f"{path} holds no settings; write some, such as train: {{epochs: 3}}, or leave the file out"
        )
    if num_values(root, {}) > MOST_VALUES:
        raise ValueError(
            f"{path} repeats itself, by aliases, to more than {MOST_VALUES} values; write out what is needed"
        )
    check_sections(root, path, options, valued, prefix)


def num_values(node: yaml.Node, known: dict[int, int]) -> int:
    """Values within a node, those that aliases repeat counted each time; `known`: by the nodes' ids."""
    if id(node) not in known:
        inner = (
            [each for pair in node.value for each in pair]
            if isinstance(node, yaml.MappingNode)
            else node.value
        )
        nodes = inner if isinstance(node, yaml.CollectionNode) else []
        known[id(node)] = 1 + sum(num_values(each, known) for each in nodes)
    return known[id(node)]


def check_sections(
    node: yaml.MappingNode, path: Path, options: Collection[str], valued: Collection[str], prefix: str
) -> None:
    """Raise `ValueError` where a section is a number, a list or nothing, or a setting lacks its value. A text is the
    name of a section's own file, which is looked at, as is what a merge key (`<<`) brings in."""
    for key, value in node.value:
        if key.tag == MERGE:
            merged = value.value if isinstance(value, yaml.SequenceNode) else [value]
            if not all(isinstance(each, yaml.MappingNode) for each in merged):
                raise ValueError(
                    f"{path}, line {key.start_mark.line + 1}: << takes settings over from a section; give its alias, "
                    "such as *name"
                )
            for each in merged:
                check_sections(each, path, options, valued, prefix)
            continue
        name = f"{prefix}{key.value}"
        if name in valued and value.tag == NOTHING:
            raise ValueError(
                f"{path}, line {key.start_mark.line + 1}: {name} has no value; give one, or leave it out"
            )
        if any(option.startswith(f"{name}.") for option in options):
            if isinstance(value, yaml.MappingNode):
                check_sections(value, path, options, valued, f"{name}.")
            elif value.tag == TEXT:
                check_recipe(path.parent / value.value, options, valued, f"{name}.")
            else:
                raise ValueError(
                    f"{path}, line {key.start_mark.line + 1}: {name} is a section of settings; write them below it, or "
                    "leave it out"
                )
