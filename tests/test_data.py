"""linattn.data: what goes in comes out, nothing leaks between documents, and a position is a whole state."""

import gzip
import json
import lzma
import math
import subprocess
import sys
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import linattn.data.read as read_module
from linattn.data import (
    ByteTokenizer,
    Loader,
    StreamDecoder,
    StreamLoader,
    TokenShards,
    bundled_names,
    bundled_text,
    load_tokenizer,
    prepare,
    validation_batches,
)
from linattn.data.permute import permute
from linattn.data.writer import ShardWriter

EOS = 256
prepare_module = import_module("linattn.data.prepare")  # whose name in linattn.data is the function's


def some_documents(count=40, seed=0):
    """Documents of 1 to 60 bytes that are all different."""
    rng = np.random.default_rng(seed)
    return [f"{i}" + "".join(rng.choice(list("abcde "), rng.integers(0, 58))) + "." for i in range(count)]


def write_jsonl(path, documents):
    path.write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    return path


def make_shards(folder, documents, **options):
    """The documents as byte tokens, all in train unless asked otherwise."""
    source = write_jsonl(folder / "in.jsonl", documents)
    prepare([source], folder / "out", **{"validation_fraction": 0, **options})
    return TokenShards(folder / "out", "train")


@pytest.fixture
def shards(tmp_path):
    return make_shards(tmp_path, some_documents())


def split_documents(shards):
    """The documents of a split, decoded."""
    tokens, offsets = shards.read(0, shards.tokens).tolist(), shards.document_offsets
    documents = [tokens[a:b] for a, b in pairwise(offsets)]
    assert all(d[-1] == shards.meta.tokenizer.eos for d in documents)
    tokenizer = shards.load_tokenizer()
    return [tokenizer.decode(d[:-1]) for d in documents]


