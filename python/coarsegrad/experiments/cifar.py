"""CIFAR-10 as tensors, from the files of its binary version in a folder, and the usual augmentation.

Source of the images: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .data import Split
from .files import ExperimentError

_TRAIN_FILES = tuple(f"data_batch_{number}.bin" for number in range(1, 6))
_TEST_FILE = "test_batch.bin"
_CLASSES = 10
_SHAPE = (3, 32, 32)
_RECORD = 1 + 3 * 32 * 32  # the class, then the red, the green and the blue plane, rows from the top
# Mean and standard deviation of the training pixels by colour, scaled to 0..1.
_MEAN, _STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
_PADDING = 4


def load_cifar10(folder: Path | None) -> tuple[Split, Split, str]:
    """(training set, test set, sha256 of the files' bytes) from `data_batch_1.bin` to `_5.bin` and `test_batch.bin`;
    images [N, 3, 32, 32], standardized. Raises ExperimentError if a file is missing or damaged."""
    wanted = (*_TRAIN_FILES, _TEST_FILE)
    if folder is None:
        raise ExperimentError(f"--data must name the folder with CIFAR-10's {', '.join(wanted)}")
    if not folder.is_dir():
        raise ExperimentError(f"--data {folder} is not a folder; wanted one with CIFAR-10's {', '.join(wanted)}")
    if missing := [name for name in wanted if not (folder / name).is_file()]:
        raise ExperimentError(
            f"--data {folder} lacks {', '.join(missing)}; wanted the unpacked binary version of CIFAR-10"
        )
    records = [_records(folder / name) for name in wanted]
    digest = hashlib.sha256()
    for part in records:
        digest.update(part.data)
    return _split(np.concatenate(records[:-1])), _split(records[-1]), digest.hexdigest()


def _records(path: Path) -> np.ndarray:
    content = np.fromfile(path, np.uint8)
    if len(content) == 0 or len(content) % _RECORD:
        raise ExperimentError(f"{path} is damaged: {len(content):,} bytes, wanted a multiple of {_RECORD:,}")
    records = content.reshape(-1, _RECORD)
    if records[:, 0].max() >= _CLASSES:
        raise ExperimentError(f"{path} has the label {records[:, 0].max()}, wanted 0..{_CLASSES - 1}")
    return records


def _split(records: np.ndarray) -> Split:
    x = torch.from_numpy(records[:, 1:].reshape(-1, *_SHAPE)).float().div_(255)
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (_MEAN, _STD))
    return Split(x.sub_(mean).div_(std), torch.from_numpy(records[:, 0].astype(np.int64)))


def crop_and_flip(x: Tensor) -> Tensor:
    """Each image of [N, C, H, W] shifted by -4..4 in both directions, padded with zeros, and mirrored with probability
    1/2. Uses torch's CPU generator on every device."""
    n, _, height, width = x.shape
    top, left = torch.randint(2 * _PADDING + 1, (2, n, 1))
    rows, columns = top + torch.arange(height), left + torch.arange(width)
    columns = torch.where(torch.rand(n, 1) < 0.5, columns.flip(1), columns)
    index = (torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :])
    padded = F.pad(x, [_PADDING] * 4).permute(0, 2, 3, 1)
    return padded[tuple(i.to(x.device) for i in index)].permute(0, 3, 1, 2)
