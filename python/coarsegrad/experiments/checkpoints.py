"""Checkpoints: a resumed run gives the same bits, and checkpoints of another configuration are refused."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from . import processes
from .files import ExperimentError, replacing


def seed_of(*words: object) -> int:
    """A seed that depends on the words alone, so that a resumed run draws the same random numbers."""
    text = " ".join(str(word) for word in words)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def save_checkpoint(path: Path, config: dict, parts: dict, history: list[dict]) -> None:
    """Write the configuration, the history and the state_dict of each of the named parts, from process 0.

    All processes must call this: shards are gathered.
    """
    states = {name: processes.whole(part.state_dict()) for name, part in parts.items()}
    if processes.rank():
        return
    with replacing(path) as file:
        torch.save({"config": config, "history": history, **states}, file)


def load_checkpoint(path: Path, config: dict, parts: dict) -> list[dict]:
    """Load the states of the parts from `path` and return its history; [] if there is no file.

    Raises ExperimentError, without changing anything, if the file cannot be read or has another configuration.
    """
    if not path.exists():
        return []
    remedy = f"choose another output folder, or remove {path} to start over"
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        there, history = saved["config"], saved["history"]
    except Exception as error:  # torch.load can raise almost anything on a damaged file
        raise ExperimentError(f"{path} is not a readable checkpoint ({error}); {remedy}") from error
    if there != config:
        raise ExperimentError(
            f"{path} is from a run with another configuration ({differences(there, config)}); {remedy}"
        )
    for name, part in parts.items():
        processes.load(part, saved[name])
    return history


def differences(there: dict, now: dict) -> str:
    """The entries in which two configurations differ, as text."""
    return "; ".join(
        f"{key}: {there.get(key)!r} there, {now.get(key)!r} now"
        for key in dict.fromkeys([*there, *now])
        if there.get(key) != now.get(key)
    )
