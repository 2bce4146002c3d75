"""Command line of every program: options, recipes by name, errors in one sentence, exit codes.

Exit codes: 0 done (also: stopped on request and saved), 2 the user's input is wrong, 3 data or another process failed,
4 training diverged, 130 interrupted. Such an error prints one sentence on stderr; bugs of ours keep their traceback.
"""

import difflib
import errno
import json
import os
import re
import sys
import time
from argparse import SUPPRESS, Action
from collections.abc import Callable, Mapping
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin

import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace, auto_cli, set_parsing_settings
from jsonargparse.typing import register_type
from tqdm import tqdm

from pipeline.errors import DataError, UserError
from train.launch import local_rank

WRONG_INPUT, DATA_FAILED, DIVERGED, INTERRUPTED = 2, 3, 4, 130
BROKEN_PIPE = 141
"""128 + SIGPIPE, as shells report it."""
MAX_MESSAGE = 1500
"""Characters of an error message."""
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""No space, quota used up, file size limit."""
REMEDIES = {
    **dict.fromkeys(DISK_FULL, "free some space"),
    **dict.fromkeys((errno.EISDIR, errno.EEXIST, errno.ENOTDIR), "move away what is in its place"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "set its permissions"),
}
"""Remedies for a file that cannot be written, by errno."""
RECIPES = Path(__file__).resolve().parent / "configs"
ABLATIONS = RECIPES / "ablations"


class DivergedError(RuntimeError):
    """The loss or the weights are no longer finite."""


def log(line: str) -> None:
    """Print a line without breaking a progress bar; a full disk under stdout does not end the program."""
    with suppress(OSError):
        tqdm.write(line)
        sys.stdout.flush()


def expand_home(text: str | os.PathLike[str]) -> Path:
    """Make a path, in which `~` and `~user` at the beginning are home folders: a shell leaves them after `=` and in
    quotes. `./~` stays a name. Raises `UserError` for a user without one."""
    path = os.path.expanduser(text)  # noqa: PTH111 (Path drops the ./ of ./~)
    if path.startswith("~"):
        raise UserError(f"{text}: expected a user with a home folder, found none; give the whole path")
    return Path(path)


register_type(Path, str, expand_home, type_check=isinstance)  # of every option and setting


def run_program(program: Callable[..., None] | dict[str, Any]) -> NoReturn:
    """Run a function, or one of several as subcommands, with arguments from the command line, and exit."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    run_main(lambda: auto_cli(program, parser_class=Parser))


def run_main(main: Callable[[], Any]) -> NoReturn:
    """Call `main` and exit with the exit code of its outcome."""
    try:
        main()
    except BrokenPipeError:  # the reader of our output, such as `head`, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(BROKEN_PIPE)
    except UserError as error:
        code, message = WRONG_INPUT, str(error)
    except OSError as error:
        code, message = WRONG_INPUT, describe_os_error(error)
    except BrokenProcessPool:
        code, message = (
            WRONG_INPUT,
            "a worker process was killed, maybe for lack of memory; run it with fewer workers",
        )
    except DataError as error:
        code, message = DATA_FAILED, str(error)
    except DivergedError as error:
        code, message = DIVERGED, str(error)
    except KeyboardInterrupt:
        code, message = INTERRUPTED, "interrupted"
    else:
        sys.exit(0)
    report_to_torchrun(message)
    with suppress(OSError):
        sys.stderr.write(f"error: {sanitize_message(message)}\n")
    sys.exit(code)


def describe_os_error(error: OSError) -> str:
    """Describe an error of the operating system in one sentence: file, reason, remedy."""
    if error.filename is None:
        return str(error)
    remedy = (
        f"give another path or {REMEDIES[error.errno]}" if error.errno in REMEDIES else "give another path"
    )
    if error.errno in DISK_FULL:
        remedy = f"{REMEDIES[error.errno]} and run it again"
    return f"cannot use {error.filename}: {error.strerror}; {remedy}"


def report_to_torchrun(message: str) -> None:
    """Write a message into the file from which torchrun's summary takes the reason of a failure.

    torch's own decorator, `torch.distributed.elastic...record`, writes it for exceptions only, not for `sys.exit`.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        content = {"message": sanitize_message(message), "extraInfo": {"timestamp": int(time.time())}}
        with suppress(OSError):
            Path(path).write_text(json.dumps({"message": content}))


def sanitize_message(message: str) -> str:
    """Make one printable line of a message, which may quote line breaks, terminal codes, or pages of text."""
    line = " ".join(message.splitlines())
    if len(line) > MAX_MESSAGE:  # the remedy is at the end
        line = f"{line[: MAX_MESSAGE * 2 // 3]} ... {line[-MAX_MESSAGE // 3 :]}"
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in line)


class HelpFormatter(DefaultHelpFormatter):
    """Help without Python's types; with the default at the end, unless it is None or False."""

    def _get_help_string(self, action: Action) -> str:
        hidden = not action.option_strings or action.default in (None, False, SUPPRESS)
        return (action.help or "") + ("" if hidden else " (default: %(default)s)")


