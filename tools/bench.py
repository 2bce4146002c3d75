"""Run benchmarks, one subcommand per question.

    python tools/bench.py loader SHARDS     speed of the loader, and of the decoders that bound it
    python tools/bench.py peers SHARDS      speed of other loaders at the same job; --pixels: of decoded pixels, too
    python tools/bench.py train SHARDS      whether the network waits: loader alone, network alone, both
    python tools/bench.py model             speed of training, ours and torchvision's
    python tools/bench.py pack RAW          speed of packing: make_shards, Pillow and webdataset, the codec alone
    python tools/bench.py all SHARDS        all of these
    python tools/bench.py report            a report about this machine: doctor, GPU tests, loader, model, train

Each prints images per second and images per CPU-second (see tools/benchmarks/common.py).
"""

from tools.benchmarks.loader import bench_loader
from tools.benchmarks.model import bench_model
from tools.benchmarks.pack import bench_pack
from tools.benchmarks.peers import bench_peers
from tools.benchmarks.report import bench_all, write_report
from tools.benchmarks.train import bench_train
from train.cli import run_program

if __name__ == "__main__":
    benchmarks = {"loader": bench_loader, "peers": bench_peers, "train": bench_train, "model": bench_model}
    run_program(benchmarks | {"pack": bench_pack, "report": write_report, "all": bench_all})
