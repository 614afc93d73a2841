"""A release: one version everywhere, and what `make wheels` makes of the sources. What it builds, .ci/run installs."""

from __future__ import annotations

import importlib.metadata
import re
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from paths import ROOT
from tools import wheels

VERSION = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
WHEEL = f"coarsegrad-{VERSION}+torch2.9.1-cp312-cp312"


def test_version_is_the_same_everywhere():
    newest, date = re.findall(r"^## \[(\d.*)\] - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[0]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert VERSION == newest == citation["version"]
    assert date == str(citation["date-released"])


@pytest.mark.parametrize(
    "torch, cuda, suffix",
    [("2.8.0+cpu", "0", "torch2.8.0"), ("2.8.0+cu128", "0", "torch2.8.0"), ("2.8.0+cu128", "1", "torch2.8.0.cu128")],
)
def test_version_of_a_wheel_says_which_torch_it_fits(monkeypatch, torch, cuda, suffix):
    monkeypatch.setenv("COARSEGRAD_CUDA", cuda)
    assert wheels.local_version(torch) == suffix


def test_only_pythons_that_run_are_found(monkeypatch, tmp_path):
    """A launcher of pyenv runs only what PYENV_VERSION names."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    for name, script in (
        ("python3.90", f'[ "$PYENV_VERSION" = 3.90 ] && exec {sys.executable} "$@"'),
        ("python3.91", "exit 127"),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    assert [wheels.find_python(minor) for minor in (90, 91, 92)] == [sys.executable, None, None]


@pytest.fixture
def commands(monkeypatch, tmp_path):
    """Commands are recorded, and leave the files that they would; Python 3.12 is the only one. Returns (commands, what
    to carry in a wheel that is audited)."""
    ran, carried = [], []

    def run(*command, **environment):
        command = list(map(str, command))
        ran.append((command, environment))
        if "build" in command:
            Path(command[-1], f"coarsegrad-{VERSION}.tar.gz").touch()
        elif "wheel" in command:
            pure = environment["COARSEGRAD_NATIVE"] == "0"
            name = f"coarsegrad-{VERSION}-py3-none-any" if pure else f"{WHEEL}-linux_x86_64"
            folder = Path(command[command.index("--wheel-dir") + 1])
            folder.mkdir(exist_ok=True)
            (folder / f"{name}.whl").touch()
        elif "auditwheel" in command:
            folder = Path(command[command.index("--wheel-dir") + 1])
            folder.mkdir()
            with zipfile.ZipFile(folder / f"{WHEEL}-manylinux_2_28_x86_64.whl", "w") as wheel:
                for name in ["coarsegrad/_C.so", *carried]:
                    wheel.writestr(name, "")
        return "2.9.1+cu128"

    monkeypatch.setattr(wheels, "run", run)
    monkeypatch.setattr(wheels, "check_tools", lambda: None)
    monkeypatch.setattr(wheels, "find_python", lambda minor: "/python3.12" if minor == 12 else None)
    monkeypatch.delenv("COARSEGRAD_CUDA", raising=False)
    return ran, carried


def test_progress_then_what_was_built_and_what_was_not(commands, tmp_path, capsys):
    (tmp_path / "coarsegrad-0.0.1-py3-none-any.whl").touch()
    (tmp_path / "somebody's").touch()
    wheels.main(["--out", str(tmp_path), "--torch", "2.9.1"])
    printed = capsys.readouterr().out
    assert re.findall(r"^\[(.)/3\]", printed, re.MULTILINE) == ["1", "2", "3"]
    assert "/python3.12, torch 2.9.1" in printed
    assert "NOT BUILT for Python 3.10, 3.11, 3.13, 3.14: no such Python" in printed
    names = [f"coarsegrad-{VERSION}{end}" for end in ("-py3-none-any.whl", ".tar.gz")]
    names.insert(0, f"{WHEEL}-manylinux_2_28_x86_64.whl")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names, "somebody's"])
    assert [line.split()[-1] for line in printed.splitlines()[-3:]] == sorted(names)


def test_wheel_is_built_from_the_source_distribution_for_its_torch(commands, tmp_path):
    wheels.main(["--out", str(tmp_path), "--torch", "2.9.1"])
    ran, _ = commands
    built = [(command, environment) for command, environment in ran if "wheel" in command]
    assert all(command[-1].endswith(".tar.gz") and "--no-build-isolation" not in command for command, _ in built)
    assert [environment["COARSEGRAD_NATIVE"] for _, environment in built] == ["0", "1"]
    assert any("torch==2.9.1" in command for command, _ in ran)
    (audit,) = (command for command, _ in ran if "auditwheel" in command)
    assert {"libtorch*.so*", "libc10*.so*"} <= set(audit)


def test_wheel_that_carries_a_library_of_torch_is_an_error(commands, tmp_path):
    commands[1].append("coarsegrad.libs/libtorch_cpu-0123.so")
    with pytest.raises(SystemExit, match="carries libraries of others: coarsegrad.libs/libtorch_cpu"):
        wheels.main(["--out", str(tmp_path), "--torch", "2.9.1"])
    assert not list(tmp_path.glob("*manylinux*"))


def test_failing_command_is_shown_with_its_output():
    with pytest.raises(SystemExit, match=r"(?s)to stdout.*to stderr.*FAILED: .*python"):
        wheels.run(sys.executable, "-c", "import sys; print('to stdout'); sys.exit('to stderr')")


def test_what_it_needs_is_asked_for_before_minutes_pass(monkeypatch, tmp_path, capsys):
    def version(name):
        if name == "build":
            raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(SystemExit, match="build is not installed: pip install -r requirements-dev.txt"):
        wheels.main(["--out", str(tmp_path)])
    monkeypatch.setattr(wheels, "check_tools", lambda: None)
    with pytest.raises(SystemExit):
        wheels.main(["--out", str(tmp_path), "--environment", "nowhere"])
    assert "--environment must name virtual environments, got " in capsys.readouterr().err
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text(f'#!/bin/sh\nexec {sys.executable} -S -I "$@"\n')
    (tmp_path / "bin" / "python").chmod(0o755)
    with pytest.raises(SystemExit, match="has no torch to build for"):
        wheels.main(["--out", str(tmp_path), "--environment", str(tmp_path)])