class Parser(ArgumentParser):
    """A jsonargparse parser with dashes in options, strict YAML files and errors in one sentence."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, "formatter_class": HelpFormatter, **kwargs})
        self._file = ""

    def add_argument(self, *args: Any, **kwargs: Any) -> Any:
        """Add `--samples-per-shard` for a parameter `samples_per_shard` (underscores are accepted, too); a bool that is
        false by default becomes a flag without a value."""
        # Not settings of train.run, such as --optimizer.lr. For a list jsonargparse gives both --name and --name+.
        is_option = all(name.startswith("--") and "." not in name for name in args)
        if args and is_option and args != ("--print_config",):
            args = tuple(dict.fromkeys(each for name in args for each in (name.replace("_", "-"), name)))
            if kwargs.get("type") is bool and kwargs.get("default") is False:
                del kwargs["type"]
                kwargs["action"] = "store_true"
        return super().add_argument(*args, **kwargs)

    def parse_path(self, path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Namespace:
        """Read a --config file. Raises `UserError`."""
        options = {action.dest: getattr(action, "_typehint", None) for action in self._actions}
        check_yaml(Path(path), options)
        self._file = f"{path}: "  # `error` puts it before its message
        settings = super().parse_path(path, *args, **kwargs)
        self._file = ""
        return settings

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print an error of the command line, once per machine, and exit with code 2."""
        message = self._file + self.format_type_error(" ".join(str(message).split()))
        report_to_torchrun(message)
        if local_rank(os.environ) == 0:
            sys.stderr.write(f"error: {sanitize_message(message)} (--help lists every option)\n")
        else:
            time.sleep(2)  # the first process that exits ends all others under torchrun: let that one print
        sys.exit(WRONG_INPUT)

    def format_type_error(self, message: str) -> str:
        """Rewrite jsonargparse's message about a value as `<option>: expected <type>, got <value>`."""
        found = re.fullmatch(r'Parser key "([^"]+)": (.*)', message)
        action = next((action for action in self._actions if found and action.dest == found[1]), None)
        if found is None or action is None:
            return message
        key, fault = found.groups()
        given = {word.partition("=")[0] for word in sys.argv}
        option = next((option for option in action.option_strings if option in given), key)
        if fault.startswith("Unable to load config "):
            inner = re.search(rf'Parser key "{re.escape(key)}\..*', fault)
            expected = f"{option}: expected settings, or the name of a YAML file with some"
            return self.format_type_error(inner[0]) if inner else expected
        if homeless := re.search(r"Not of type Path: (~.*?; give the whole path)", fault):
            return f"{option}: {homeless[1]}"
        value = re.search(r"(?:Got|Given) value: ?(.*)", fault)
        kind = format_type(getattr(action, "_typehint", None))
        return f"{option}: expected {kind}, got {value[1] or 'nothing'}" if value and kind else message


def format_type(kind: Any) -> str:
    """Describe a type in a user's words; empty for types that no option has."""
    words = {int: "an integer", float: "a number", bool: "true or false", str: "text", Path: "a path"}
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    if get_origin(kind) in (list, tuple):
        length = len(get_args(kind)) if Ellipsis not in get_args(kind) and get_origin(kind) is tuple else 0
        return f"a list in brackets{f' of {length} values' if length else ''}"
    if get_args(kind):
        return " or ".join(format_type(each) for each in get_args(kind) if each is not type(None))
    return words.get(kind, "")


