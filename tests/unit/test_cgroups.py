"""Are limits, use and kills of memory cgroups read right, in both versions?"""

import os
from pathlib import Path

import pytest

from arriero.runtime import cgroups
from arriero.runtime.cgroups import MemoryLimit, memory_cgroup, memory_limit_and_usage, oom_kill_count

GIB = 1 << 30
V1_CGROUP = """\
9:name=systemd:/
5:devices:/
4:memory:/jobs/a1
1:cpu,cpuacct:/
0::/
"""
V1_MOUNTS = """\
31 23 0:28 / {root} rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / {root}/cpu rw,relatime - cgroup cgroup rw,cpu
35 31 0:32 / {root}/memory rw,relatime - cgroup cgroup rw,memory
41 31 0:38 / {root}/unified rw,relatime - cgroup2 cgroup2 rw
"""
V2_CGROUP = "0::/user.slice/user-1000.slice/app.scope\n"
V2_MOUNTS = """\
25 30 0:23 / /sys rw,nosuid - sysfs sysfs rw
29 25 0:26 / {root} rw,nosuid - cgroup2 cgroup2 rw,nsdelegate,memory_recursiveprot
"""


def machine(folder: Path, *, pid: int, cgroup: str, mounts: str) -> tuple[Path, Path]:
    """Write what a machine's /proc says, and return it with the folder of the hierarchies."""
    proc, root = folder / "proc", folder / "c group"
    (proc / str(pid)).mkdir(parents=True)
    (proc / str(pid) / "cgroup").write_text(cgroup)
    (proc / str(pid) / "mountinfo").write_text(mounts.format(root=_escaped(root)))
    return proc, root


def _escaped(path: Path) -> str:
    """Return a path as the kernel writes it into mountinfo."""
    return str(path).replace("\\", "\\134").replace(" ", "\\040")


def files(folder: Path, **contents: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")
    return folder


def test_version_1(tmp_path: Path) -> None:
    proc, root = machine(tmp_path, pid=7, cgroup=V1_CGROUP, mounts=V1_MOUNTS)
    memory = root / "memory"
    files(memory, memory__limit_in_bytes=9223372036854771712, memory__usage_in_bytes=30 * GIB)
    files(memory / "jobs", memory__limit_in_bytes=8 * GIB, memory__usage_in_bytes=7 * GIB)
    leaf = files(
        memory / "jobs" / "a1",
        memory__limit_in_bytes=4 * GIB,
        memory__usage_in_bytes=2 * GIB,
        memory__stat=f"cache 5\ninactive_file 1\ntotal_inactive_file {GIB}",
        memory__oom_control="oom_kill_disable 0\nunder_oom 0\noom_kill 3",
    )
    assert memory_cgroup(7, proc=proc) == leaf
    assert oom_kill_count(leaf) == 3
    # The parent has least free: 1 GiB against 3.
    assert memory_limit_and_usage(leaf) == MemoryLimit(8 * GIB, 7 * GIB)
    (memory / "jobs" / "memory.usage_in_bytes").write_text("0\n")
    assert memory_limit_and_usage(leaf) == MemoryLimit(4 * GIB, GIB)


def test_version_1_in_a_container_shows_its_own_part(tmp_path: Path) -> None:
    mounts = "35 31 0:32 /jobs/a1 {root}/memory rw - cgroup cgroup rw,memory\n"
    proc, root = machine(tmp_path, pid=7, cgroup="4:memory:/jobs/a1/inner\n", mounts=mounts)
    leaf = files(root / "memory" / "inner", memory__limit_in_bytes=GIB)
    assert memory_cgroup(7, proc=proc) == leaf


def test_version_2(tmp_path: Path) -> None:
    proc, root = machine(tmp_path, pid=7, cgroup=V2_CGROUP, mounts=V2_MOUNTS)
    slices = files(root / "user.slice", memory__max="max", memory__current=20 * GIB)
    files(slices / "user-1000.slice", memory__max=6 * GIB, memory__current=3 * GIB)
    leaf = files(
        slices / "user-1000.slice" / "app.scope",
        memory__max="max",
        memory__current=2 * GIB,
        memory__events="low 0\nhigh 0\nmax 0\noom 1\noom_kill 2\noom_group_kill 0",
    )
    assert memory_cgroup(7, proc=proc) == leaf
    assert oom_kill_count(leaf) == 2
    assert memory_limit_and_usage(leaf) == MemoryLimit(6 * GIB, 3 * GIB)


def test_without_a_limit_there_is_none(tmp_path: Path) -> None:
    proc, root = machine(tmp_path, pid=7, cgroup="0::/\n", mounts=V2_MOUNTS)
    root.mkdir()
    assert memory_cgroup(7, proc=proc) is None
    leaf = files(root / "a", memory__max="max", memory__current=5)
    assert memory_limit_and_usage(leaf) is None
    assert oom_kill_count(leaf) == 0


def test_what_cannot_be_read_is_not_known(tmp_path: Path) -> None:
    assert memory_cgroup(7, proc=tmp_path) is None
    assert memory_limit_and_usage(tmp_path / "none") is None
    assert oom_kill_count(tmp_path / "none") == 0


@pytest.mark.skipif(not cgroups.PROC.exists(), reason="only Linux has cgroups")
def test_on_this_machine() -> None:
    folder = memory_cgroup(os.getpid())
    if folder is None:
        pytest.skip("this process is in no memory cgroup")
    assert folder.is_dir()
    assert oom_kill_count(folder) >= 0
    limit = memory_limit_and_usage(folder)
    assert limit is None or limit.usage_bytes >= 0
