"""Benchmarks, one subcommand per question.

    python tools/bench.py loader SHARDS     how fast batches come, beside the decoder library alone and a plain loader
    python tools/bench.py peers SHARDS      how fast the loaders of others do the same job
    python tools/bench.py train SHARDS      whether the network waits: loader alone, network alone, both
    python tools/bench.py model             how fast the network trains, beside torchvision's
    python tools/bench.py pack RAW          how fast raw images are packed, beside a plain packer and plain copying
    python tools/bench.py pca SHARDS        how fast the eigenbasis is computed, beside decoding alone
    python tools/bench.py lighting SHARDS   what lighting costs
    python tools/bench.py plan              what a pack costs before the first image is read
    python tools/bench.py scaling SHARDS    how speed and memory grow with threads, processes, samples and epochs
    python tools/bench.py soak SHARDS       what training holds of memory, threads and files, for half an hour
    python tools/bench.py report            a page about this machine: doctor, GPU tests, loader, model, train
    python tools/bench.py all SHARDS        all but the soak, one after the other

Contenders take turns within one run, so that a machine whose speed drifts slows all of them; medians and spreads are
printed, and the ratios are what counts. Warm-up is left out. Over 250 lines, as arguments are all that is in here.
"""

from pathlib import Path
from typing import Literal

from train.program import run_program


def loader(
    shards: Path,
    batch_size: int = 128,
    threads: int | None = None,
    seconds: float = 3.0,
    repeats: int = 5,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    out: Path | None = None,
) -> None:
    """Images per second of the training loader, beside libjpeg-turbo alone and a DataLoader with Pillow.

    Also beside its own pixels as they would go to a GPU. All decode the same files.

    Args:
        shards: Folder written by make_shards and compute_pca.
        batch_size: Images per batch.
        threads: DALI's threads, and processes of the others; by default one more than there are cores, and one per
            core.
        seconds: Length of one measurement.
        repeats: Measurements of each contender, taken in turn.
        device: Where batches end up; auto takes the first GPU if there is one.
        out: File of JSON lines to append one row per contender to; a figure comes beside it.
    """
    from tools.benchmarks.loader import bench_loader

    bench_loader(shards, batch_size, threads, seconds, repeats, device, out)


def peers(
    shards: Path,
    batch_size: int = 128,
    workers: int | None = None,
    seconds: float = 3.0,
    repeats: int = 5,
    peers: list[str] | None = None,
    ffcv_python: Path | None = None,
    images: int = 20_000,
    scratch: Path | None = None,
    out: Path | None = None,
) -> None:
    """Images per second of our loader and of others' on a CPU: torch's DataLoader, webdataset, SPDL, FFCV, DALI's own.

    Each first shows that it does the whole job. One that is not installed is listed with the reason; `pip install -e
    '.[bench]'` brings those that pip can bring.

    Args:
        shards: Folder written by make_shards, with 256x256 images, and compute_pca.
        batch_size: Images per batch.
        workers: Processes, or threads, of each; one per core by default. Ours has one thread more, as by default.
        seconds: Length of one measurement.
        repeats: Measurements of each contender, taken in turn.
        peers: Contenders, of pillow, torchvision, webdataset, spdl, ffcv, dali and ours; all by default.
        ffcv_python: Python of an environment with FFCV; docs/benchmarks/details.md tells how to make one.
        images: Whole shards, from the first one, that hold so many images; they are also written as files.
        scratch: Folder for those files, emptied again; the system's by default.
        out: File of JSON lines to append one row per contender to; a figure comes beside it.
    """
    from tools.benchmarks.peers import bench_peers

    bench_peers(shards, batch_size, workers, seconds, repeats, peers, ffcv_python, images, scratch, out)