class StrictLoader(yaml.SafeLoader):
    """A YAML loader that refuses a key that comes twice (PyYAML's takes the last one) and an alias of what it is in."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Build a node. Raises `yaml.MarkedYAMLError` for an alias of a list or mapping that contains it."""
        mark = self.peek_event().start_mark
        node = super().compose_node(parent, index)
        if isinstance(node, yaml.CollectionNode) and node.end_mark is None:  # still being built
            raise yaml.MarkedYAMLError(problem="an alias is within what it repeats", problem_mark=mark)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a dict. Raises `yaml.MarkedYAMLError` for a key that comes twice."""
        keys: set[str] = set()
        for key, _ in node.value:
            if key.value in keys:
                problem = f"{key.value} is set a second time; keep one"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            if isinstance(key.value, str):
                keys.add(key.value)
        return super().construct_mapping(node, deep)


def check_yaml(path: Path, options: Mapping[str, Any], prefix: str = "") -> None:
    """Raise `UserError` for a YAML file that cannot be read, sets a key twice, gives a section or a setting no value,
    or uses a name of version 0.1.

    Args:
        path: The file.
        options: Type of each setting by its dotted name, such as "optimizer.lr".
        prefix: Prefix of the names in this file: "optimizer." if it holds that section alone.
    """
    path = expand_home(path)
    if not path.is_file():
        return  # a pipe can be read only once, so it is not checked; jsonargparse reports a missing file
    try:
        content = yaml.load(path.read_bytes().decode("utf-8-sig"), StrictLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = ", ".join(each for each in (error.context, error.problem) if each)
        raise UserError(f"{path}, line {mark.line + 1 if mark else '?'}: {problem}") from None
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: expected YAML in UTF-8, got {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected settings such as train: {{epochs: 3}}, got {content!r}")
    check_settings(content, path, options, prefix)


def check_settings(settings: Mapping[str, Any], path: Path, options: Mapping[str, Any], prefix: str) -> None:
    """Check a section of a YAML file as `check_yaml` does, and the sections in it."""
    for key, value in settings.items():
        name = f"{prefix}{key}"
        check_renamed(name, str(path))
        if any(option.startswith(f"{name}.") and not option.endswith(".help") for option in options):
            if isinstance(value, dict):
                check_settings(value, path, options, f"{name}.")
            elif isinstance(value, str):
                check_yaml(path.parent / expand_home(value), options, f"{name}.")
            else:
                raise UserError(
                    f"{path}: expected settings below {name}, got {value!r}; add some or leave it out"
                )
        elif name not in options:
            for inner in value if isinstance(value, dict) else ():
                check_renamed(f"{name}.{inner}", str(path))
            close = [option for option in options if option.endswith(f".{key}")]
            close += difflib.get_close_matches(name, options, 1)
            remedy = f"did you mean {close[0]}?" if close else "--help lists all"
            raise UserError(f"{path}: {name}: expected the name of a setting; {remedy}")
        elif value is None and options.get(name) and type(None) not in get_args(options[name]):
            raise UserError(f"{path}: {name} has no value; give one, or leave it out")


RENAMED = {
    "train.accumulate": "train.grad_accum_steps",
    "train.weights": "train.init_from",
    "run.keep": "run.keep_last",
    "run.save_every": "run.save_minutes",
    "model.hidden": "model.fc_dim",
    "optimizer.min_improvement": "optimizer.min_delta",
    "optimizer.drops": "optimizer.max_drops",
    "data.speed.prefetch": "data.speed.prefetch_queue_depth",
    "data.speed.read_ahead": "data.speed.reader_queue_depth",
    "data.augmentation.share_window": "data.augmentation.images_per_crop",
    "data.augmentation.lighting.until_epoch": "data.augmentation.lighting.off_epoch",
    "parallel.placement": "parallel.mode",
    "parallel.share_images": "",
    "data.speed.affinity": "",
    "data.speed.decode_cache_gb": "",
    "data.augmentation.jpeg_fancy_upsampling": "",
    "data.shuffle_buffer": "data.shuffle",
    "resume.allow_world_change": "",
}
"""Settings of version 0.1 by what replaced them; empty where nothing did."""


def check_renamed(name: str, source: str) -> None:
    """Raise `UserError` for a setting of version 0.1."""
    if name in RENAMED:
        remedy = f"{name} is now {RENAMED[name]}" if RENAMED[name] else f"{name} was removed; leave it out"
        remedy += ", in minutes instead of steps" * (name == "run.save_every")
        raise UserError(f"{source}: {remedy} (CHANGELOG.md)")


def find_recipe(name: str) -> Path:
    """Find a configuration file by its path, or by the name of one of our recipes or ablations (`paper`, `no-lrn`).

    A file of that name in the working directory wins. Raises `FileNotFoundError`.
    """
    path = expand_home(name)
    if path.exists() and not path.is_dir():
        return path
    ours = {each.stem: each for folder in (RECIPES, ABLATIONS) for each in folder.glob("*.yaml")}
    found = ours.get(name.removesuffix(".yaml"))
    if found is None:
        known = ", ".join(sorted(path.stem for path in RECIPES.glob("*.yaml")))
        raise FileNotFoundError(f"{name}: expected a YAML file or one of our recipes, {known}")
    return found
