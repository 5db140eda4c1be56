"""Shards that are not what they should be."""

import json

import numpy as np
import pytest
from small_text import make_shards, some_documents, write_bpe

from linattn.data import ByteTokenizer, TokenShards, load_tokenizer


def test_a_truncated_shard_is_refused_with_both_sizes(tmp_path):
    shards = make_shards(tmp_path, some_documents(), shard_tokens=100)
    path = tmp_path / "out" / "train" / "shard-00001.bin"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match=r"shard-00001.bin: expected 200 bytes, found 197"):
        TokenShards(tmp_path / "out")
    path.unlink()
    with pytest.raises(ValueError, match=r"shard-00001.bin: is missing"):
        TokenShards(tmp_path / "out")
    del shards


def test_a_changed_byte_is_found_by_verify(tmp_path):
    make_shards(tmp_path, some_documents())
    path = tmp_path / "out" / "train" / "shard-00000.bin"
    data = bytearray(path.read_bytes())
    data[50] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"shard-00000.bin: SHA-256 \w{64}, expected \w{64}"):
        TokenShards(tmp_path / "out").verify()


@pytest.mark.parametrize("change", [(3, 0), (3, -1), (-1, 5), (0, -2)])
def test_an_index_that_does_not_rise_is_refused(tmp_path, change):
    make_shards(tmp_path, some_documents())
    path = tmp_path / "out" / "train" / "shard-00000.idx"
    index = np.fromfile(path, dtype=np.int64)
    index[change[0]] = change[1]
    index.tofile(path)
    with pytest.raises(ValueError, match=r"shard-00000.idx: is not a rising list"):
        TokenShards(tmp_path / "out")


def test_text_before_the_first_document_is_refused(tmp_path):
    make_shards(tmp_path, some_documents())
    path = tmp_path / "out" / "train" / "shard-00000.idx"
    index = np.fromfile(path, dtype=np.int64)
    index[0] = 1
    index.tofile(path)
    with pytest.raises(ValueError, match=r"first document starts at 1, not 0"):
        TokenShards(tmp_path / "out")


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda m: "{", "meta.json: not JSON"),
        (lambda m: "[]", "version None"),
        (lambda m: {**m, "version": 99}, "version 99, this linattn reads version 1"),
        (lambda m: {**m, "dtype": "int4"}, "dtype 'int4'"),
        (lambda m: {k: v for k, v in m.items() if k != "train"}, r"Meta needs \['train'\]"),
        (lambda m: {**m, "train": {**m["train"], "tokens": 3}}, "train has 3 tokens in 40 documents"),
        (lambda m: {**m, "train": {**m["train"], "documents": 3}}, "in 3 documents, its shards .* in 40"),
        (lambda m: {**m, "train": {**m["train"], "tokens": "3"}}, r"train.tokens: expected int, got str"),
        (lambda m: {**m, "dtype": "uint32"}, r"meta.json gives \d+ bytes for \d+ tokens of uint32"),
    ],
)
def test_a_corrupted_meta_is_refused(tmp_path, change, words):
    make_shards(tmp_path, some_documents())
    path = tmp_path / "out" / "meta.json"
    changed = change(json.loads(path.read_text()))
    path.write_text(changed if isinstance(changed, str) else json.dumps(changed))
    with pytest.raises(ValueError, match=words):
        TokenShards(tmp_path / "out")


def test_another_tokenizer_is_refused_with_both_hashes(tmp_path, shards):
    shards.check_tokenizer(ByteTokenizer())
    other = load_tokenizer(write_bpe(tmp_path / "whales.json"))
    with pytest.raises(ValueError, match=rf"{ByteTokenizer.hash}.*'whales'.*{other.hash}"):
        shards.check_tokenizer(other)


def test_a_tokenizer_file_swapped_beside_the_shards_is_refused(tmp_path):
    path = write_bpe(tmp_path / "t.json")
    make_shards(tmp_path, some_documents(3), tokenizer=path)
    write_bpe(tmp_path / "out" / "tokenizer.json", corpus=("zebra zebra",))
    with pytest.raises(ValueError, match="made by tokenizer 't'"):
        TokenShards(tmp_path / "out").load_tokenizer()


def test_unknown_folder_and_split(tmp_path):
    with pytest.raises(ValueError, match="holds no meta.json"):
        TokenShards(tmp_path)
    with pytest.raises(ValueError, match="split='test'"):
        TokenShards(tmp_path, "test")
