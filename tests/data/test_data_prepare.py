"""Preparing text: what is read, held out, refused, and left behind when it stops."""

import gzip
import lzma
import sys
from importlib import import_module
from itertools import pairwise

import numpy as np
import pytest
import torch
from small_text import EOS, make_shards, some_documents, write_bpe, write_jsonl

import linattn.data.read as read_module
from linattn.data import ByteTokenizer, TokenShards, load_tokenizer, prepare
from linattn.data.writer import ShardWriter

prepare_module = import_module("linattn.data.prepare")  # whose name in linattn.data is the function's


def split_documents(shards):
    """The documents of a split, decoded."""
    tokens, offsets = shards.read(0, shards.tokens).tolist(), shards.document_offsets
    documents = [tokens[a:b] for a, b in pairwise(offsets)]
    assert all(d[-1] == shards.meta.tokenizer.eos for d in documents)
    tokenizer = shards.load_tokenizer()
    return [tokenizer.decode(d[:-1]) for d in documents]


def test_jsonl_round_trip(tmp_path):
    documents = [*some_documents(), "naïve €", "two\n\n\nparagraphs"]
    shards = make_shards(tmp_path, [documents[0], "  ", *documents[1:]])
    assert split_documents(shards) == documents
    assert shards.bytes == sum(len(d.encode()) for d in documents)
    assert shards.tokens == shards.bytes + len(documents) == len(shards)
    assert shards.documents == len(documents)
    shards.verify()
    assert not (tmp_path / "out" / "validation").exists()
    with pytest.raises(ValueError, match="has no validation split"):
        TokenShards(tmp_path / "out", "validation")


@pytest.mark.parametrize("opener, suffix", [(open, ""), (gzip.open, ".gz"), (lzma.open, ".xz")])
def test_txt_plain_and_packed(tmp_path, opener, suffix):
    one, two = tmp_path / f"one.txt{suffix}", tmp_path / f"two.md{suffix}"
    with opener(one, "wb") as handle:
        handle.write("\ufeffone\r\nfile €\n".encode())
    with opener(two, "wb") as handle:
        handle.write(b"two")
    prepare([one, two], tmp_path / "out", validation_fraction=0)
    assert split_documents(TokenShards(tmp_path / "out")) == ["one\r\nfile €\n", "two"]


def test_txt_documents_by_line_and_by_gap(tmp_path):
    source = tmp_path / "a.txt"
    source.write_bytes(b"\n\n\none\r\ntwo\n\nthree\n \n\n\nfour\n")
    prepare([source], tmp_path / "lines", documents="line", validation_fraction=0)
    assert split_documents(TokenShards(tmp_path / "lines")) == ["one", "two", "three", "four"]
    prepare([source], tmp_path / "gaps", documents="paragraph-gap", validation_fraction=0)
    assert split_documents(TokenShards(tmp_path / "gaps")) == ["one\r\ntwo\n\nthree", "four"]
    with pytest.raises(ValueError, match=r"documents='page' is not one of .*paragraph-gap"):
        prepare([source], tmp_path / "x", documents="page")


@pytest.mark.parametrize("chunk", [1, 2, 3, 7])
def test_what_is_read_does_not_depend_on_where_chunks_fall(tmp_path, monkeypatch, chunk):
    text = "é€😀 aa\n\n\n\nbb cc\n\ndd\n \n\nee" + " 123 456" * 5 + "\n\n\n"
    (tmp_path / "a.txt").write_bytes(text.encode())
    monkeypatch.setattr(read_module, "_CHUNK", chunk)
    monkeypatch.setattr(read_module, "PIECE", 6)
    for documents, want in (
        ("file", [text]),
        ("line", [line for line in text.split("\n") if line.strip()]),
        ("paragraph-gap", ["é€😀 aa", "bb cc\n\ndd", "ee" + " 123 456" * 5]),
    ):
        prepare([tmp_path / "a.txt"], tmp_path / "o", documents=documents, validation_fraction=0, overwrite=True)
        assert split_documents(TokenShards(tmp_path / "o")) == want


def test_pieces_give_the_tokens_of_the_whole(tmp_path, monkeypatch):
    text = "the whale       the sea\n\n   the ship €uro " * 200
    (tmp_path / "a.txt").write_text(text)
    tokenizer = load_tokenizer(write_bpe(tmp_path / "t.json", corpus=("the     whale      the       sea",)))
    monkeypatch.setattr(read_module, "PIECE", 50)
    assert len(tokenizer.encode("  ")) == 1  # runs of spaces merge, so a cut inside one would show
    assert len(list(read_module.read_pieces(str(tmp_path / "a.txt"), "file", "text"))) > 50
    prepare([tmp_path / "a.txt"], tmp_path / "o", tokenizer=tokenizer, validation_fraction=0)
    shards = TokenShards(tmp_path / "o")
    assert shards.read(0, shards.tokens).tolist() == [*tokenizer.encode(text), tokenizer.eos]
    assert shards.bytes == len(text.encode())