def write_bpe(path, corpus=("the whale the sea the ship é €",), specials=("<|endoftext|>",), vocab_size=300):
    """A small byte-level BPE as tokenizer.json."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.save(str(path))
    return path


# Bundled texts


def test_bundled_texts_are_whole_and_small():
    assert bundled_names() == ("austen", "mobydick", "sotu")
    assert bundled_text("mobydick").startswith("CHAPTER 1. Loomings.\n\nCall me Ishmael.")
    assert len(bundled_text("sotu").splitlines()) == 101
    folder = Path(read_module.__file__).parent / "texts"
    assert sum(f.stat().st_size for f in folder.iterdir()) < 3_000_000
    with pytest.raises(ValueError, match=r"'emma'.*austen, mobydick, sotu"):
        bundled_text("emma")


def test_bundled_text_of_another_size_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules["linattn.data.bundled"]._SIZES, "mobydick", 7)
    with pytest.raises(ValueError, match="1204997 bytes and should have 7"):
        bundled_text("mobydick")


def test_import_is_light():
    code = "import sys, linattn.data; print([m for m in ('tokenizers', 'pyarrow') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Tokenizers


@given(st.text(max_size=40))
def test_bytes_round_trip(text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert ids == list(text.encode())
    assert tokenizer.encode_batch([text, "x"])[0].tolist() == ids
    assert tokenizer.decode([*ids, EOS, 263]) == text


@given(st.lists(st.integers(0, 263), max_size=80))
def test_streamed_text_is_the_whole_text_for_any_bytes(ids):
    stream, tokenizer = StreamDecoder(ByteTokenizer()), ByteTokenizer()
    assert "".join([stream.push(i) for i in ids] + [stream.flush()]) == tokenizer.decode(ids)


def test_streaming_holds_back_unfinished_characters():
    stream = StreamDecoder(ByteTokenizer())
    assert [stream.push(i) for i in "a€b".encode()] == ["a", "", "", "€", "b"]
    assert stream.push(0xE2) == ""
    assert stream.flush() == "\ufffd"
    assert stream.push(0x61) == "a"


def test_streaming_does_not_wait_for_ever_on_damage():
    stream = StreamDecoder(ByteTokenizer())
    shown = "".join(stream.push(0xFF) for _ in range(100))
    assert shown == "\ufffd" * 97


def test_streaming_keeps_spaces_that_decoders_drop_from_first_words(tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = {"</s>": 0, "▁the": 1, "▁sea": 2, "▁": 3}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.save(str(tmp_path / "t.json"))
    stream = StreamDecoder(load_tokenizer(tmp_path / "t.json"))
    assert [stream.push(i) for i in (1, 2, 2, 1)] == ["the", " sea", " sea", " the"]


def test_file_tokenizer(tmp_path):
    tokenizer = load_tokenizer(write_bpe(tmp_path / "tokenizer.json"))
    text = "the whale 鯨, café €"
    ids = tokenizer.encode(text)
    assert ids == tokenizer.encode_batch(["", text])[1].tolist()
    assert len(ids) < len(text.encode())
    assert tokenizer.decode([*ids, tokenizer.eos]) == text
    assert (tokenizer.eos, tokenizer.bos) == (0, None)
    assert max(ids) < tokenizer.vocab_size <= 300
    stream = StreamDecoder(tokenizer)
    assert "".join(stream.push(i) for i in ids) == text
    assert load_tokenizer(tmp_path).hash == tokenizer.hash != ByteTokenizer().hash
    assert len(tokenizer.hash) == 16


def test_text_never_becomes_a_special_token(tmp_path):
    tokenizer = load_tokenizer(write_bpe(tmp_path / "t.json"))
    ids = tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.eos not in ids
    assert tokenizer.eos not in tokenizer.encode_batch(["a<|endoftext|>b"])[0]
    assert tokenizer.decode(ids) == "a<|endoftext|>b"


def test_truncation_in_the_file_does_not_cut_text_nor_change_the_hash(tmp_path):
    path = write_bpe(tmp_path / "t.json")
    plain = load_tokenizer(path)
    definition = json.loads(path.read_text())
    definition["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    path.write_text(json.dumps(definition))
    assert load_tokenizer(path).encode("the sea the sea") == plain.encode("the sea the sea")
    assert load_tokenizer(path).hash == plain.hash


def test_the_hash_follows_the_definition(tmp_path):
    first = load_tokenizer(write_bpe(tmp_path / "a.json", specials=("<|endoftext|>", "</s>")))
    other_merges = load_tokenizer(write_bpe(tmp_path / "b.json", corpus=("zebra zebra",), specials=("<|endoftext|>",)))
    other_eos = load_tokenizer(tmp_path / "a.json", eos="</s>")
    assert other_eos.eos == 1
    assert len({first.hash, other_merges.hash, other_eos.hash}) == 3


def test_tokenizer_errors_name_the_file_and_the_fix(tmp_path):
    bad, other, no_eos, binary = (tmp_path / n for n in ("bad.json", "vocab.json", "no_eos.json", "sp.model"))
    bad.write_text('{"model": ')
    other.write_text('{"the": 1}')
    binary.write_bytes(b"\x0a\xff\xfe")
    write_bpe(no_eos, specials=("[UNK]",))
    for path, words in (
        (tmp_path / "none.json", "none.json: no such tokenizer file"),
        (bad, r"bad.json: not JSON at line 1, column 11"),
        (other, r'vocab.json: has no key "model"'),
        (binary, r"sp.model: not UTF-8 at byte 1"),
        (no_eos, r"no_eos.json: .*no end-of-document token \(looked for <\|endoftext\|>.*eos="),
    ):
        with pytest.raises(ValueError, match=words):
            load_tokenizer(path)
    (tmp_path / "model.json").write_text('{"model": {"type": "nothing"}}')
    with pytest.raises(ValueError, match=r"model.json: the tokenizers library cannot read it"):
        load_tokenizer(tmp_path / "model.json")
    assert load_tokenizer(no_eos, eos="[UNK]").eos == 0
    with pytest.raises(ValueError, match=r"no token '<x>'"):
        load_tokenizer(no_eos, eos="<x>")


# Preparing


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


# Shards that are not what they should be


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


# The permutation


@pytest.mark.parametrize("n", [*range(1, 70), 127, 128, 129, 1000, 4097])
def test_permutation_is_a_bijection(n):
    image = permute(np.arange(n), n, seed=3, epoch=1)
    assert sorted(image.tolist()) == list(range(n))


@settings(max_examples=50)
@given(n=st.integers(1, 1 << 62), seed=st.integers(), epoch=st.integers(0, 10**6), data=st.data())
def test_permutation_is_injective_and_in_range_at_any_size(n, seed, epoch, data):
    picked = data.draw(st.lists(st.integers(0, n - 1), unique=True, min_size=1, max_size=20))
    image = permute(np.array(picked), n, seed, epoch).tolist()
    assert all(0 <= i < n for i in image)
    assert len(set(image)) == len(picked)
    assert image == [int(permute(np.array([i]), n, seed, epoch)[0]) for i in picked]


def test_permutation_looks_random():
    n, trials = 6, 6000
    counts = np.zeros((n, n))
    for seed in range(trials):
        counts[np.arange(n), permute(np.arange(n), n, seed, 0)] += 1
    # Each cell is binomial with mean 1000 and standard deviation 29; six of those.
    assert np.abs(counts - trials / n).max() < 6 * 29
    image = permute(np.arange(10_000), 10_000, 0, 0)
    assert abs(np.corrcoef(np.arange(10_000), image)[0, 1]) < 0.05
    neighbours = np.diff(image)
    assert (neighbours == 1).mean() < 0.002
    assert (image == permute(np.arange(10_000), 10_000, 0, 1)).mean() < 0.002
    assert (image == permute(np.arange(10_000), 10_000, 1, 0)).mean() < 0.002


def test_permutation_refuses_what_is_outside():
    with pytest.raises(ValueError, match="n=3"):
        permute(np.array([3]), 3, 0, 0)
    with pytest.raises(ValueError, match="n=0"):
        permute(np.array([], dtype=np.int64), 0, 0, 0)


# The loader


def same(a, b):
    assert type(a) is type(b)
    for field, x, y in zip(a._fields, a, b, strict=True):
        assert torch.equal(x, y), field


def first_rows(loader, batches):
    return torch.cat([next(loader).tokens for _ in range(batches)])


def test_an_epoch_is_every_window_once_in_another_order_each(shards):
    length, batch = 8, 4
    loader = Loader(shards, length=length, batch=batch, seed=5)
    stream = shards.read(0, shards.tokens)
    windows = stream[: loader.windows * length].view(-1, length)
    assert loader.windows == (shards.tokens - 1) // length
    rows = first_rows(loader, math.ceil(2 * loader.windows / batch))
    one, two = rows[: loader.windows], rows[loader.windows : 2 * loader.windows]
    for epoch in (one, two):
        assert sorted(epoch.tolist()) == sorted(windows.tolist())
    assert not torch.equal(one, windows)
    assert not torch.equal(one, two)
    assert not torch.equal(one, first_rows(Loader(shards, length=length, batch=1, seed=6), loader.windows))
    ordered = Loader(shards, length=length, batch=1, shuffle=False)
    assert torch.equal(first_rows(ordered, loader.windows), windows)
    assert ordered.epoch == 1.0


def test_resuming_from_one_integer_is_exact(shards):
    options = {"length": 16, "batch": 4, "seed": 11}
    straight = Loader(shards, **options)
    batches = [next(straight) for _ in range(40)]
    assert straight.position == 160 > 2 * straight.windows
    for k in (0, 1, 17, 39):
        resumed = Loader(shards, **options, position=4 * k)
        for want in batches[k : k + 3]:
            same(next(resumed), want)
    straight.position = 4 * 5
    same(next(straight), batches[5])
    same(straight.at(4 * 7), batches[7])
    assert straight.position == 4 * 6


def test_ranks_share_one_global_order(shards):
    options = {"length": 16, "batch": 8, "seed": 2}
    alone = Loader(shards, **options)
    want = [next(alone) for _ in range(12)]
    for world in (1, 2, 4, 8):
        ranks = [Loader(shards, **options, rank=r, world=world) for r in range(world)]
        for whole in want:
            parts = [next(loader) for loader in ranks]
            assert torch.equal(torch.cat([p.tokens for p in parts]), whole.tokens)
            assert torch.equal(torch.cat([p.targets for p in parts]), whole.targets)
            assert torch.equal(torch.cat([p.positions for p in parts], 1), whole.positions)
        assert {loader.position for loader in ranks} == {alone.position}
        assert len({p.cu_seqlens.shape for p in parts}) == 1


def test_a_run_resumes_at_another_world_size(shards):
    options = {"length": 16, "batch": 4, "seed": 2}
    straight = first_rows(Loader(shards, **options), 6)
    two = [Loader(shards, **options, rank=r, world=2) for r in range(2)]
    rows = [torch.cat([next(loader).tokens for loader in two]) for _ in range(3)]
    four = [Loader(shards, **options, rank=r, world=4, position=two[0].position) for r in range(4)]
    rows += [torch.cat([next(loader).tokens for loader in four]) for _ in range(3)]
    assert torch.equal(torch.cat(rows), straight)


def check_packing(shards, tokens, targets, cu_seqlens, starts):
    """Every rule of packing, token by token, from the stream and its offsets. Returns the pieces' bounds."""
    stream, offsets = shards.read(0, shards.tokens), set(shards.document_offsets.tolist())
    size, length = tokens.shape
    bounds = set()
    for row, start in enumerate(starts):
        bounds.add(row * length)
        for t in range(length):
            p = start + t
            if p in offsets:
                bounds.add(row * length + t)
            real = p + 1 < shards.tokens and p + 1 not in offsets
            assert tokens[row, t] == (stream[p] if p < shards.tokens else 0)
            assert targets[row, t] == (stream[p + 1] if real else -100)
    bounds = [*sorted(bounds), size * length]
    assert cu_seqlens.dtype == torch.int32
    assert cu_seqlens[: len(bounds)].tolist() == bounds
    assert set(cu_seqlens[len(bounds) :].tolist()) <= {size * length}
    return bounds


