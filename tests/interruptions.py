"""Interrupts long runs, as Ctrl-C does, at chosen calls of one of their functions."""

from __future__ import annotations

import pytest


def count_calls(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, stop_at: tuple[int, ...] = ()) -> list[None]:
    """A list that grows by one at each call of owner.name from here on; the calls of these numbers raise
    KeyboardInterrupt."""
    calls: list[None] = []
    original = getattr(owner, name)

    def counted(*args):
        calls.append(None)
        if len(calls) in stop_at:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(owner, name, counted)
    return calls
