"""The edge of every program here: command line, exit codes, and how errors are told.

Exit codes: 0 done (also: stopped on request and saved), 2 the user's input is wrong, 3 data failed while running,
4 training diverged. A user's mistake costs one sentence on stderr and no traceback; our own mistakes keep theirs.
"""

import errno
import io
import json
import os
import re
import sys
import time
import traceback
from argparse import SUPPRESS, Action
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, NoReturn, TextIO, get_args, get_origin

from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace, auto_cli, set_parsing_settings

from pipeline.shards import DataError
from train.launch import local_rank
from train.recipe import check_recipe

WRONG_INPUT, DATA_FAILED, DIVERGED = 2, 3, 4
TOLD_AT_MOST = 1500
"""Characters of a sentence."""
BROKEN_PIPE = 141
"""As a shell tells of a program that SIGPIPE ended."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
REMEDIES = {
    **dict.fromkeys(FULL, "free some space"),
    **dict.fromkeys((errno.EISDIR, errno.EEXIST, errno.ENOTDIR), "move away what lies there"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "set its permissions"),
}
"""What a user can do about a file that cannot be written, by the error's number."""


class DivergedError(RuntimeError):
    """The loss is no longer finite."""


class HelpFormatter(DefaultHelpFormatter):
    """Help without Python's types; a default that says something stands at the end."""

    def _get_help_string(self, action: Action) -> str:
        silent = not action.option_strings or action.default in (None, False, SUPPRESS)
        return (action.help or "") + ("" if silent else " (default: %(default)s)")