def model(
    batch_sizes: list[int] | None = None,
    precision: Literal["float32", "bf16", "fp16"] | None = None,
    seconds: float = 3.0,
    repeats: int = 5,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    profile: bool = False,
    out: Path | None = None,
) -> None:
    """Images per second of training on a batch that is there already, beside torchvision's network.

    Ours as it stands, compiled, and written in other ways. First of all, local response normalization alone, beside
    torch's and beside copying. Last, with one tower on each of two GPUs (without a GPU: two processes), beside the
    paper's network for one GPU, than which it takes "slightly less time to train" (section 3.2).

    Args:
        batch_sizes: Images per batch, one measurement each; by default [128,256,1024] on a GPU and [32] on a CPU. The
            towers take the first.
        precision: Of activations; by default bf16 on a GPU and float32 on a CPU.
        seconds: Length of one measurement.
        repeats: Measurements of each contender, taken in turn.
        device: auto takes the first GPU if there is one.
        profile: Print where the time of a step goes as well.
        out: File of JSON lines to append one row per contender to; a figure comes beside it.
    """
    from tools.benchmarks.model import bench_model

    bench_model(batch_sizes, precision, seconds, repeats, device, profile, out)


def train(
    shards: Path,
    recipe: Path | None = None,
    settings: str = "",
    seconds: float = 10.0,
    repeats: int = 5,
    profile: bool = False,
    out: Path | None = None,
) -> None:
    """Images per second of the loader alone, of the network on a batch that is there already, and of training.

    Says which of the two binds, how long the network waits for batches, and how busy nvidia-smi finds the GPU.

    Args:
        shards: Folder written by make_shards and compute_pca.
        recipe: YAML file as for train.run; by default fast.yaml on a GPU and quickstart.yaml without.
        settings: Further settings as for train.run: "--train.batch_size 128 --model.hidden 64".
        seconds: Length of one measurement.
        repeats: Measurements of each, taken in turn.
        profile: Tell as well where the time of ten training steps goes; on a GPU, how long it is busy and idle.
        out: File of JSON lines to append one row per contender to; a figure comes beside it.
    """
    from tools.benchmarks.train import bench_train

    bench_train(shards, recipe, settings, seconds, repeats, profile, out)


def pack(
    raw: Path,
    repeats: int = 3,
    workers: int | None = None,
    scratch: Path | None = None,
    out: Path | None = None,
) -> None:
    """Images per second of make_shards, beside Pillow processes with webdataset's ShardWriter, and plain copying.

    Also beside decoding and encoding alone.

    Args:
        raw: Folder with the archives of ILSVRC-2012, or with what `tools/make_demo.py --photos` writes.
        repeats: Measurements of each contender, taken in turn; each packs all of RAW.
        workers: Processes of each contender; one per core by default.
        scratch: Folder to write into, as large as RAW; emptied again. Beside RAW by default.
        out: File of JSON lines to append one row per contender to; a figure comes beside it.
    """
    from tools.benchmarks.pack import bench_pack

    bench_pack(raw, repeats, workers, scratch, out)


def pca(
    shards: Path,
    batch_size: int = 64,
    threads: int | None = None,
    repeats: int = 5,
    device: Literal["cpu", "cuda"] = "cpu",
    out: Path | None = None,
) -> None:
    """Images per second of computing the eigenbasis' sums, beside decoding the same shards alone.

    On a GPU also how far its decoder moves the eigenvalues.

    Args:
        shards: Folder written by make_shards.
        batch_size: Images decoded at a time.
        threads: Decoding threads; one per core by default.
        repeats: Passes over the training shards by each contender, taken in turn.
        device: Where images are decoded and summed.
        out: File of JSON lines to append one row per contender to; a figure comes beside it.
    """
    from tools.benchmarks.pca import bench_pca

    bench_pca(shards, batch_size, threads, repeats, device, out)


def lighting(
    shards: Path,
    batch_size: int = 128,
    threads: int | None = None,
    batches: int = 15,
    repeats: int = 30,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    out: Path | None = None,
) -> None:
    """Images per second of the loader's graph, with lighting and without.

    Args:
        shards: Folder written by make_shards and compute_pca.
        batch_size: Images per batch.
        threads: DALI's threads; one per core by default.
        batches: Length of one measurement.
        repeats: Measurements of each contender, taken in turn.
        device: Where batches end up; auto takes the first GPU if there is one.
        out: File of JSON lines to append one row per contender to; a figure comes beside it.
    """
    from tools.benchmarks.lighting import bench_lighting

    bench_lighting(shards, batch_size, threads, batches, repeats, device, out)


def plan(images: int = 14_197_122, repeats: int = 3, out: Path | None = None) -> None:
    """Seconds and memory that make_shards takes to plan a pack, on a generated listing (by default of ImageNet-21k).

    Args:
        images: Number of images.
        repeats: Measurements.
        out: File of JSON lines to append one row per figure to; a picture comes beside it.
    """
    from tools.benchmarks.plan import bench_plan

    bench_plan(images, repeats, out)


