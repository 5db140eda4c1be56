"""Bundled texts, and tokenizers: round trips, streaming, hashes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_text import EOS, write_bpe

import linattn.data.read as read_module
from linattn.data import ByteTokenizer, StreamDecoder, bundled_names, bundled_text, load_tokenizer


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
