"""Every benchmark but the soak after the other, each in a process of its own: their settings of memory and threads
differ."""

import shlex
import subprocess
import sys
from pathlib import Path
from time import perf_counter

from pipeline.shards import open_shards

NEEDS = {
    "loader": ["shards"],
    "train": ["shards"],
    "model": [],
    "pack": ["raw"],
    "pca": ["shards"],
    "lighting": ["shards"],
    "peers": ["shards"],
    "plan": [],
    "scaling": ["shards"],
}
"""What each is given, in this order."""


def bench_every(
    shards: Path, raw: Path | None, out: Path, only: list[str] | None, ffcv_python: Path | None
) -> None:
    """See `tools/bench.py all`. Raises `ValueError` at the end where one of them failed."""
    names = list(NEEDS) if only is None else [name for name in NEEDS if name in only]
    unknown = sorted(set(only or []) - set(NEEDS))
    if unknown or not names:
        raise ValueError(f"--only takes some of {', '.join(NEEDS)}, not {', '.join(unknown) or 'none'}")
    open_shards(shards, "train")  # before an hour is spent
    out.mkdir(parents=True, exist_ok=True)
    places, failed = {"shards": shards, "raw": raw}, []
    for name in names:
        given = [places[need] for need in NEEDS[name]]
        if None in given:
            print(f"\n{name}: not measured, it needs --raw")
            continue
        more = ["--ffcv-python", str(ffcv_python)] if name == "peers" and ffcv_python else []
        more += ["--raw", str(raw)] if name == "scaling" and raw else []
        arguments = [name, *map(str, given), *more, "--out", str(out / f"{name}.jsonl")]
        print(f"\npython tools/bench.py {shlex.join(arguments)}", flush=True)
        started = perf_counter()
        program = Path(__file__).resolve().parents[1] / "bench.py"
        with subprocess.Popen([sys.executable, str(program), *arguments]) as process:
            try:
                code = process.wait()
            except KeyboardInterrupt:  # it has heard that as well, and removes its files
                process.wait()
                raise
        failed += [name] if code else []
        print(f"({perf_counter() - started:.0f} s)")
    if failed:
        raise ValueError(f"{', '.join(failed)} failed, see above; --only {failed[0]} repeats one of them")
