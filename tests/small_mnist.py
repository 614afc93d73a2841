"""MNIST in small: noise with a bright row whose height is the class, and IDX files of it."""

from __future__ import annotations

import gzip

import numpy as np

from coarsegrad.experiments import data

BATCH = 16
TRAIN, TEST = 3 * BATCH + 5, 20


def idx_bytes(array):
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


def small_arrays():
    """Noise with a bright row whose height is the class."""
    rng = np.random.default_rng(0)
    arrays = {}
    for part, n in (("train", TRAIN), ("test", TEST)):
        labels = np.arange(n, dtype=np.uint8) % 10
        images = rng.integers(0, 60, (n, 28, 28), dtype=np.uint8)
        images[np.arange(n), 2 * labels + 4] = 250
        arrays |= {f"{part}_images": images, f"{part}_labels": labels}
    return arrays


def write_idx_folder(folder):
    """Every second file compressed."""
    for number, (name, array) in enumerate(small_arrays().items()):
        content = idx_bytes(array)
        file = data._IDX_NAMES[name]
        if number % 2:
            (folder / f"{file}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / file).write_bytes(content)
    return folder