@pytest.mark.parametrize("length", [1, 5, 64])
def test_documents_are_isolated(shards, length):
    loader = Loader(shards, length=length, batch=3, seed=1, shuffle=False)
    for step in range(loader.windows):
        starts = [(step * 3 + r) % loader.windows * length for r in range(3)]
        batch = next(loader)
        bounds = check_packing(shards, batch.tokens, batch.targets, batch.cu_seqlens, starts)
        assert batch.cu_seqlens.shape == (loader.max_documents + 1,)
        positions = [t for a, b in pairwise(bounds) for t in range(b - a)]
        assert batch.positions.tolist() == [positions]
        # No piece holds tokens of two documents: an end-of-document token only ever stands last.
        flat = batch.tokens.view(-1)
        for a, b in pairwise(bounds):
            assert EOS not in flat[a : b - 1]


def test_default_max_documents_is_reached_but_never_exceeded(tmp_path):
    shards = make_shards(tmp_path, ["a" * 200, *"bcdefghij", "k" * 200])
    loader = Loader(shards, length=20, batch=2, seed=0)
    fullest = 0
    for _ in range(400):
        batch = next(loader)
        assert batch.cu_seqlens.shape == (loader.max_documents + 1,)
        fullest = max(fullest, len(set(batch.cu_seqlens.tolist())) - 1)
    assert fullest <= loader.max_documents <= 2 * 11
    # Two documents of 201 tokens leave nine of 2: rows 10 (from token 200) holds 10 more starts.
    alone = Loader(shards, length=20, batch=1, shuffle=False, position=10)
    assert len(set(next(alone).cu_seqlens.tolist())) - 1 == alone.max_documents