def test_a_long_document_that_ends_in_white_space_is_one_document(tmp_path, monkeypatch):
    monkeypatch.setattr(read_module, "PIECE", 6)
    (tmp_path / "a.txt").write_text("a" * 6 + " " * 12)
    (tmp_path / "b.txt").write_text("b")
    prepare([tmp_path / "a.txt", tmp_path / "b.txt"], tmp_path / "o", validation_fraction=0)
    assert TokenShards(tmp_path / "o").document_offsets.tolist() == [0, 19, 21]


def test_a_piece_without_tokens_does_not_lose_its_document(tmp_path):
    writer = ShardWriter(tmp_path, "train", "uint16", ByteTokenizer(), 10)
    for ids, ends in (([], False), ([1, 2], True), ([], True), ([3], False), ([], True)):
        writer.append(np.array(ids, dtype=np.uint8), ends)
    writer.close()
    assert np.fromfile(tmp_path / "train" / "shard-00000.bin", np.uint16).tolist() == [1, 2, EOS, EOS, 3, EOS]
    assert np.fromfile(tmp_path / "train" / "shard-00000.idx", np.int64).tolist() == [0, 3, 4, 6]


def test_file_tokenizer_travels_with_the_shards(tmp_path):
    (tmp_path / "t").mkdir()
    path = write_bpe(tmp_path / "t" / "tokenizer.json", specials=("<|endoftext|>", "</s>"))
    documents = some_documents(5)
    write_jsonl(tmp_path / "a.jsonl", documents)
    prepare([tmp_path / "a.jsonl"], tmp_path / "o", tokenizer=load_tokenizer(path, eos="</s>"), validation_fraction=0)
    path.unlink()
    shards = TokenShards(tmp_path / "o")
    assert shards.load_tokenizer().eos == shards.meta.tokenizer.eos == 1
    assert split_documents(shards) == documents


def test_large_vocabularies_take_uint32(tmp_path):
    class Wide(ByteTokenizer):
        vocab_size = 70_000
        eos = 69_999

    (tmp_path / "a.txt").write_text("ab")
    meta = prepare([tmp_path / "a.txt"], tmp_path / "o", tokenizer=Wide(), validation_fraction=0)
    assert meta.dtype == "uint32"
    assert TokenShards(tmp_path / "o").read(0, 3).tolist() == [97, 98, 69_999]


def test_ids_outside_the_vocabulary_are_refused(tmp_path):
    class Narrow(ByteTokenizer):
        vocab_size = 98

    (tmp_path / "a.txt").write_text("abc")
    with pytest.raises(ValueError, match=r"outside \[0, 98\)"):
        prepare([tmp_path / "a.txt"], tmp_path / "o", tokenizer=Narrow(), validation_fraction=0)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("shard_tokens", [1, 7, 61, 10**6])
def test_shards_are_one_stream_however_they_are_cut(tmp_path, shard_tokens):
    documents = some_documents()
    shards = make_shards(tmp_path, documents, shard_tokens=shard_tokens)
    sizes = [s.tokens for s in shards.meta.train.shards]
    assert sizes == [shard_tokens] * (shards.tokens // shard_tokens) + [shards.tokens % shard_tokens] * (
        shards.tokens % shard_tokens > 0
    )
    assert split_documents(shards) == documents
    whole = shards.read(0, shards.tokens)
    for start in range(0, shards.tokens - 100, 37):
        assert torch.equal(shards.read(start, 100), whole[start : start + 100])
        assert torch.equal(shards.read(0, start), whole[:start])
    assert torch.equal(shards.read(0, shards.tokens - 1), whole[:-1])
    assert shards.read(shards.tokens, 0).dtype == torch.int64


@pytest.mark.parametrize("start, length", [(-1, 2), (0, -1), (5, 10**9)])
def test_reading_outside_is_refused(shards, start, length):
    with pytest.raises(ValueError, match="are outside"):
        shards.read(start, length)


