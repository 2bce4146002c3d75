"""The paper's claim about its two GPUs, timed: "the two-GPU net takes slightly less time to train than the one-GPU net"
(section 3.2).

Three contenders, on the same synthetic batch: the network of two towers with one tower on each of two devices, as
`model/parallel.py` places it; the paper's one-GPU net, whose conv1-4 have half as many maps, on one device; and the
network of two towers on one device. On a CPU a device is a process with half of the cores. Of all three the
normalization is compiled where that works: it is what the trainer compiles of a tower.

Both processes live as long as the benchmark, which tells them through pipes, where they wait without load, what to do
and how many steps: counted once, so that both take the same number.
"""

import multiprocessing
import signal
import statistics
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any

import torch
import torch.distributed as dist
import yaml

from model.alexnet import AlexNet, AlexNetConfig
from model.parallel import TOWERS, Mesh, TowerAlexNet, bytes_per_image, seed_process
from model.peer import TIMEOUT, PeerLostError
from pipeline.machine import num_cores
from tools.benchmarks.measure import STEPS_ON_A_GPU, Table, take_turns
from tools.benchmarks.synthetic import training_on
from train.device import can_compile, keep_freed_memory, set_arithmetic
from train.recipe import ABLATIONS

TWO_DEVICES, ONE_DEVICE = "two towers, one on each of two devices", "two towers on one device"
ONE_GPU = "the paper's one-GPU net on one device"
TITLE = "two towers on two devices"
FULL = AlexNetConfig()
ONE_GPU_FILE = ABLATIONS / "one-gpu.yaml"
PATIENCE_S = 300.0
"""For an answer, besides ten times what the steps should take: compiling and a first step take long on few cores. Where
a tower waits for the other one in vain, `model.peer.TIMEOUT` ends it sooner."""


class NotMeasuredError(RuntimeError):
    """Why there are no figures."""


@dataclass(frozen=True)
class Job:
    """What both processes have to know."""

    two_towers: AlexNetConfig
    one_gpu: AlexNetConfig
    batch_size: int
    dtype: torch.dtype
    """Of activations."""
    on_gpu: bool
    compiles: bool
    """Whether normalization is compiled."""
    threads: int
    """Of a process on a CPU."""


