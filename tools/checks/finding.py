"""What a check of tools/doctor.py says, and how it asks things that may fail or never answer."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any, Literal, NamedTuple

TIMEOUT_S = 30.0
"""For any question: stat on a network disk whose server is gone and programs stuck in a driver never return."""
IMPORT_TIMEOUT_S = 120.0
"""For importing PyTorch or DALI, gigabytes from a disk that may be slow, and a first touch of every GPU."""


class Finding(NamedTuple):
    """What one check says."""

    status: Literal["ok", "warning", "problem", "-"]
    """problem: training cannot run, or not on the GPU that is there. "-": nothing to check."""
    value: str
    remedy: str = ""
    """What to do; empty where there is nothing to do."""


def ok(value: str) -> Finding:
    """As it should be."""
    return Finding("ok", value)


def warning(value: str, remedy: str) -> Finding:
    """It works, but slowly, or not always."""
    return Finding("warning", value, remedy)


def problem(value: str, remedy: str) -> Finding:
    """Training cannot run, or not on the GPU that is there."""
    return Finding("problem", value, remedy)


def nothing(value: str) -> Finding:
    """Does not apply here."""
    return Finding("-", value)


def answer(call: Callable[[], Any], timeout_s: float = TIMEOUT_S) -> Any:
    """What `call` returns, or the exception that it raised; `TimeoutError` when it takes longer. Its thread is then
    left alone: what hangs in the kernel cannot be ended."""
    answers: list[Any] = []

    def run() -> None:
        try:
            answers.append(call())
        except Exception as error:
            answers.append(error)

    thread = Thread(target=run, daemon=True)
    thread.start()
    thread.join(timeout_s)
    return answers[0] if answers else TimeoutError(f"no answer within {timeout_s:.0f} s")


def isolated(check: Callable[[], Finding], timeout_s: float = TIMEOUT_S) -> Finding:
    """The finding of a check; one that fails becomes a warning, and the others still run."""
    found = answer(check, timeout_s)
    if isinstance(found, Finding):
        return found
    return warning(
        f"could not be checked: {type(found).__name__}: {one_line(str(found))}",
        "please report this line as a bug",
    )


def run_command(command: list[str], timeout_s: float = TIMEOUT_S) -> tuple[int | None, str]:
    """Exit code and output (both streams) of a program. The code is None, and the output says why, where it does not
    exist or has not ended in time; then its whole process group is killed, and not waited for."""
    with tempfile.TemporaryFile() as output:  # a pipe would stay open as long as any grandchild
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            return None, f"{command[0]} cannot be started ({error.strerror})"
        try:
            code = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None, f"{Path(command[0]).name} does not answer within {timeout_s:.0f} s"
        finally:
            if process.poll() is None:  # also after Ctrl-C
                os.killpg(process.pid, signal.SIGKILL)
        output.seek(0)
        return code, output.read().decode(errors="replace")


def probe(name: Literal["torch", "dali"], timeout_s: float = IMPORT_TIMEOUT_S) -> dict[str, Any]:
    """What tools/checks/probe.py finds, in a process of its own: a library that crashes or hangs takes only that along.
    `error` is there when it does."""
    script = Path(__file__).with_name("probe.py")
    code, output = run_command([sys.executable, str(script), name], timeout_s)
    for line in reversed(output.splitlines()):
        if line.startswith('{"probe"'):
            found: dict[str, Any] = json.loads(line)
            return found
    last = one_line(output.strip().rpartition("\n")[2])
    if code is None:
        return {"error": last}
    return {"error": f"the process ended by signal {-code}" if code < 0 else f"exit code {code}: {last}"}


def one_line(text: str, at_most: int = 160) -> str:
    """Without line breaks, and cut where it is long."""
    line = " ".join(text.split())
    return line if len(line) <= at_most else line[: at_most - 3] + "..."
