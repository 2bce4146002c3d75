"""Run benchmarks, one subcommand per question.

    python tools/bench.py loader SHARDS     speed of the loader, and of the decoders that bound it
    python tools/bench.py peers SHARDS      speed of other loaders at the same job
    python tools/bench.py train SHARDS      whether the network waits: loader alone, network alone, both
    python tools/bench.py model             speed of training, ours and torchvision's
    python tools/bench.py pack RAW          speed of packing: make_shards, Pillow and webdataset, the codec alone
    python tools/bench.py all SHARDS        all of these
    python tools/bench.py report            a report about this machine: doctor, GPU tests, loader, model, train

Each prints images per second and images per CPU-second (see tools/benchmarks/common.py).
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
from train.cli import run_program


def bench_all(
    shards: Path, raw: Path | None = None, out: Path = Path("benchmarks"), ffcv_python: Path | None = None
) -> None:
    """Run all benchmarks, each in its own process. One that fails does not stop the others.

    Args:
        shards: Folder written by make_shards and compute_pca.
        raw: Folder of raw images, for pack (default: no pack).
        out: Folder for rows, a file per benchmark.
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
        raise ValueError(f"{', '.join(failed)}: failed, see above; run it by itself")


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