@pytest.mark.parametrize("piece", [8, 1000])
def test_many_documents_are_held_out_whole_by_hash(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(read_module, "PIECE", piece)
    documents = some_documents(400)
    documents[300] = documents[7]
    shards = make_shards(tmp_path, documents, validation_fraction=0.25)
    held = TokenShards(tmp_path / "out", "validation")
    train, validation = split_documents(shards), split_documents(held)
    assert shards.meta.held_out == "documents"
    assert 60 < len(validation) < 140
    assert sorted(train + validation) == sorted(documents)
    assert not set(train) & set(validation)
    (tmp_path / "more").mkdir()
    make_shards(tmp_path / "more", [*some_documents(50, seed=9), *documents], validation_fraction=0.25)
    assert set(validation) <= set(split_documents(TokenShards(tmp_path / "more" / "out", "validation")))


def test_a_single_document_is_held_out_by_its_end(tmp_path):
    text = "word é " * 300
    (tmp_path / "a.txt").write_text(text)
    meta = prepare([tmp_path / "a.txt"], tmp_path / "o", validation_fraction=0.1)
    (train,), (validation,) = (split_documents(TokenShards(tmp_path / "o", s)) for s in ("train", "validation"))
    assert meta.held_out == "tail"
    assert train + validation == text
    assert validation.startswith(" ")
    assert meta.validation is not None
    assert 0.1 * 2400 <= meta.validation.bytes <= 0.1 * 2400 + 5
    assert meta.train.bytes + meta.validation.bytes == 2400


@pytest.mark.parametrize("piece", [3, 10, 1000])
def test_the_held_out_end_may_span_documents_and_pieces(tmp_path, monkeypatch, piece):
    documents = ["a" * 40, "b" * 40, "c" * 10 + " " + "c" * 29, "d" * 40]
    monkeypatch.setattr(read_module, "PIECE", piece)
    make_shards(tmp_path, documents, validation_fraction=0.4)
    train, validation = (split_documents(TokenShards(tmp_path / "out", s)) for s in ("train", "validation"))
    assert "".join(train + validation) == "".join(documents)
    assert train[:2] == documents[:2]
    assert len(train) == 3
    # 96 bytes are for training; a piece that holds white space before that is cut there, at byte 90.
    assert len(train[2]) == (10 if piece == 1000 else pytest.approx(13, abs=3))
    assert validation[1] == documents[3] and len(validation) == 2


def test_text_too_small_to_hold_out_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("é")
    with pytest.raises(ValueError, match="train is empty; give more text or validation_fraction=0"):
        prepare([tmp_path / "a.txt"], tmp_path / "o")
    assert list(tmp_path.iterdir()) == [tmp_path / "a.txt"]


def test_progress_ends_at_the_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(import_module("linattn.data.prepare"), "_BATCH", 500)
    seen = []
    shards = make_shards(tmp_path, some_documents(), progress=lambda done, total: seen.append((done, total)))
    assert len(seen) > 3
    assert seen == sorted(seen)
    assert seen[-1] == (shards.bytes, shards.bytes)


def test_bundled_text_can_be_an_input(tmp_path):
    meta = prepare(["bundled:mobydick"], tmp_path / "o")
    assert meta.validation is not None
    assert meta.train.bytes + meta.validation.bytes == 1_204_997


@pytest.mark.parametrize(
    "name, data, words",
    [
        ("a.txt", b"fine \xff", r"a.txt: not UTF-8 at byte 5 \(0xff\)"),
        ("a.txt", b"x" * 200_000 + b"\xe2\x82", r"a.txt: not UTF-8 at byte 200000 \(0xe2\)"),
        ("a.txt", b"x" * 131_071 + b"\xe2A", r"a.txt: not UTF-8 at byte 131071 \(0xe2\)"),
        ("a.txt", b" \n\n", r"a.txt: holds no text"),
        ("a.txt", b"", r"a.txt: holds no text"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": \n', r"a.jsonl, line 3: not JSON at column 9"),
        ("a.jsonl", b'{"text": "a"}\n{"body": "a", "id": 1}\n', r"line 2: no field 'text'; it has \['body', 'id'\]"),
        ("a.jsonl", b'{"text": 3}\n', r"line 1: field 'text' is a int"),
        ("a.jsonl", b'["a"]\n', r"line 1: a list, not an object"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"line 1: character 0 of 'text' is half a surrogate pair"),
        ("a.jsonl", b'{"text": "\xff"}\n', r"line 1: not UTF-8 at byte 10"),
        ("a.jsonl", b'{"text": ""}\n', r"a.jsonl: holds no text"),
        ("a.pdf", b"x", r"a.pdf: unknown ending .pdf; known are .txt.*\.parquet"),
        ("a.txt.xz", b"x", r"a.txt.xz: a damaged archive"),
        ("a.txt.gz", gzip.compress(b"x" * 100, mtime=0)[:-9], r"a.txt.gz: a damaged archive"),
    ],
)
def test_bad_inputs_are_named_with_place_and_leave_nothing(tmp_path, name, data, words):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=words):
        prepare([tmp_path / name], tmp_path / "o")
    assert list(tmp_path.iterdir()) == [tmp_path / name]


def test_bad_arguments(tmp_path):
    good = tmp_path / "a.txt"
    good.write_text("text")
    for inputs, options, words in (
        ([], {}, "no inputs"),
        ([tmp_path / "none.txt"], {}, "none.txt: no such file"),
        ([tmp_path], {}, "is a folder"),
        (["bundled:emma"], {}, "no such bundled text"),
        ([good], {"validation_fraction": 0.7}, r"0.7 is outside \[0, 0.5\]"),
        ([good], {"shard_tokens": 0}, "shard_tokens=0"),
    ):
        with pytest.raises(ValueError, match=words):
            prepare(inputs, tmp_path / "o", **options)
    with pytest.raises(ValueError, match="lies inside it"):
        prepare([good], tmp_path, overwrite=True)


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match=r"a.parquet: .*pip install linattn\[data\]"):
        prepare([tmp_path / "a.parquet"], tmp_path / "o")


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    documents = some_documents(600)
    table = pyarrow.table({"body": [*documents, None, ""], "id": list(range(602))})
    parquet.write_table(table, tmp_path / "a.parquet")
    prepare([tmp_path / "a.parquet"], tmp_path / "o", text_field="body", validation_fraction=0)
    assert split_documents(TokenShards(tmp_path / "o")) == documents
    with pytest.raises(ValueError, match=r"no column 'text'; it has \['body', 'id'\]"):
        prepare([tmp_path / "a.parquet"], tmp_path / "o2")
    with pytest.raises(ValueError, match=r"row 0: field 'id' is a int"):
        prepare([tmp_path / "a.parquet"], tmp_path / "o2", text_field="id")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_stopped_run_leaves_nothing_and_spares_the_old(tmp_path, monkeypatch, error):
    shards = make_shards(tmp_path, some_documents())

    def fail(self, data):
        raise error

    monkeypatch.setattr(ShardWriter, "_put", fail)
    for folder, overwrite in (("new", False), ("out", True)):
        words = f"{tmp_path / folder}: could not be written .*No space left.*free some space"
        with pytest.raises(type(error), match=words if isinstance(error, OSError) else None):
            prepare(["bundled:mobydick"], tmp_path / folder, overwrite=overwrite)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["in.jsonl", "out"]
    assert split_documents(TokenShards(tmp_path / "out")) == split_documents(shards)


