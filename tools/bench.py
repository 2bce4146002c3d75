"""Benchmarks, one subcommand per question.

    python tools/bench.py loader SHARDS     how fast batches come, and what bounds them
    python tools/bench.py peers SHARDS      how fast the loaders of others do the same job
    python tools/bench.py train SHARDS      whether the network waits: loader alone, network alone, both
    python tools/bench.py model             how fast the network trains, and torchvision's
    python tools/bench.py pack RAW          how fast raw images are packed, by us, by Pillow and webdataset, by copying
    python tools/bench.py all SHARDS        all of these
    python tools/bench.py report            a page about this machine: doctor, GPU tests, loader, model, train

Each contender has images per second and images per CPU-second: tools/benchmarks/common.py says how both are measured.
"""

import shlex
import subprocess
import sys
from pathlib import Path

from tools.benchmarks.common import ROOT
from tools.benchmarks.loader import bench_loader
from tools.benchmarks.model import bench_model
from tools.benchmarks.pack import bench_pack
from tools.benchmarks.peers import bench_peers
from tools.benchmarks.report import write_report
from tools.benchmarks.train import bench_train
from train.program import run_program


def bench_all(
    shards: Path, raw: Path | None = None, out: Path = Path("benchmarks"), ffcv_python: Path | None = None
) -> None:
    """Run all benchmarks, one after another, in processes of their own. One that fails does not stop the others.

    Args:
        shards: Folder written by make_shards and compute_pca.
        raw: Folder of raw images, for pack; without it, pack is left out.
        out: Folder for rows, a file for each benchmark.
        ffcv_python: Python of an environment with FFCV, for peers.
    """
    out.mkdir(parents=True, exist_ok=True)
    ffcv = ["--ffcv-python", str(ffcv_python)] if ffcv_python else []
    data = {"loader": [str(shards)], "peers": [str(shards), *ffcv], "train": [str(shards)], "model": []}
    failed = []
    for name, words in (data | ({"pack": [str(raw)]} if raw else {})).items():
        arguments = [name, *words, "--out", str(out / f"{name}.jsonl")]
        print(f"\npython tools/bench.py {shlex.join(arguments)}", flush=True)
        if subprocess.run(
            [sys.executable, str(ROOT / "tools" / "bench.py"), *arguments], check=False
        ).returncode:
            failed.append(name)
    if failed:
        raise ValueError(f"{', '.join(failed)}: failed, see above; run it alone by its command")


if __name__ == "__main__":
    run_program(
        {
            "loader": bench_loader,
            "peers": bench_peers,
            "train": bench_train,
            "model": bench_model,
            "pack": bench_pack,
            "report": write_report,
            "all": bench_all,
        }
    )