class Parser(ArgumentParser):
    """A jsonargparse parser that spells options with dashes and complains in one sentence, without listing every
    option."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As its base; but a cut option (`--train.epoch`) is an unknown one."""
        super().__init__(*args, **{"allow_abbrev": False, "formatter_class": HelpFormatter, **kwargs})
        self._reading = ""

    def add_argument(self, *args: Any, **kwargs: Any) -> Any:
        """Add `--samples-per-shard` for a parameter `samples_per_shard`; the spelling with underscores is taken too. A
        bool of a function that is off by default is a plain flag: `--fast`."""
        ours = all(
            name.startswith("--") and "." not in name for name in args
        )  # a list has --name and --name+
        if (
            args and ours and args != ("--print_config",)
        ):  # jsonargparse's own, whose value it cuts off by length
            args = tuple(
                dict.fromkeys(spelling for name in args for spelling in (name.replace("_", "-"), name))
            )
            if kwargs.get("type") is bool and kwargs.get("default") is False:
                kwargs = {name: value for name, value in kwargs.items() if name != "type"} | {
                    "action": "store_true"
                }
        return super().add_argument(*args, **kwargs)

    def parse_path(self, path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Namespace:
        """Read a --config file. Raises `ValueError` where it is none; `error` names it meanwhile."""
        actions = [action for action in self._actions if not action.dest.endswith(".help")]
        types = {action.dest: getattr(action, "_typehint", None) for action in actions}
        # jsonargparse takes nothing, in a file, for any of them.
        valued = {
            name
            for name, kind in types.items()
            if kind and kind is not Any and type(None) not in get_args(kind)
        }
        check_recipe(Path(path), types.keys(), valued)
        self._reading = f"{path}: "
        settings = super().parse_path(path, *args, **kwargs)
        self._reading = ""
        return settings

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Say what is wrong with the command line and leave with exit code 2."""
        told = self._reading + self.in_words(" ".join(str(message).split()))
        report_to_torchrun(told)
        if speaks():
            sys.stderr.write(f"error: {one_line(told)} (--help lists every option)\n")
        sys.exit(WRONG_INPUT)

    def in_words(self, message: str) -> str:
        """What jsonargparse says of a value in Python's terms, said in those of a user: the option, what it takes, what
        it was given."""
        found = re.fullmatch(r'Parser key "([^"]+)": (.*)', message)
        action = next((action for action in self._actions if found and action.dest == found[1]), None)
        message = re.sub(r"<class '(\w+)'>", r"\1", message).replace("Expected a tuple", "expected a list")
        if found is None or action is None:
            return message
        key, fault = found.groups()
        typed = {word.split("=")[0] for word in sys.argv}
        name = next((option for option in action.option_strings if option in typed), key)
        if fault.startswith("Unable to load config "):  # neither that nor its beginning is a field of ours
            within = re.search(rf'Parser key "{re.escape(key)}\..*', fault)
            fields = "takes its fields one by one, or the name of a YAML file with them"
            return self.in_words(within[0]) if within else f"{name} {fields}; what was given is neither"
        given = re.match(r"Expected an? .*?\. Got value: ?(.*)", fault)
        given = given or re.match(r"Does not validate .*? Given value type: .*? Given value: ?(.*)", fault)
        kind = words_for(getattr(action, "_typehint", None))
        return f"{name} takes {kind}, not {given[1] or 'nothing'}" if given and kind else message


def words_for(kind: Any) -> str:
    """A type, as a user would call what it holds; empty for those that no option has."""
    plain = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}
    if kind in plain:
        return plain[kind]
    of = [each for each in get_args(kind) if each is not type(None) and each is not ...]
    if get_origin(kind) is not Literal and not all(map(words_for, of)):
        return ""
    if get_origin(kind) is Literal:
        words = f"one of {', '.join(map(str, of))}"
    elif get_origin(kind) in (list, tuple):
        words = f"a list in brackets of {words_for(of[0]).removeprefix('a ')}s"
        words += f", {len(of)} of them" if len(of) > 1 else ""
    else:
        words = " or ".join(map(words_for, of))
    return f"{words}, or null" if words and type(None) in get_args(kind) else words


def run_program(program: Callable[..., None] | dict[str, Any]) -> NoReturn:
    """Run a function, or one of several as subcommands, with arguments from the command line; never returns."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    exit_with(lambda: auto_cli(program, parser_class=Parser))


def speaks() -> bool:
    """Whether this process tells what all processes of its machine know alike, such as a mistake on their command
    line."""
    return local_rank(os.environ) == 0


@contextmanager
def told_once() -> Iterator[None]:
    """Let one process of a machine complain of what each of them finds wrong; the others leave quietly."""
    try:
        yield
    except ValueError as error:
        if speaks():
            raise
        report_to_torchrun(str(error))
        sys.exit(WRONG_INPUT)


class Outlet(io.FileIO):
    """A descriptor to tell things through: what a full disk does not take is lost."""

    def write(self, data: Any) -> int:
        """As its base, but for a full disk."""
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in FULL:
                raise
            return memoryview(data).nbytes


def outlive_full_disk() -> None:
    """Let no message that a full disk does not take end this process: for programs whose work matters more than what
    they tell of it."""

    def outlet(stream: TextIO) -> TextIO:
        stream.flush()
        file = io.BufferedWriter(Outlet(stream.fileno(), "w", closefd=False))
        at_once = (
            stream.isatty() or stream is sys.stderr or getattr(stream, "write_through", False)
        )  # python -u
        return io.TextIOWrapper(file, stream.encoding, stream.errors, line_buffering=at_once)

    sys.stdout, sys.stderr = (
        stream and outlet(stream) for stream in (sys.stdout, sys.stderr)
    )  # None if closed


def exit_with(main: Callable[[], Any]) -> NoReturn:
    """Call `main` and leave the process with the exit code that tells how it ended."""
    try:
        main()
    except BrokenPipeError:  # the reader of our output has seen enough: `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(BROKEN_PIPE)
    except (ValueError, OSError) as error:
        if isinstance(error, ValueError) and not raised_by_us(error):
            raise  # a library refuses what we gave it: our mistake, to be seen in full
        code, message = WRONG_INPUT, str(error)
        if isinstance(error, OSError) and error.filename is not None:
            remedy = f"give another place or {REMEDIES.get(error.errno or 0, 'set its permissions')}"
            if error.errno in FULL:
                remedy = f"{REMEDIES[error.errno]} and run it again"
            message = f"cannot use {error.filename}: {error.strerror}; {remedy}"
    except BrokenProcessPool:
        code = WRONG_INPUT
        message = "a worker process was killed; was there memory enough? run it again with fewer of them"
    except DataError as error:
        code, message = DATA_FAILED, str(error)
    except DivergedError as error:
        code, message = DIVERGED, str(error)
    except KeyboardInterrupt:
        code, message = 130, "interrupted"
    else:
        sys.exit(0)
    report_to_torchrun(message)
    with suppress(OSError):  # the exit code tells
        sys.stderr.write(f"error: {one_line(message)}\n")
    sys.exit(code)


def report_to_torchrun(message: str) -> None:
    """Leave a sentence where torchrun looks for the reason of a failure, so that its summary ends with it. This is the
    file that torch.distributed.elastic's `record` writes; `record` itself leaves out programs that exit with a code."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        about = {"message": one_line(message), "extraInfo": {"timestamp": int(time.time())}}
        with suppress(OSError):
            Path(path).write_text(json.dumps({"message": about}))


def one_line(message: str) -> str:
    """A sentence as it can be told: what it quotes may hold line breaks, codes that a terminal acts on, or pages."""
    line = " ".join(message.splitlines())
    if len(line) > TOLD_AT_MOST:  # a remedy stands at the end
        line = f"{line[: TOLD_AT_MOST * 2 // 3]} ... {line[-TOLD_AT_MOST // 3 :]}"
    shown = (each if each.isprintable() else ascii(each)[1:-1] for each in line)
    return "".join(shown)


def raised_by_us(error: BaseException) -> bool:
    """Whether the `raise` stands in this project, in this process or in a worker."""
    if error.__cause__ is not None:  # concurrent.futures puts the worker's traceback there
        return True
    file = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
    root = Path(__file__).resolve().parents[1]
    return any(file.is_relative_to(root / room) for room in ("pipeline", "model", "train", "tools"))