@pytest.mark.parametrize("name", ["write_meta", "_publish"])
def test_a_disk_that_fills_up_at_the_end_leaves_nothing_either(tmp_path, monkeypatch, name):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepare_module, name, full)
    with pytest.raises(OSError, match=r"out: could not be written .*No space left on device"):
        prepare(["bundled:mobydick"], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_input_that_cannot_be_read_is_not_blamed_on_the_output(tmp_path, monkeypatch):
    def fail(*args):
        yield "train", "some text", True
        raise OSError(5, "Input/output error", "in.txt")

    monkeypatch.setattr(prepare_module, "_assign", fail)
    with pytest.raises(OSError, match=r"^\[Errno 5\] Input/output error: 'in.txt'$"):
        prepare(["bundled:mobydick"], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_refused_and_replaced_on_request(tmp_path):
    make_shards(tmp_path, some_documents())
    (tmp_path / "b.txt").write_text("other")
    with pytest.raises(ValueError, match="exists; give another folder, or --overwrite"):
        prepare([tmp_path / "b.txt"], tmp_path / "out", validation_fraction=0)
    prepare([tmp_path / "b.txt"], tmp_path / "out", validation_fraction=0, overwrite=True)
    assert split_documents(TokenShards(tmp_path / "out")) == ["other"]
    assert sorted(f.name for f in tmp_path.iterdir()) == ["b.txt", "in.jsonl", "out"]


def test_overwrite_never_removes_what_is_not_ours(tmp_path):
    (tmp_path / "b.txt").write_text("other")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years")
    with pytest.raises(ValueError, match="holds no meta.json"):
        prepare([tmp_path / "b.txt"], tmp_path / "home", overwrite=True)
    assert (tmp_path / "home" / "thesis.tex").read_text() == "years"


def test_a_partial_folder_of_another_run_is_not_touched(tmp_path):
    (tmp_path / "b.txt").write_text("other")
    (tmp_path / "o.partial").mkdir()
    (tmp_path / "o.partial" / "x").write_text("x")
    with pytest.raises(ValueError, match=r"o.partial: exists, so another run"):
        prepare([tmp_path / "b.txt"], tmp_path / "o", validation_fraction=0)
    assert (tmp_path / "o.partial" / "x").exists()
    prepare([tmp_path / "b.txt"], tmp_path / "o", validation_fraction=0, overwrite=True)
    assert not (tmp_path / "o.partial").exists()