def test_a_batch_larger_than_the_split_repeats_windows(tmp_path):
    shards = make_shards(tmp_path, ["ab", "cd", "ef", "gh"])
    loader = Loader(shards, length=4, batch=7, seed=0)
    assert loader.windows == 2
    for _ in range(5):
        assert next(loader).cu_seqlens.shape == (loader.max_documents + 1,)


def test_max_documents_doubles_when_exceeded(shards):
    loader = Loader(shards, length=400, batch=2, max_documents=3)
    batch = next(loader)
    real = len(set(batch.cu_seqlens.tolist())) - 1
    assert real > 6
    size = len(batch.cu_seqlens) - 1
    assert size % 3 == 0 and math.log2(size // 3).is_integer() and size // 2 < real <= size
    with pytest.raises(ValueError, match="max_documents=1 is fewer than the 2 rows"):
        Loader(shards, length=4, batch=2, max_documents=1)


def test_unpacked_rows(shards):
    packed, plain = (next(Loader(shards, length=50, batch=2, packed=p)) for p in (True, False))
    assert plain.cu_seqlens is None
    assert plain.positions.tolist() == [[*range(50), *range(50)]]
    assert torch.equal(plain.targets, packed.targets)


def test_loader_refusals(shards):
    for options, words in (
        ({"length": 10**6, "batch": 1}, r"train has \d+ tokens and this needs 1000001"),
        ({"length": 0, "batch": 1}, "length=0"),
        ({"length": 4, "batch": 3, "world": 2}, "batch=3 .* multiple of world=2"),
        ({"length": 4, "batch": 0}, "batch=0"),
        ({"length": 4, "batch": 2, "rank": 2, "world": 2}, "rank=2"),
        ({"length": 4, "batch": 2, "position": -1}, "position=-1"),
        ({"length": 1 << 20, "batch": 1 << 11}, "int32"),
    ):
        for kind in (Loader, StreamLoader):
            with pytest.raises(ValueError, match=words if kind is Loader or "needs" not in words else "needs"):
                kind(shards, **options)


# Validation


@pytest.mark.parametrize("length, batch, world", [(1, 4, 2), (7, 4, 1), (7, 4, 4), (64, 2, 2), (5000, 2, 1)])
def test_validation_covers_every_target_once(shards, length, batch, world):
    ranks = [list(validation_batches(shards, length=length, batch=batch, rank=r, world=world)) for r in range(world)]
    assert len({len(r) for r in ranks}) == 1
    assert len({b.tokens.shape for r in ranks for b in r}) == 1
    assert len({b.cu_seqlens.shape for r in ranks for b in r}) == 1
    local = batch // world
    for step in range(len(ranks[0])):
        for rank, batches in enumerate(ranks):
            b = batches[step]
            starts = [(step * batch + rank * local + r) * length for r in range(local)]
            in_offsets = [s for s in starts if s >= shards.tokens]
            if not in_offsets:
                check_packing(shards, b.tokens, b.targets, b.cu_seqlens, starts)
    rows = torch.cat([ranks[r][s].targets for s in range(len(ranks[0])) for r in range(world)])
    targets = rows.reshape(-1)[rows.reshape(-1) != -100]
    stream = shards.read(0, shards.tokens)
    first = torch.zeros(shards.tokens, dtype=torch.bool)
    first[torch.from_numpy(shards.document_offsets[:-1])] = True
    assert torch.equal(targets, stream[~first])
    assert len(targets) == shards.tokens - shards.documents


def test_validation_padding_is_a_document_of_its_own(tmp_path):
    shards = make_shards(tmp_path, ["abcde"])
    (batch,) = validation_batches(shards, length=4, batch=3)
    assert batch.tokens.tolist() == [[97, 98, 99, 100], [101, EOS, 0, 0], [0, 0, 0, 0]]
    assert batch.targets.tolist() == [[98, 99, 100, 101], [EOS, -100, -100, -100], [-100] * 4]
    assert batch.cu_seqlens.tolist() == [0, 4, 6, 8, 12]


def test_validation_refuses_before_the_first_batch(shards):
    with pytest.raises(ValueError, match="multiple of world=2"):
        validation_batches(shards, length=4, batch=3, world=2)


# Streams


def test_streams_read_each_part_in_order(shards):
    length, batch = 6, 4
    loader = StreamLoader(shards, length=length, batch=batch)
    steps = [next(loader) for _ in range(loader.steps)]
    assert loader.position == loader.steps
    rows = torch.cat([s.tokens for s in steps], 1)
    assert torch.equal(rows.reshape(-1), shards.read(0, batch * loader.steps * length))
    assert shards.tokens - rows.numel() <= batch * length
    same(next(loader), steps[0])


def test_stream_steps_say_what_to_carry(shards):
    length, batch = 6, 3
    loader = StreamLoader(shards, length=length, batch=batch)
    offsets = set(shards.document_offsets.tolist())
    part, expected = loader.steps * length, [0] * batch
    carried = 0
    for step in range(loader.steps):
        b = next(loader)
        starts = [r * part + step * length for r in range(batch)]
        bounds = check_packing(shards, b.tokens, b.targets, b.cu_seqlens, starts)
        assert b.fresh.tolist() == [step == 0 or s in offsets for s in starts]
        carried += int((~b.fresh).sum())
        positions = b.positions.view(batch, length)
        for r, s in enumerate(starts):
            assert bounds[b.first[r]] == r * length
            assert bounds[b.last[r] + 1] == (r + 1) * length
            for t in range(length):
                expected[r] = 0 if s + t in offsets or (step, t) == (0, 0) else expected[r] + 1
                assert positions[r, t] == expected[r]
        assert b.cu_seqlens.shape == (loader.max_documents + 1,)
    assert carried > loader.steps


def test_unpacked_streams_start_anew_where_a_part_does_and_nowhere_else(shards):
    length, batch = 6, 3
    packed = StreamLoader(shards, length=length, batch=batch)
    loader = StreamLoader(shards, length=length, batch=batch, packed=False)
    assert (loader.steps, loader.max_documents) == (packed.steps, batch)
    for step in range(loader.steps + 1):
        b, other = next(loader), next(packed)
        assert torch.equal(b.tokens, other.tokens)
        assert torch.equal(b.targets, other.targets)
        assert b.cu_seqlens.tolist() == [r * length for r in range(batch + 1)]
        assert b.first.tolist() == b.last.tolist() == list(range(batch))
        assert b.fresh.tolist() == [step % loader.steps == 0] * batch
        begin = step % loader.steps * length
        assert b.positions.view(batch, length).tolist() == [list(range(begin, begin + length))] * batch


def test_streams_resume_and_share_rows_among_ranks(shards):
    options = {"length": 6, "batch": 4}
    alone = StreamLoader(shards, **options)
    steps = [next(alone) for _ in range(9)]
    same(next(StreamLoader(shards, **options, position=7)), steps[7])
    for world in (2, 4):
        ranks = [StreamLoader(shards, **options, rank=r, world=world, position=4) for r in range(world)]
        for want in steps[4:]:
            parts = [next(loader) for loader in ranks]
            for field in ("tokens", "targets", "fresh"):
                assert torch.equal(torch.cat([getattr(p, field) for p in parts]), getattr(want, field))
            assert torch.equal(torch.cat([p.positions for p in parts], 1), want.positions)
            assert len({p.cu_seqlens.shape for p in parts}) == 1
