"""Rank and world size from the variables of torchrun or of Slurm's srun; srun's are translated to torchrun's.

    srun --ntasks 8 python -m train.run --config FILE ...

SLURM_NTASKS and SLURM_PROCID are not used: an sbatch script and a salloc shell have them, too, but a program started
there without srun is a single process, which must not wait for others or do only a part of the work. Only tasks that
srun started have SLURM_STEP_NUM_TASKS (seen in Slurm 22.05; srun(1), "output environment variables"). A shell of `srun
--pty` or of salloc's interactive step is a step of one task.
"""

import re
from collections.abc import Mapping, MutableMapping
from typing import NamedTuple

from pipeline.errors import UserError

PORTS = range(20000, 32768)
"""Range of MASTER_PORT: above the ports of known services, below those that Linux gives to outgoing connections."""
PORTS_PER_JOB = 61
"""Distance between the ports of two successive jobs, each of whose steps takes the next port; prime, and no factor of
the number of ports."""


class Task(NamedTuple):
    """Position of this process among those that were started together."""

    rank: int
    """0 to `world` - 1."""
    world: int
    """Number of processes."""
    source: str
    """Names of the variables, or of the option, that they come from."""


def find_task(environment: Mapping[str, str]) -> Task:
    """Read rank and number of processes from the variables of torchrun or of a Slurm step; (0, 1) without either.

    Raises `UserError` with the name of a variable that is missing or not such a number.
    """
    if "RANK" in environment or "WORLD_SIZE" in environment:
        names = "RANK", "WORLD_SIZE"
    elif "SLURM_STEP_NUM_TASKS" in environment:
        names = "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"
    else:
        return Task(0, 1, "")
    world = read_number(environment, names[1])
    rank = 0 if world == 1 and names[0] not in environment else read_number(environment, names[0])
    if rank >= world:
        raise UserError(f"{names[0]} is {rank}, but {names[1]} says that there are {world} processes")
    return Task(rank, world, "/".join(names))


def local_rank(environment: Mapping[str, str]) -> int:
    """Read the rank among the processes of this machine; 0 without torchrun or srun. Raises `UserError`."""
    name = "LOCAL_RANK" if environment.get("LOCAL_RANK") else "SLURM_LOCALID"
    return read_number(environment, name) if environment.get(name) else 0


def set_launch_variables(environment: MutableMapping[str, str], num_gpus: int) -> None:
    """Set the variables that torchrun sets, if srun started this process: RANK, WORLD_SIZE, LOCAL_RANK,
    LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT.

    If RANK or WORLD_SIZE is set already, perhaps by a torchrun that srun started, nothing is changed. A MASTER_ADDR or
    MASTER_PORT that is set stays. `num_gpus`: number of GPUs that this process sees. Raises `UserError` with the name
    of a variable that is missing or cannot be read.
    """
    task = find_task(environment)
    if task.world == 1:
        return
    if "WORLD_SIZE" in environment:
        check_master(environment)
        return
    environment["RANK"], environment["WORLD_SIZE"] = str(task.rank), str(task.world)
    local = read_number(environment, "SLURM_LOCALID")
    # With --gpus-per-task each task sees only its own GPU, as number 0.
    environment["LOCAL_RANK"] = "0" if num_gpus == 1 else str(local)
    environment["LOCAL_WORLD_SIZE"] = str(len(environment.get("SLURM_GTIDS", "0").split(",")))
    if "MASTER_ADDR" not in environment:
        environment["MASTER_ADDR"] = first_host(environment.get("SLURM_STEP_NODELIST", ""))
    if "MASTER_PORT" not in environment:
        job, step = (read_number(environment, name) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
        environment["MASTER_PORT"] = str(PORTS[(PORTS_PER_JOB * job + step) % len(PORTS)])
    check_master(environment)


def check_master(environment: Mapping[str, str]) -> None:
    """Raise `UserError` unless MASTER_ADDR and MASTER_PORT are set."""
    if not environment.get("MASTER_ADDR"):
        raise UserError(
            "there are other processes, but MASTER_ADDR is not set; start all of them by torchrun or srun"
        )
    if not 0 < read_number(environment, "MASTER_PORT") < 2**16:
        raise UserError(f"MASTER_PORT: expected 1..65535, got {environment['MASTER_PORT']}")


def first_host(nodes: str) -> str:
    """Parse the first machine of a Slurm list, where task 0 runs: `node03` of `node[03-05,09]`. Raises `UserError`."""
    first = re.match(r"(?:[^\[\],]|\[\d[\d,-]*\])+(?=,|$)", nodes)
    host = re.sub(r"\[(\d+)[\d,-]*\]", r"\1", first[0]) if first else ""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", host):
        raise UserError(
            f"SLURM_STEP_NODELIST is {nodes!r}: expected a list of machines; set MASTER_ADDR to the first one"
        )
    return host


def read_number(environment: Mapping[str, str], name: str) -> int:
    """Read a variable as an integer of at least 0. Raises `UserError`."""
    value = environment.get(name)
    if value is None:
        raise UserError(
            f"a launcher started this process, but {name} is not set; start it by srun or torchrun again"
        )
    if not (value.isascii() and value.isdigit()):
        raise UserError(f"{name}: expected a number from 0 on, got {value!r}")
    return int(value)
