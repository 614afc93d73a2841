"""What a result says of where it comes from."""

from __future__ import annotations

import subprocess

import torch

from coarsegrad.experiments import measure


def test_the_peak_counts_what_is_there_at_once():
    def job():
        one = torch.empty(1000) + 1  # 8,000 bytes at once; 4,000 stay
        two = torch.empty(500)
        del one
        return two, torch.empty(3000).sum()  # 14,000

    for _ in range(2):
        assert 14_000 <= measure.peak_bytes(job, torch.device("cpu")) < 14_100


def test_which_commit_a_result_is_of(tmp_path, monkeypatch):
    def git(*arguments):
        who = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        return subprocess.run(["git", "-C", tmp_path, *who, *arguments], check=True, capture_output=True, text=True)

    source, result = tmp_path / "python" / "measure.py", tmp_path / "bench" / "results" / "times.csv"
    for path in (source, result):
        path.parent.mkdir(parents=True)
        path.write_text("old\n")
    monkeypatch.setattr(measure, "__file__", str(source))
    git("init", "--quiet")
    git("add", "bench")
    git("commit", "--quiet", "-m", "one")
    assert measure._git_commit() is None  # the file is not part of the repository
    git("add", ".")
    git("commit", "--quiet", "-m", "two")
    commit = git("rev-parse", "HEAD").stdout.strip()
    assert measure._git_commit() == commit
    result.write_text("new\n")
    assert measure._git_commit() == commit
    source.write_text("new\n")
    assert measure._git_commit() == f"{commit}-dirty"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert measure._git_commit() is None
