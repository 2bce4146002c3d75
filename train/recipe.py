"""YAML files of settings, looked at before jsonargparse reads them: what is wrong in one is told with file and line."""

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

RECIPES = Path(__file__).resolve().parent / "configs"
"""Those that come with this package."""


def find_recipe(name: str, folder: Path = RECIPES) -> Path:
    """The file that a user names: a path, or the bare name of one of ours (`paper`, `paper.yaml`), which an installed
    package has somewhere. A file of that name in the working directory comes first."""
    path, ours = Path(name), folder / f"{name.removesuffix('.yaml')}.yaml"
    return ours if path.name == name and not path.exists() and ours.is_file() else path


class StrictLoader(yaml.SafeLoader):
    """PyYAML takes the last of two equal keys and reads 010 as 8; both are mistakes here."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """As its base. Raises `yaml.MarkedYAMLError` for a key that comes twice."""
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a list is no name of a setting", problem_mark=key.start_mark)
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"{key.value} comes a second time; keep one", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return node

    def compose_scalar_node(self, anchor: Any) -> yaml.ScalarNode:
        """As its base. Raises `yaml.MarkedYAMLError` for a number with leading zeros."""
        node = super().compose_scalar_node(anchor)
        if node.style is None and re.fullmatch(r"[-+]?0[0-7_]+", node.value):
            raise yaml.MarkedYAMLError(
                problem=f"YAML reads {node.value} as an octal number; leave its leading zeros out, or quote it",
                problem_mark=node.start_mark,
            )
        return node


def check_recipe(path: Path, options: Collection[str]) -> None:
    """Raise `ValueError` where a file is no YAML, sets something twice, or has no settings where a section is to be.

    Args:
        path: The file.
        options: Dotted names of all settings, such as "optimizer.lr", by which sections are known.
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
        raise ValueError(f"{path} holds no settings; write some, such as train: {{epochs: 3}}, or leave the file out")
    check_sections(root, path, options, "")


def check_sections(node: yaml.MappingNode, path: Path, options: Collection[str], prefix: str) -> None:
    """Raise `ValueError` where a section is a number, a list or nothing; a text is the name of another file."""
    for key, value in node.value:
        name = f"{prefix}{key.value}"
        if any(option.startswith(f"{name}.") for option in options):
            if isinstance(value, yaml.MappingNode):
                check_sections(value, path, options, f"{name}.")
            elif value.tag != "tag:yaml.org,2002:str":
                raise ValueError(
                    f"{path}, line {key.start_mark.line + 1}: {name} is a section of settings; write them below it, or "
                    "leave it out"
                )
