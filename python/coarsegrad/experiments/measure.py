"""The time and peak memory of a training step, and the machine."""

from __future__ import annotations

import itertools
import json
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from .. import __version__
from ..backends import backends


def interleaved_times(
    jobs: Mapping[str, Callable[[], object]], rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of every call. The jobs take turns, so that a slow phase of the machine affects all of them equally.

    The first tenth of the rounds, at least one, is warm-up and not reported.
    """
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    warmup = max(1, rounds // 10)
    for i in range(warmup + rounds):
        for name, job in jobs.items():
            _synchronize(device)
            start = time.perf_counter()
            job()
            _synchronize(device)
            if i >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def peak_bytes(job: Callable[[], object], device: torch.device) -> int:
    """Peak bytes allocated by torch during a call, which must not free memory allocated before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        job()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler reports start and end on standard error
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        job()
    with tempfile.TemporaryDirectory() as folder:
        profile.export_chrome_trace(str(path := Path(folder) / "trace.json"))
        events = json.loads(path.read_text())["traceEvents"]
    events = sorted((event for event in events if event.get("name") == "[memory]"), key=lambda event: event["ts"])
    return max(itertools.accumulate((event["args"]["Bytes"] for event in events), initial=0))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def environment(device: torch.device) -> dict[str, object]:
    """What results depend on besides the configuration: machine, versions, threads and backend."""
    serving = backends()[device.type]
    return {
        "coarsegrad": __version__,
        "git": _git_commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": _cpu_name(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "backend": f"{serving.backend} ({serving.detail})",
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _git_commit() -> str | None:
    """The commit of the working copy that tracks this file, with `-dirty` if it has changes; None without one.

    Results and the pages generated from them are ignored: a command that writes several would see its own first one.
    """
    generated = (":(exclude,top)bench/results", ":(exclude,top)docs")
    try:
        tracked = _git("ls-files", "--error-unmatch", Path(__file__).name)
        described = _git("describe", "--always", "--abbrev=40")
        changed = _git("diff", "--quiet", "HEAD", "--", ":(top)", *generated)
    except OSError:
        return None
    if tracked.returncode or described.returncode:
        return None
    return described.stdout.decode().strip() + ("-dirty" if changed.returncode else "")


def _git(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(["git", "-C", str(Path(__file__).parent), *arguments], capture_output=True)
