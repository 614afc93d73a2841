"""Checkpoints: what a run needs to go on to the same bits, and refusing those of another run."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from .files import ExperimentError, replacing


def seed_of(*words: object) -> int:
    """A seed that follows from the words alone, so that a run which starts again draws what it would have drawn."""
    text = " ".join(str(word) for word in words)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def save_checkpoint(path: Path, config: dict, parts: dict, history: list[dict]) -> None:
    """Writes the configuration, the history and the state_dict of each of the named parts."""
    states = {name: part.state_dict() for name, part in parts.items()}
    with replacing(path) as file:
        torch.save({"config": config, "history": history, **states}, file)


def load_checkpoint(path: Path, config: dict, parts: dict) -> list[dict]:
    """Brings the parts to the states in `path` and returns the history there; without a file does nothing, and [].

    Raises ExperimentError, and changes nothing, if the file cannot be read or is of another configuration.
    """
    if not path.exists():
        return []
    remedy = f"choose another output folder, or remove {path} to start anew"
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        there, history = saved["config"], saved["history"]
    except Exception as error:  # torch.load raises whatever the damage leads it to
        raise ExperimentError(f"{path} is not a readable checkpoint ({error}); {remedy}") from error
    if there != config:
        raise ExperimentError(f"{path} is of a run with another configuration ({differences(there, config)}); {remedy}")
    for name, part in parts.items():
        part.load_state_dict(saved[name])
    return history


def differences(there: dict, now: dict) -> str:
    """In which entries two configurations differ, in words."""
    return "; ".join(
        f"{key}: {there.get(key)!r} there, {now.get(key)!r} now"
        for key in dict.fromkeys([*there, *now])
        if there.get(key) != now.get(key)
    )