def scaling(
    shards: Path,
    raw: Path | None = None,
    threads: list[int] | None = None,
    ranks: list[int] | None = None,
    samples: list[int] | None = None,
    epochs: int = 20,
    workers: list[int] | None = None,
    gpu_rates: list[float] | None = None,
    batch_size: int = 128,
    seconds: float = 3.0,
    repeats: int = 3,
    out: Path | None = None,
) -> None:
    """Curves over threads, processes, samples, epochs and workers, all on a CPU.

    Of the loader over threads and processes; of its start-up and memory over the number of samples; of its speed and
    memory over epochs; with RAW, of packing and of the eigenbasis' sums over workers. Then, on paper, what a run on 64
    GPUs would ask of its machines.

    Args:
        shards: Folder written by make_shards and compute_pca.
        raw: Folder of raw images, as for `pack`; without it, packing and the sums are left out.
        threads: Numbers of DALI's threads, as in [1,2,4]; by default up to two more than there are cores.
        ranks: Numbers of processes with a thread each, beside one process with as many threads; by default [1,2].
        samples: Sizes of the sets that are opened; by default [10000,1281167,14197122]. They are links to one shard.
        epochs: Epochs of one process, of the first 20,000 images.
        workers: Numbers of packing processes, and of threads for the sums; by default up to the number of cores.
        gpu_rates: Images per second of each GPU that the estimate assumes; by default [5000,10000,20000].
        batch_size: Images per batch.
        seconds: Length of one measurement of the loader.
        repeats: Measurements of each contender, taken in turn.
        out: File of JSON lines to append one row per contender to; a figure comes beside it.
    """
    from tools.benchmarks.scaling.bench import bench_scaling

    bench_scaling(
        shards, raw, threads, ranks, samples, epochs, workers, gpu_rates, batch_size, seconds, repeats, out
    )


def soak(
    shards: Path,
    recipe: str = "quickstart",
    settings: str = "",
    minutes: float = 30.0,
    out: Path | None = None,
) -> None:
    """Resident memory, threads and open files of a training process, with its evaluations and checkpoints.

    Printed are medians of two halves, behind a first quarter in which libraries load and caches fill.

    Args:
        shards: Folder written by make_shards and compute_pca.
        recipe: YAML file as for train.run, or a recipe of ours by its name.
        settings: Settings over it, as for train.run: "--run.save_every 20".
        minutes: How long.
        out: File of JSON lines to append rows to; a figure comes beside it.
    """
    from tools.benchmarks.soak import bench_soak

    bench_soak(shards, recipe, settings, minutes, out)


def every(
    shards: Path,
    raw: Path | None = None,
    out: Path = Path("benchmarks"),
    only: list[str] | None = None,
    ffcv_python: Path | None = None,
) -> None:
    """All but the soak, one after the other; each prints its own command. One that fails does not stop the others.

    Args:
        shards: Folder written by make_shards and compute_pca.
        raw: Folder of raw images, for pack and scaling.
        out: Folder for rows and figures, a pair of files each.
        only: Some of them, by name.
        ffcv_python: Python of an environment with FFCV, for peers.
    """
    from tools.benchmarks.every import bench_every

    bench_every(shards, raw, out, only, ffcv_python)


def report(out: Path = Path("gpu-report"), minutes: float = 10.0) -> None:
    """A page about this machine's GPUs, on generated photographs: doctor, GPU tests, loader, model, training.

    Writes OUT/report.md and the rows of the benchmarks, OUT/*.jsonl, ready to be attached to an issue. Without a GPU it
    says what it leaves out.

    Args:
        out: Folder to write into.
        minutes: At most so many; what they do not suffice for is left out.
    """
    from tools.benchmarks.gpu_report import write_gpu_report

    write_gpu_report(out, minutes)


if __name__ == "__main__":
    run_program(
        {
            "loader": loader,
            "peers": peers,
            "train": train,
            "model": model,
            "pack": pack,
            "pca": pca,
            "lighting": lighting,
            "plan": plan,
            "scaling": scaling,
            "soak": soak,
            "report": report,
            "all": every,
        }
    )
