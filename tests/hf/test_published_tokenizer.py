"""TransNormerLLM's tokenizers: a SentencePiece file is read to the id, from its bytes; a tiktoken file is refused."""

import io
import json
import struct
import sys
import types

import published_tables as tables
import pytest
from published_files import GREEDY, Hub, draw, printed, write, write_tokenizer

from linattn.cli.convert import convert
from linattn.cli.main import main
from linattn.data import load_tokenizer
from linattn.data.tokenizer import FileTokenizer
from linattn.models.published.sentencepiece import read_sentencepiece, sentencepiece_json

S = "\u2581"
TEXT = "the weather in the north is cold and the cat sat on the other mat\n"


def varint(n):
    return bytes([n & 127 | 128]) + varint(n >> 7) if n > 127 else bytes([n])


def field(number, value):
    """A field of a protobuf message: an integer, a float, or bytes."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    value = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(value)) + value


def spelled(pieces, model_type=2, **normalizer):
    """A tokenizer.model: the three special pieces, then ``pieces`` as (text, kind); the first have the best scores."""
    pieces = [("<unk>", 2), ("<s>", 3), ("</s>", 3), *pieces]
    written = b"".join(
        field(1, field(1, text) + field(2, -float(i)) + (field(3, kind) if kind != 1 else b""))
        for i, (text, kind) in enumerate(pieces)
    )
    numbers = {"charsmap": 2, "dummy_prefix": 3, "extra_whitespaces": 4}
    rules = field(1, "identity") + b"".join(field(numbers[name], value) for name, value in normalizer.items())
    # Fields that nobody asks for are stepped over: a double, and the one that says how the text was sampled.
    trainer = field(3, model_type) + field(35, 1) + varint(99 << 3 | 1) + bytes(8) + field(1, "corpus.txt")
    return written + field(2, trainer) + field(3, rules)


def words():
    """Pieces enough for "w1 w2" as one piece a word, of the kind and in the order that training makes."""
    letters = [(letter, 1) for letter in (S, "w", *"0123456789", "!")]
    joined = [(f"{S}w", 1), *((f"{S}w{i}", 1) for i in range(10)), ("w1", 1), ("12", 1)]
    return [*joined, *letters, ("<0xE2>", 6), ("<0x82>", 6), ("<0xAC>", 6)]


def read(path, data, name="t"):
    path.write_bytes(data)
    return FileTokenizer(sentencepiece_json(path), name, str(path))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "tokenizer.model"


def test_ids_are_places_in_the_file_and_the_best_score_joins_first(path):
    tokenizer = read(path, spelled(words(), extra_whitespaces=0))
    at = {text: i + 3 for i, (text, _) in enumerate(words())}
    assert tokenizer.encode("w1 w2") == [at[f"{S}w1"], at[f"{S}w2"]]
    # "12" stands after all joins with a w, so the 1 goes to the w; a lone 12 is joined.
    assert tokenizer.encode("w12") == [at[f"{S}w1"], at["2"]]
    assert tokenizer.encode("!12") == [at[S], at["!"], at["12"]]
    assert tokenizer.decode(tokenizer.encode("w1 w2")) == "w1 w2"
    assert (tokenizer.eos, tokenizer.bos, tokenizer.vocab_size) == (2, 1, 3 + len(words()))


def test_bytes_stand_for_what_no_piece_spells(path):
    tokenizer = read(path, spelled(words(), dummy_prefix=0, extra_whitespaces=0))
    at = {text: i + 3 for i, (text, _) in enumerate(words())}
    assert tokenizer.encode("w€") == [at["w"], at["<0xE2>"], at["<0x82>"], at["<0xAC>"]]
    assert tokenizer.decode(tokenizer.encode("w€")) == "w€"
    assert tokenizer.encode("wx") == [at["w"], 0]  # no byte for x: unknown


def test_text_that_spells_a_special_piece_is_text(path):
    tokenizer = read(path, spelled([*words(), *((letter, 1) for letter in "<s>/")]))
    assert not {1, 2} & {*tokenizer.encode("<s>w1</s>")}
    assert tokenizer.decode([1, *tokenizer.encode("w1"), 2]) == "w1"


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("extra", [0, 1])
@pytest.mark.parametrize("own", [[], ["<|sys|>", "QQ"]], ids=["", "own pieces"])
@pytest.mark.parametrize("rule", ["identity", "nmt_nfkc"])
@pytest.mark.filterwarnings("ignore:builtin type Swig:DeprecationWarning")
def test_ids_are_those_of_sentencepiece_itself(path, prefix, extra, own, rule):
    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.split() * 3 + [TEXT] * 20),
        model_writer=model,
        model_type="bpe",
        vocab_size=310,
        byte_fallback=True,
        hard_vocab_limit=False,
        add_dummy_prefix=bool(prefix),
        remove_extra_whitespaces=bool(extra),
        user_defined_symbols=own,
        normalization_rule_name=rule,
        num_threads=1,
        minloglevel=2,
    )
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    ours = read(path, model.getvalue())
    texts = [
        TEXT,
        TEXT.strip(),
        "",
        " ",
        "the cat",
        "thecat",
        "  two  spaces  ",
        "tab\tand\n\nlines ",
        "<s>x</s> <unk>",
    ]
    texts += ["naïve 中文 ﬁ ½ 😀", "a\u00a0b", "the <|sys|> cat<|sys|>QQ on", "QQthe QQ", " QQ on", "<s>x</s> <unk>"]
    for text in texts:
        assert ours.encode(text) == theirs.encode(text), text
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text)), text
    assert (ours.vocab_size, ours.bos, ours.eos) == (theirs.vocab_size(), theirs.bos_id(), theirs.eos_id())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (spelled(words(), model_type=1), "only SentencePiece models of the BPE kind .* type 1 .*--tokenizer"),
        (b"", "only SentencePiece models of the BPE kind"),
        (spelled(words())[:-3], "not a SentencePiece model .*ends inside a field"),
        (b'{"model": {}}', "not a SentencePiece model"),
        (field(1, 7), "not a SentencePiece model"),
        (field(1, field(2, 1.0)), "not a SentencePiece model"),
        (b"\xff" * 40, "not a SentencePiece model"),
    ],
    ids=["unigram", "empty", "cut short", "JSON", "an integer", "a piece without text", "no end"],
)
def test_other_files_are_refused(path, data, message):
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"tokenizer\.model: {message}"):
        sentencepiece_json(path)


def test_what_a_file_leaves_out_is_sentencepieces_default():
    found = read_sentencepiece(field(1, field(1, "a")))
    assert found.pieces == [("a", 0.0, 1)] and found.model_type == 1 and found.charsmap == b""
    assert found.add_dummy_prefix and found.remove_extra_whitespaces and found.escape_whitespaces
    assert not found.byte_fallback and not found.space_is_suffix


# ---- the commands


@pytest.fixture
def repository(tmp_path):
    """TransNormerLLM-385M's repository in the small: weights, SentencePiece's file, and Python that must not run."""
    config = tables.transnormer_config(d=24, layers=2, heads=3, glu=20, vocab=40)
    folder = write(tmp_path / "repository", config, draw(tables.transnormer_shapes(config)))
    (folder / "tokenizer.model").write_bytes(spelled(words(), extra_whitespaces=0))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BaiChuanTokenizer"}))
    (folder / "tokenization_baichuan.py").write_text("raise SystemExit('this file was run')")
    return folder


@pytest.mark.parametrize("by", ["folder", "name"])
def test_transnormer_generates_with_the_tokenizer_it_ships(by, repository, tmp_path, monkeypatch, capsys):
    hub = Hub(repository, None)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    source = {"folder": repository, "name": "OpenNLPLab/TransNormerLLM-385M"}[by]
    text = printed(capsys, "generate", "--model", source, "w1 w2", *GREEDY)
    assert text.startswith("w1 w2") and len(text.strip()) > len("w1 w2")
    made = convert(source, tmp_path / "ours")
    assert made.missing == "" and made.tokenizer.name == str(source).rsplit("/", 1)[-1]
    again = load_tokenizer(tmp_path / "ours")
    assert again.encode("w1 w2€!") == made.tokenizer.encode("w1 w2€!") and again.hash == made.tokenizer.hash
    assert printed(capsys, "generate", tmp_path / "ours", "w1 w2", *GREEDY) == text
    assert all(not pattern.endswith(".py") for _, patterns in hub.asked for pattern in patterns)


def test_a_tokenizer_json_beside_it_goes_first(repository, capsys):
    write_tokenizer(repository, [f"v{i}" for i in range(30)])
    assert printed(capsys, "generate", repository, "v1 v2", *GREEDY).startswith("v1 v2")


def test_a_tiktoken_file_is_named_with_what_to_do(repository, tmp_path, monkeypatch, capsys):
    (repository / "tokenizer.model").unlink()
    (repository / "transnormer_100k.tiktoken").write_text("IQ== 0\n")
    hub = Hub(repository, None)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    for source in (str(repository), "OpenNLPLab/TransNormerLLM3-15B"):
        assert main(["generate", "--model", source, "w1", "--device", "cpu"]) == 2
        said = capsys.readouterr().err
        assert "transnormer_100k.tiktoken, whose splitting rule and special tokens are Python code" in said
        assert "convert_tiktoken_to_fast" in said and "--tokenizer" in said
    assert convert(repository, tmp_path / "ours").tokenizer is None


def test_the_function_that_the_message_names_is_there():
    module: types.ModuleType = pytest.importorskip("transformers.integrations.tiktoken")
    assert callable(module.convert_tiktoken_to_fast)
