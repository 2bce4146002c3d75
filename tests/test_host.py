"""What a process may have of its machine, as its cgroups and limits say: cores, memory, locked memory, page cache."""

from pathlib import Path

from tools.checks.host import (
    cgroup_bytes,
    cgroup_cpus,
    check_cores,
    check_locked_memory,
    check_memory,
    check_page_cache,
    cpu_quota,
    memory_limit,
)


def test_cgroups(tmp_path: Path) -> None:
    """The smallest limit of a process's cgroup and those around it holds, in both versions; odd texts are no limit."""
    assert cgroup_cpus("250000 100000\n") == 2.5
    assert all(
        cgroup_cpus(text) is None
        for text in ("max 100000", "-1 100000", "", " ", "1", "100 0", "x y", "٣ ٣ ٣")
    )
    assert cgroup_bytes("1024\n") == 1024
    assert all(cgroup_bytes(text) is None for text in ("max", "", "9223372036854771712", "-1", "²"))
    new = tmp_path / "new"
    (new / "job" / "step").mkdir(parents=True)
    (new / "job" / "cpu.max").write_text("400000 100000\n")
    (new / "job" / "step" / "cpu.max").write_text("max 100000\n")
    (new / "job" / "memory.max").write_text("8000000000\n")
    assert cpu_quota("0::/job/step\n", new) == 4 and memory_limit("0::/job/step\n", new) == 8e9
    assert (
        cpu_quota("0::/elsewhere\n", new) is None
        and cpu_quota("", new) is None
        and cpu_quota("odd", new) is None
    )
    old = tmp_path / "old"
    for name, value in {"cpu/cpu.cfs_quota_us": "150000", "cpu/cpu.cfs_period_us": "100000"}.items():
        (old / name).parent.mkdir(parents=True, exist_ok=True)
        (old / name).write_text(value + "\n")
    (old / "memory" / "docker" / "a").mkdir(parents=True)
    (old / "memory" / "docker" / "a" / "memory.limit_in_bytes").write_text("5000000\n")
    (old / "memory" / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    membership = "4:memory:/docker/a\n3:cpu,cpuacct:/docker/a\n0::/\n"
    assert cpu_quota(membership, old) == 1.5 and memory_limit(membership, old) == 5_000_000


def test_cores_and_memory() -> None:
    """A quota below the cores names the threads to set; memory that is unknown is no warning."""
    assert check_cores(8, 8, None).status == check_cores(8, 8, 8.0).status == "ok"
    assert "--data.speed.threads 3" in check_cores(64, 64, 2.0).remedy
    info = "MemTotal:       65000000 kB\nMemAvailable:   60000000 kB\n"
    assert check_memory(info, None).status == "ok" and check_memory(info, 10**9).status == "warning"
    assert check_memory("odd", None).status == check_memory("", 5).status == "-"
    assert (
        check_page_cache(10**10, 10**9).status == "ok" and check_page_cache(10**9, 10**10).status == "warning"
    )
    assert check_locked_memory(2**23, infiniband=True).status == "warning"
    assert check_locked_memory(2**23, infiniband=False).status == check_locked_memory(-1, True).status == "ok"
