"""Processes that srun starts find each other; what else runs in an allocation stays alone."""

import os
import subprocess
from itertools import product
from pathlib import Path

import pytest
import torch

from pipeline.errors import UserError
from tests.helpers import TRAIN, rows_of, run_python, shared_run, start_python
from train.device import pick_device
from train.launch import PORTS, find_task, first_host, local_rank, set_launch_variables

# What Slurm 22.05 set where two tasks were asked for (shortened to what bears on this): in the script of sbatch, in the
# shell of salloc, in the shell of salloc under LaunchParameters=use_interactive_step, and in srun's second task.
SCRIPT = dict(SLURM_JOB_ID="7", SLURM_NTASKS="2", SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_GTIDS="0")
SALLOC = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "node[03-04]"}
INTERACTIVE = SCRIPT | dict(SLURM_STEP_ID="4294967290", SLURM_STEP_NUM_TASKS="1")
TASK = SCRIPT | dict(SLURM_PROCID="1", SLURM_LOCALID="1", SLURM_GTIDS="0,1", SLURM_STEP_ID="0")
TASK |= dict(SLURM_STEP_NUM_TASKS="2", SLURM_STEP_NODELIST="node[03-04]")


def launched(environment: dict[str, str], num_gpus: int = 0) -> dict[str, str]:
    """What `set_launch_variables` adds or changes."""
    after = dict(environment)
    set_launch_variables(after, num_gpus)
    return {name: value for name, value in after.items() if environment.get(name) != value}


def test_a_task_of_srun_gets_what_torchrun_sets() -> None:
    """All six variables, of the step's size and not the allocation's; each knows its place on a machine before, too."""
    step_of_eight = {"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5", "SLURM_GTIDS": "4,5,6,7"}
    found = launched(TASK | step_of_eight, num_gpus=4)
    assert int(found.pop("MASTER_PORT")) in PORTS
    sizes = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    assert found == sizes | {"MASTER_ADDR": "node03"}
    assert (local_rank(TASK), local_rank(TASK | {"LOCAL_RANK": "0"}), local_rank({})) == (1, 0, 0)


@pytest.mark.parametrize("environment", [{}, SCRIPT, SALLOC, INTERACTIVE])
def test_an_allocation_is_no_launch(environment: dict[str, str]) -> None:
    """What a script or a shell starts without srun is one process, which waits for nobody."""
    assert launched(environment) == {}
    assert find_task(environment)[:2] == (0, 1)


def test_torchrun_comes_first() -> None:
    """Variables of another launcher stay as they are, also where srun started that launcher; so does a given place to
    meet."""
    torchrun = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3", "MASTER_ADDR": "a", "MASTER_PORT": "1234"}
    assert launched(TASK | torchrun) == launched(TASK | {"WORLD_SIZE": "1"}) == {}
    given = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"}
    assert launched(TASK | given).keys() == {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"}
    assert launched(TASK | {"MASTER_ADDR": "x", "SLURM_STEP_NODELIST": "?"})["RANK"] == "1"


def test_a_task_that_sees_its_own_gpu_alone_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second task of a machine takes the one GPU that --gpus-per-task shows it, and the second of several, as the
    current one; too few GPUs are refused."""
    current: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    for visible, index in ((1, 0), (2, 1)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda visible=visible: visible)
        monkeypatch.setenv("LOCAL_RANK", launched(TASK, visible).get("LOCAL_RANK", "0"))
        assert pick_device("auto") == torch.device("cuda", index) and current[-1] == index
    monkeypatch.setenv("LOCAL_RANK", launched(TASK | {"SLURM_LOCALID": "2"}, 2)["LOCAL_RANK"])
    with pytest.raises(UserError, match="at most 2 processes"):
        pick_device("auto")


HOSTS = "vm=vm node[03-05,09]=node03 node[12]=node12 a-1,b-2=a-1 a-1,b[2-3]=a-1 gpu-[7,9],x=gpu-7"
HOSTS += " rack[0-1]node[010-019].local,y[1-2]=rack0node010.local 10.0.0.[5-6]=10.0.0.5"


@pytest.mark.parametrize("pair", HOSTS.split())
def test_first_host(pair: str) -> None:
    """The first name that `scontrol show hostnames` would print, leading zeros included."""
    nodes, host = pair.split("=")
    assert first_host(nodes) == host


def test_jobs_and_steps_do_not_meet() -> None:
    """A hundred successive jobs of ten steps each meet at as many ports, the tasks of one step at one; the
    huge number of salloc's interactive step gives a port as well."""
    places = product(range(10**7, 10**7 + 100), (*range(9), 4294967290))
    tasks = [TASK | {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)} for job, step in places]
    ports = [launched(task)["MASTER_PORT"] for task in tasks]
    assert len(set(ports)) == 1000 and all(20000 <= int(port) < 32768 for port in ports)
    assert ports == [launched(task | {"SLURM_PROCID": "0"})["MASTER_PORT"] for task in tasks]


TORCHRUN = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1234"}
BROKEN: list[tuple[dict[str, str], str, str | None]] = [
    *((TASK, "SLURM_PROCID", value) for value in ("2", "-1", None)),
    (TASK, "SLURM_STEP_NUM_TASKS", "0"),
    *((TASK, "SLURM_STEP_NODELIST", nodes) for nodes in (None, "", "node[03", "n]3", "n[a-b]", ",a", "a b")),
    (TASK, "SLURM_JOB_ID", "7_1"),
    *((TASK | TORCHRUN, "RANK", value) for value in ("2", "x", None)),
    (TASK | TORCHRUN, "WORLD_SIZE", None),
    (TORCHRUN, "MASTER_ADDR", ""),
    *((TORCHRUN, "MASTER_PORT", value) for value in ("99999", None)),
]


@pytest.mark.parametrize(("given", "name", "value"), BROKEN)
def test_broken_values(given: dict[str, str], name: str, value: str | None) -> None:
    """A number that is none, does not fit or is missing, and nowhere to meet, are refused by name; of two launchers
    torchrun's variables count."""
    broken = {key: text for key, text in {**given, name: value}.items() if text is not None}
    with pytest.raises(UserError, match=name):
        launched(broken)


@pytest.mark.slow
def test_two_tasks_train_together(shards: Path, tmp_path: Path) -> None:
    """Two processes with srun's variables and none of torchrun's are one run; one with a batch script's is alone."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    step = TASK | {"SLURM_STEP_NODELIST": "localhost", "SLURM_JOB_ID": str(os.getpid())}
    command = [*TRAIN, *shared_run(shards, tmp_path / "two")]
    each = [clean | step | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(2)]
    tasks = [start_python(*command, env=environment, stderr=subprocess.STDOUT) for environment in each]
    outputs = [task.communicate(timeout=120)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], outputs
    assert "in each of 2 processes" in outputs[0]
    assert ["ten-view top-1" in output for output in outputs] == [True, False]
    assert [row["kind"] for row in rows_of(tmp_path / "two")].count("eval") == 1

    alone = run_python(*TRAIN, *shared_run(shards, tmp_path / "alone"), env=clean | SCRIPT)
    assert alone.returncode == 0 and "in each of" not in alone.stdout, alone.stderr
