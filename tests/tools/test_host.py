"""What the machine and the environment say of malloc and threads."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from coarsegrad import _host
from coarsegrad.experiments import arguments

# The fewest page faults of a step that frees all it allocates: none after the first if malloc keeps it.
FAULTS = """
import resource
import torch
from coarsegrad.experiments.arguments import usable_device

usable_device("cpu")


def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(2**20) for _ in range(4)]  # of 4 MiB
    blocks.append(torch.ones(2**24))  # of 64 MiB, which by default always goes back
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


print(min(faults() for _ in range(10)))  # a system short of memory takes some that is not in use
"""


@pytest.mark.skipif(not _host._is_glibc(), reason="glibc's malloc is not in use")
@pytest.mark.parametrize("settings, keeps", [({}, True), ({"MALLOC_PERTURB_": "0"}, False)])
def test_commands_that_train_have_malloc_keep_memory_unless_the_environment_sets_it(settings, keeps):
    clean = {name: value for name, value in os.environ.items() if not _host._SETTINGS.fullmatch(name)}
    run = subprocess.run(
        [sys.executable, "-c", FAULTS], env=clean | settings, capture_output=True, text=True, check=True
    )
    pages = 5 * 2**20 * 4 // os.sysconf("SC_PAGE_SIZE")
    assert int(run.stdout) < 100 if keeps else int(run.stdout) > pages / 512  # which may be huge ones


def test_not_with_tunables_or_another_malloc(monkeypatch):
    calls = []
    monkeypatch.setattr(arguments, "keep_freed_memory", lambda: calls.append("cpu"))
    arguments.usable_device("cpu")
    assert calls == ["cpu"]
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.perturb=0")
    assert not _host.keep_freed_memory()
    monkeypatch.delenv("GLIBC_TUNABLES")
    monkeypatch.setattr(_host, "preloaded_malloc", lambda: "tcmalloc")
    assert not _host.keep_freed_memory() and not any("malloc" in reason for reason in _host.slow_reasons())


@pytest.mark.parametrize("value, keeps", [("0x4000000", True), ("67108864", True), ("33554432", False), ("all", False)])
@pytest.mark.parametrize("name", ["MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"])
def test_thresholds_are_read_as_glibc_does(name, value, keeps, monkeypatch):
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    monkeypatch.setenv(name, value if name.startswith("MALLOC") else f"glibc.malloc.mmap_threshold={value}:glibc.x=1")
    assert _host._keeps_large_blocks() == keeps


def _write(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.fsencode(text))
    return root


@pytest.mark.parametrize(
    "files, cores",
    [
        ({}, 64),
        ({"proc/self/cgroup": "0::/\n"}, 64),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "max 100000\n"}, 64),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "150000 100000\n"}, 2),
        ({"proc/self/cgroup": "0::/of/the/host\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
        ({"proc/self/cgroup": "4:memory:/m\n3:cpu,cpuacct:/c\n0::/\n",
          "sys/fs/cgroup/cpu/c/cpu.cfs_quota_us": "300000\n", "sys/fs/cgroup/cpu/c/cpu.cfs_period_us": "100000\n",
          "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
          "sys/fs/cgroup/m/cpu.max": "100000 100000\n"}, 3),
        # Not what a kernel writes, or a name of any bytes: no reason to fail.
        ({"proc/self/cgroup": "\nodd\n0::/\udcff/b\n", "sys/fs/cgroup/cpu.max": "200000 100000",
          "sys/fs/cgroup/\udcff/cpu.max": "100000 0\n", "sys/fs/cgroup/\udcff/b/cpu.max": "100000\n"}, 2),
    ],
)  # fmt: skip
def test_cores_are_those_of_the_affinity_or_of_the_quota(files, cores, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(64), raising=False)
    assert _host.usable_cores(_write(tmp_path, files)) == cores


@pytest.mark.usefixtures("one_thread")
def test_waiting_threads_are_named_where_there_are_some(monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    monkeypatch.setattr(_host, "usable_cores", lambda: 1)
    assert not any("thread" in reason for reason in _host.slow_reasons())
    torch.set_num_threads(3)
    reasons = [reason for reason in _host.slow_reasons() if "thread" in reason]
    assert len(reasons) == 2
    assert reasons[0].startswith("3 threads on 1 core: ") and "OMP_NUM_THREADS=1" in reasons[0]
    assert reasons[1].startswith("OMP_WAIT_POLICY=ACTIVE")
