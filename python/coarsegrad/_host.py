"""What of this machine and process makes a CPU slower than it could be: malloc, and threads that wait for a core."""

from __future__ import annotations

import ctypes
import math
import os
import platform
import re
from pathlib import Path

import torch

# ------------------------------------------------------------------------------------------------ malloc

# glibc's defaults adapt to the program, up to this size of a block; larger ones always return to the system.
_GLIBC_MMAP_THRESHOLD = 32 * 2**20
_SETTINGS = re.compile(r"MALLOC_\w+_|GLIBC_TUNABLES")
# Of <malloc.h>: the numbers of mallopt's parameters.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST = 2**30


def preloaded_malloc() -> str | None:
    """The allocator that replaces the C library's malloc in this process, such as tcmalloc, or None."""
    loaded = _read(Path("/proc/self/maps"))
    return next((name for name in ("tcmalloc", "jemalloc", "mimalloc") if f"lib{name}" in loaded), None)


def _is_glibc() -> bool:
    return platform.libc_ver()[0] == "glibc" and preloaded_malloc() is None


def _keeps_large_blocks() -> bool:
    """Whether the environment tells glibc's malloc to."""
    tunable = re.search(r"glibc\.malloc\.mmap_threshold=(\w+)", os.environ.get("GLIBC_TUNABLES", ""))
    threshold = os.environ.get("MALLOC_MMAP_THRESHOLD_", tunable[1] if tunable else "")
    return _number(threshold) > _GLIBC_MMAP_THRESHOLD


def keep_freed_memory() -> bool:
    """Have glibc's malloc keep what is freed in this process, for the next output, up to blocks of 1 GiB. Else it gives
    memory back to the system at every step of a training, and the next step pays for its pages, one fault each.

    Returns whether it does: not if there is another malloc, or any setting of malloc's in the environment.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if _is_glibc() else None
    if mallopt is None or any(map(_SETTINGS.fullmatch, os.environ)):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST) and mallopt(_M_TRIM_THRESHOLD, -1))  # -1: never


# ------------------------------------------------------------------------------------------------ threads


def usable_cores(root: Path = Path("/")) -> int:
    """The cores that this process may use: those of its affinity, or, if that is less, as many as the quota of its
    control group is worth, rounded up. root: of the file system."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min([affinity, *(max(1, math.ceil(quota)) for quota in _quotas(root))])


def _quotas(root: Path) -> list[float]:
    """The cores that control groups allow: this process's and those around it, of both versions."""
    found, mounts = [], root / "sys/fs/cgroup"
    lines = [line.split(":", 2) for line in _read(root / "proc/self/cgroup").splitlines()]
    for _, controllers, path in (fields for fields in lines if len(fields) == 3):
        base = mounts / "cpu" if "cpu" in controllers.split(",") else mounts
        if controllers and base == mounts:
            continue
        # In a container the path may be that outside of it: then the group is the one that is mounted.
        for folder in {base, base / path.lstrip("/"), *(base / path.lstrip("/")).parents}:
            if folder.is_relative_to(base):
                both = _read(folder / "cpu.max").split() or [
                    _read(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")
                ]
                quota, period = map(_number, (*both, "", "")[:2])
                if quota > 0 and period > 0:  # else "max", or -1, or none
                    found.append(quota / period)
    return found


def _number(text: str) -> int:
    """0 if it is none; decimal, or hexadecimal as glibc takes it too."""
    try:
        return int(text, 0)
    except ValueError:
        return 0


def _read(path: Path) -> str:
    """The text of a file, in which names may be of any bytes; empty if it cannot be read."""
    try:
        return os.fsdecode(path.read_bytes())
    except (OSError, ValueError):  # a NUL in its name
        return ""


# ------------------------------------------------------------------------------------------------ advice


def slow_reasons() -> list[str]:
    """Why this process is slower than it could be, and remedies."""
    reasons = []
    threads, cores = torch.get_num_threads(), usable_cores()
    policy = os.environ.get("OMP_WAIT_POLICY", "").upper()
    if threads == 1 < cores:
        reasons.append(f"1 thread on {cores} cores: torch.set_num_threads or OMP_NUM_THREADS sets more")
    if threads > cores:
        reasons.append(
            f"{threads} threads on {cores} core{'s' * (cores > 1)}: they wait for each other's core;"
            f" torch.set_num_threads({cores}) or OMP_NUM_THREADS={cores} sets fewer"
        )
    if threads > 1 and policy == "ACTIVE":
        reasons.append(
            "OMP_WAIT_POLICY=ACTIVE: threads that wait keep their cores busy, and other work off them; with PASSIVE"
            " they sleep"
        )
    if _is_glibc() and not _keeps_large_blocks():
        reasons.append(
            "glibc's malloc returns freed memory to the system, always that of blocks above 32 MiB, and each new output"
            " pays for its pages again: use inplace=True, a preloaded tcmalloc, or"
            " MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592; the trainings of"
            " `python -m coarsegrad` see to it themselves"
        )
    return reasons