def measure_towers(
    batch_size: int,
    dtype: torch.dtype,
    place: torch.device,
    seconds: float,
    repeats: int,
    two_towers: AlexNetConfig = FULL,
    one_gpu: AlexNetConfig | None = None,
) -> Table:
    """Images per second of training, of the three contenders in turn.

    Args:
        batch_size: Images of a step; each tower sees all of them.
        dtype: Of activations.
        place: On a GPU, all contenders are on the first two of them.
        seconds: Length of one measurement, about.
        repeats: Measurements of each.
        two_towers: Network of the first two contenders.
        one_gpu: Network of the third; by default that of ablations/one-gpu.yaml.

    Raises `NotMeasuredError` where there are no two devices, or when a process fails, dies or hangs.
    """
    on_gpu = place.type == "cuda"
    if on_gpu and torch.cuda.device_count() < TOWERS:
        raise NotMeasuredError("needs two GPUs")
    threads = max(1, num_cores() // TOWERS)
    job = Job(two_towers, one_gpu or one_gpu_net(), batch_size, dtype, on_gpu, can_compile(place), threads)
    with started(job, PATIENCE_S + 10 * seconds) as take_steps:

        def measurement(name: str) -> Callable[[], float]:
            steps = steps_in(seconds, partial(take_steps, name))
            return lambda: steps * batch_size / take_steps(name, steps)

        measured = take_turns(
            {name: measurement(name) for name in (TWO_DEVICES, ONE_GPU, ONE_DEVICE)}, repeats
        )
    return Table(f"{TITLE}, batch {batch_size}", "images/s", measured, ONE_GPU)


def one_gpu_net() -> AlexNetConfig:
    """The paper's network for one GPU, as the ablation has it."""
    return AlexNetConfig.from_json(yaml.safe_load(ONE_GPU_FILE.read_text())["model"])


def steps_in(seconds: float, take_steps: Callable[[int], float]) -> int:
    """How many steps take about so long, given what takes some and returns their seconds; it is asked for four times as
    many until they are enough to tell."""
    steps = 1
    while (spent := take_steps(steps)) < seconds / 4:
        steps *= 4
    return max(1, round(steps * seconds / spent))


@contextmanager
def started(job: Job, patience_s: float) -> Iterator[Callable[[str, int], float]]:
    """Start both processes; yields a function that has a contender take so many steps, behind an uncounted quarter of
    that, and returns their seconds. It raises `NotMeasuredError` where no answer comes within `patience_s`."""
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as scratch:
        pipes = [spawn.Pipe() for _ in range(TOWERS)]
        processes = [
            spawn.Process(target=serve, args=(rank, theirs, job, Path(scratch, "store")), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        ours = [mine for mine, _ in pipes]

        def take_steps(name: str, steps: int) -> float:
            taking = ours if name == TWO_DEVICES else ours[:1]
            for pipe in taking:
                with suppress(
                    OSError
                ):  # it has ended: what it said last, or that it says nothing, is read next
                    pipe.send((name, steps))
            return max(answers(taking, patience_s))

        try:
            for process, (_, theirs) in zip(processes, pipes, strict=True):
                process.start()
                theirs.close()  # so that ours ends with the process
            answers(ours, patience_s)
            yield take_steps
            for pipe in ours:
                pipe.close()  # who waits for an order leaves
            for process in processes:
                process.join(10.0)
        finally:
            for process in processes:
                if process.pid is not None:
                    process.kill()
                    process.join()


def answers(pipes: list[Connection], patience_s: float) -> list[float]:
    """One number from each process, by rank. Raises `NotMeasuredError` with what went wrong in the first one that sends
    a sentence instead, has ended, or is silent for too long."""
    found: dict[Connection, float] = {}
    deadline = monotonic() + patience_s
    while len(found) < len(pipes):
        silent = [pipe for pipe in pipes if pipe not in found]
        ready = wait(silent, max(0.0, deadline - monotonic()))
        if not ready:
            ranks = " and ".join(str(pipes.index(pipe)) for pipe in silent)
            raise NotMeasuredError(f"process {ranks} has not answered for {patience_s:.0f} s")
        for pipe in (pipe for pipe in silent if pipe in ready):
            try:
                answer = pipe.recv()
            except (EOFError, OSError):
                answer = "ended without a word; was it killed, for want of memory?"
            if isinstance(answer, str):
                raise NotMeasuredError(f"process {pipes.index(pipe)}: {answer}")
            found[pipe] = answer
    return [found[pipe] for pipe in pipes]


def serve(rank: int, orders: Any, job: Job, store: Path) -> None:
    """One of the two processes: build, say so, and take steps as ordered, until the other end closes or kills it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that ends this one
    place = torch.device("cuda", rank) if job.on_gpu else torch.device("cpu")
    try:
        contenders = contenders_of(rank, job, place, store)
        orders.send(0.0)
        while True:
            name, steps = orders.recv()
            run_steps(contenders[name], max(1, steps // 4), place)
            orders.send(run_steps(contenders[name], steps, place))
    except (EOFError, BrokenPipeError):  # who ordered is gone
        dist.destroy_process_group()
    except Exception as error:
        if not isinstance(error, PeerLostError):
            traceback.print_exc()
        orders.send(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")


def contenders_of(rank: int, job: Job, place: torch.device, store: Path) -> dict[str, Callable[[], None]]:
    """Training steps by contender: one tower of a pair, and in the first process the networks on one device."""
    if job.on_gpu:
        torch.cuda.set_device(place)
    else:
        torch.set_num_threads(job.threads)
    keep_freed_memory()  # this and the next as the trainer does
    set_arithmetic(deterministic=False)
    backend = "nccl" if job.on_gpu else "gloo"
    dist.init_process_group(backend, f"file://{store}", timeout=TIMEOUT, rank=rank, world_size=TOWERS)
    mesh = Mesh.join(place)
    torch.manual_seed(0)  # the batch, and the towers' weights, are the same in both
    training = training_on(job.batch_size, job.dtype, place)
    as_trained = partial(with_compiled_normalization, compiles=job.compiles)
    steps = {TWO_DEVICES: training(TowerAlexNet(job.two_towers, mesh.peer), as_trained)}
    if rank == 0:
        steps[ONE_GPU] = training(AlexNet(job.one_gpu), as_trained)
        steps[ONE_DEVICE] = training(AlexNet(job.two_towers), as_trained)
    seed_process(0, rank)  # dropout
    return steps


def with_compiled_normalization(model: AlexNet, compiles: bool) -> AlexNet:
    """As `train.device.compiled` treats a tower; of a whole network on a GPU that one compiles everything."""
    if compiles:
        torch._dynamo.config.suppress_errors = True
        model.normalize = torch.compile(model.normalize, dynamic=False)  # type: ignore[method-assign]
    return model


def run_steps(step: Callable[[], None], steps: int, place: torch.device) -> float:
    """Seconds of so many steps, the GPU's work included."""
    started = perf_counter()
    for number in range(1, steps + 1):
        step()
        if place.type == "cuda" and (number % STEPS_ON_A_GPU == 0 or number == steps):
            torch.cuda.synchronize(place)
    return perf_counter() - started


def verdict(table: Table) -> str:
    """Whether the paper's claim holds in these turns: in all of them, in none, or neither."""
    pairs = zip(table.measured[TWO_DEVICES], table.measured[ONE_GPU], strict=True)
    ratios = [two / one for two, one in pairs]
    holds = (
        "holds here" if min(ratios) > 1 else "does not hold here" if max(ratios) < 1 else "is undecided here"
    )
    speed = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) times as fast"
    return f"the two-GPU net trains {speed} as the one-GPU net: that it takes less time (section 3.2) {holds}"


def bytes_per_step(config: AlexNetConfig, batch_size: int, dtype: torch.dtype) -> int:
    """What each of the two processes sends in a training step; the formula of docs/towers.md."""
    return round(batch_size * bytes_per_image(config, dtype.itemsize))
