"""How many threads compute on a CPU: mask and quota bound the number, and what the user says comes first."""

import math
import os

import pytest
import torch

from alphaflow_cli.runtime import threads
from alphaflow_cli.runtime.threads import cgroup_quota, cores_here, crowded, threads_bounded, threads_granted

FILES = {  # what /proc/self/cgroup says, the files under /sys/fs/cgroup, and the cores that they grant
    "version 2": ("0::/job\n", {"job/cpu.max": "150000 100000\n"}, 1.5),
    "version 2, the group above": ("0::/a/b\n", {"a/cpu.max": "200000 100000", "a/b/cpu.max": "max 100000"}, 2),
    "version 2, in a container": ("0::/\n", {"cpu.max": "100000 100000\n"}, 1),
    "version 1": ("1:cpu:/job\n", {"cpu/job/cpu.cfs_quota_us": "50000", "cpu/job/cpu.cfs_period_us": "100000"}, 0.5),
    "version 1, two controllers in one": (
        "4:cpu,cpuacct:/docker/77\n0::/\n",  # a path of the host, which is not mounted in the container
        {"cpu,cpuacct/cpu.cfs_quota_us": "300000", "cpu,cpuacct/cpu.cfs_period_us": "100000"},
        3,
    ),
    "no limit": ("1:cpu:/job\n0::/job\n", {"cpu/job/cpu.cfs_quota_us": "-1", "job/cpu.max": "max 100000"}, math.inf),
    "no cgroups": (None, {}, math.inf),
    "another controller": ("1:cpuset:/job\n", {"cpuset/cpu.max": "100000 100000"}, math.inf),
}


def system(root, kind):
    """A file system whose cgroups are of this kind."""
    lines, files, cores = FILES[kind]
    (root / "proc/self").mkdir(parents=True)
    if lines is not None:
        (root / "proc/self/cgroup").write_text(lines)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return cores


@pytest.fixture
def eight_cores(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)


@pytest.mark.parametrize("kind", FILES)
def test_the_quota_is_read_from_every_level_of_both_kinds_of_cgroups(kind, tmp_path):
    cores = system(tmp_path, kind)
    assert cgroup_quota(tmp_path) == cores


def test_mask_and_quota_bound_the_cores_and_the_smaller_one_is_named(eight_cores, monkeypatch, tmp_path):
    assert (cores_here(tmp_path).count, cores_here(tmp_path).bound) == (8, "8 cores")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 5}, raising=False)
    assert (cores_here(tmp_path).count, cores_here(tmp_path).bound) == (2, "an affinity mask of 2 cores")
    system(tmp_path, "version 2")
    assert (cores_here(tmp_path).count, cores_here(tmp_path).bound) == (1, "a cgroup's quota of 1.5 cores")
    system(tmp_path / "half", "version 1")
    assert cores_here(tmp_path / "half").count == 1, "less than a core is one thread"


def test_processes_of_one_command_share_the_cores(eight_cores, monkeypatch):
    assert threads_granted(None).count == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert (threads_granted(None).count, threads_granted(None).reason) == (2, "8 cores for 3 processes")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert threads_granted(None).count == 1


def test_the_users_number_comes_before_the_systems_and_too_many_are_named(eight_cores, monkeypatch):
    assert (threads_granted(3).count, threads_granted(3).chosen) == (3, True)
    assert crowded(threads_granted(3)) == ""
    assert "beware: 12 threads (--threads) on 8 cores" in crowded(threads_granted(12))
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0}, raising=False)
    assert (threads_granted(None).count, threads_granted(None).reason) == (8, "OMP_NUM_THREADS=8")
    monkeypatch.setenv(threads.OURS, "1")  # --processes has set it: no word of the user's
    assert threads_granted(None).count == 1


def test_a_command_computes_with_the_bounded_number_and_leaves_torchs_own_behind(monkeypatch, capsys):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        monkeypatch.setattr(threads, "cores_here", lambda: threads.Cores(1, "a cgroup's quota of 1 core"))
        with threads_bounded(None, on_cpu=True, is_main=True):
            assert torch.get_num_threads() == 1
        assert "threads: 1 (a cgroup's quota of 1 core)" in capsys.readouterr().err
        with threads_bounded(None, on_cpu=False, is_main=True):
            assert torch.get_num_threads() == 2, "a GPU's host threads are torch's affair"
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
