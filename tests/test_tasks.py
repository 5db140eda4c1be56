"""Recall tasks: their documents, how answers are found, which texts models are shown, and what each refuses."""

import json
import math
import sys
import types

import pytest
import torch
from tiny_checkpoint import BYTES, DIALS, write_checkpoint

from linattn.cli.main import main
from linattn.data import load_tokenizer
from linattn.generate import GREEDY, generate_text
from linattn.generate.cutting import Codec
from linattn.models import Decoder
from linattn.tasks.completers import codec_of, hf_completer, linattn_completer
from linattn.tasks.local import attributes, cloze
from linattn.tasks.recall import contains, evaluate_recall, share, shorten
from linattn.tasks.sources import SOURCES, answers_of, centres_of, load_documents

CODEC = Codec(BYTES.encode, BYTES.decode)
HUB = sorted(name for name, source in SOURCES.items() if source.hub is not None)
ROWS = {
    "fda": {"text": "Made by Acme. applicant:", "key": "applicant", "value": "Acme"},
    "swde": {"text": "Film: Alien. director:", "key": "director", "value": "Scott"},
    "squad": {"text": "Acme sued. It was", "context": "Acme sued.", "question": "Who sued?", "value": "Acme"},
}
ROWS["attributes"] = ROWS["fda"]
QA = {"context": "Bonn was it.", "question": "It was", "orig_question": "what was it", "answers": ["Bonn", "the city"]}


def row(task):
    return ROWS.get(task, QA)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Decoder(DIALS.decoder()).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


# ---- documents


def test_attributes_hold_their_value_once():
    documents = attributes()
    assert len(documents) == len({d["doc_id"] for d in documents}) == 300
    for d in documents:
        assert d["text"].lower().count(d["value"].lower()) == 1 and f"{d['key']}: {d['value']}" in d["text"]
        assert "@" not in d["text"]


def test_cloze_names_its_answer_once_in_the_context_and_not_in_the_question():
    documents = cloze(per_book=20)
    assert len(documents) == 60 and documents == cloze(per_book=20)
    for d in documents:
        (answer,) = d["answers"]
        assert d["context"].count(answer) == 1 and answer not in d["orig_question"]
        assert 150 <= len(d["context"].split()) <= 300 and not d["question"].endswith((".", "?", "!"))


def test_every_task_reads_its_columns_from_a_file(tmp_path):
    for task in SOURCES:
        path = tmp_path / f"{task}.jsonl"
        path.write_text(json.dumps(row(task)) + "\n\n" + json.dumps(row(task)) + "\n")
        assert load_documents(task, path) == [row(task)] * 2


def test_parquet_and_a_folder_are_read(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    parquet.write_table(pyarrow.Table.from_pylist([QA]), tmp_path / "validation-00000-of-00001.parquet")
    (tmp_path / "validaion-00000.parquet").write_bytes(b"a misspelt copy, as on the hub")
    assert (
        load_documents("drop", tmp_path)
        == load_documents("drop", tmp_path / "validation-00000-of-00001.parquet")
        == [QA]
    )
    (tmp_path / "validation-b.jsonl").write_text("{}")
    with pytest.raises(ValueError, match="exactly one validation.*found validation-0.*validation-b.jsonl"):
        load_documents("drop", tmp_path)


def test_documents_that_cannot_be_read_say_why(tmp_path):
    path = tmp_path / "rows.jsonl"
    for text, words in (
        ("", "holds no documents"),
        ("{", "not JSON lines"),
        (json.dumps({"text": "x", "id": 1}), "needs the columns text, key, value; key, value not among text, id"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=words):
            load_documents("fda", path)
    with pytest.raises(ValueError, match="give a .parquet or .jsonl file"):
        load_documents("fda", tmp_path / "rows.csv")
    with pytest.raises(ValueError, match="no recall task 'fdb'; there are fda, swde"):
        load_documents("fdb")


@pytest.mark.parametrize("task", HUB)
def test_the_hub_is_asked_for_the_published_data_set(task, monkeypatch):
    asked = []
    fake = types.ModuleType("datasets")
    fake.load_dataset = lambda *args, **options: asked.append((args, options)) or [row(task)]
    monkeypatch.setitem(sys.modules, "datasets", fake)
    assert load_documents(task) == [row(task)]
    assert asked == [((SOURCES[task].hub, SOURCES[task].config), {"split": "validation"})]
    assert SOURCES[task].hub.startswith("hazyresearch/based")


def test_without_datasets_or_a_network_one_sentence_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"hazyresearch/based-fda.*datasets: pip install 'linattn\[eval\]'"):
        load_documents("fda")

    def offline(*args, **options):
        raise ConnectionError("no route to huggingface.co\nmore")

    fake = types.ModuleType("datasets")
    fake.load_dataset = offline
    monkeypatch.setitem(sys.modules, "datasets", fake)
    with pytest.raises(ValueError, match=r"could not be fetched \(no route to huggingface.co\); give its file"):
        load_documents("fda")


# ---- scores


def test_contains_is_anywhere_in_any_case_and_literal():
    assert contains(" it was ACME, inc.", ["other", "Acme"])
    assert not contains("it was acmx", ["acm.x", "a.mx"])
    assert not contains("anything", [])


def test_share_is_the_mean_and_its_standard_error():
    assert share([True] * 3 + [False]) == (0.75, pytest.approx(0.25))
    assert share([True, True]) == (1.0, 0.0) and math.isnan(share([True])[1])


@pytest.mark.parametrize("task", list(SOURCES))
def test_a_model_that_reads_scores_and_one_that_does_not_fails(task):
    answer = answers_of(task, row(task))[-1]
    seen = []

    def says(text):
        def complete(prompts):
            seen.extend(prompts)
            return [text] * len(prompts)

        return complete

    right = evaluate_recall(task, says(f"It is {answer.upper()}."), order="QCCQ", documents=[row(task)] * 5)
    assert (right.accuracy, right.stderr, right.documents, right.order) == (1.0, 0.0, 5, "QCCQ")
    assert right.said == ((f"It is {answer.upper()}.", True),) * 5
    assert (
        evaluate_recall(task, says("Nothing."), documents=[row(task)] * 5, limit=2).said == (("Nothing.", False),) * 2
    )
    assert len(seen) == 7 and seen[0].count("\n") == 1 and "\n" not in seen[-1]


def test_contexts_are_cut_around_the_published_answer():
    filler = "x" * 300
    text = f"{filler} key: Acme {filler}"
    short = shorten("fda", {"text": text, "key": "key", "value": "Acme"}, 100, CODEC)
    assert short["text"] == text[301 - 50 : 301 + 50], "centred on the earlier of key and value"
    context = f"{filler} Bonn {filler}"
    for task, kept in (("drop", context[:100]), ("triviaqa", context[:100]), ("nq_512", context[301 - 50 : 301 + 50])):
        assert shorten(task, {**QA, "context": context}, 100, CODEC)["context"] == kept
    absent = {**QA, "context": context, "answers": ["Köln"]}
    assert shorten("nq_512", {**absent, "alt_answers": ["Bonn"]}, 100, CODEC)["context"] == context[251:351]
    assert shorten("nq_512", {**absent, "tok_pos": 400}, 100, CODEC)["context"] == context[350:450]
    assert shorten("nq_512", absent, 100, CODEC, "tail")["context"] == context[-100:]


def test_cutting_drops_documents_with_answers_of_one_letter_and_needs_a_codec():
    one = {"text": "Size: 7", "key": "Size", "value": "7"}
    options = {"documents": [one, {**one, "value": "71"}], "context_tokens": 50}
    assert evaluate_recall("attributes", lambda p: ["7"] * len(p), codec=CODEC, **options).documents == 1
    assert centres_of("attributes", one) == ("7",)
    with pytest.raises(ValueError, match="give codec"):
        evaluate_recall("attributes", lambda p: p, **options)
    with pytest.raises(ValueError, match="no documents are left"):
        evaluate_recall("attributes", lambda p: p, documents=[one], context_tokens=50, codec=CODEC)


# ---- models


PROMPTS = ["A", "Some longer prompt, longer than the others", "Version: 1. Version:", "b\nc"]


def test_the_linattn_completer_is_generate_text_row_by_row(model):
    done = []
    complete = linattn_completer(
        model, BYTES, max_new_tokens=6, batch_tokens=30, on_batch=lambda *progress: done.append(progress)
    )
    alone = [generate_text(model, BYTES, [p], max_new_tokens=6, sampling=GREEDY, stop=("\n",))[0].text for p in PROMPTS]
    assert complete(PROMPTS) == alone
    assert done[-1] == (4, 4) and len(done) > 1


def test_the_hf_completer_says_what_the_linattn_completer_says(model):
    pytest.importorskip("transformers")
    from linattn.hf import LinattnForCausalLM
    from linattn.hf.tokenizer import hf_tokenizer

    theirs = hf_completer(
        LinattnForCausalLM.from_decoder(model, DIALS).eval(),
        hf_tokenizer(load_tokenizer("bytes")),
        max_new_tokens=6,
        batch_tokens=90,
    )
    assert theirs(PROMPTS) == linattn_completer(model, BYTES, max_new_tokens=6)(PROMPTS)
    assert codec_of(hf_tokenizer(BYTES)).encode("a b") == codec_of(BYTES).encode("a b")


class Echo:
    """A stand-in for a model of transformers': writes a text until it is stopped, and remembers what it read."""

    device = torch.device("cpu")
    config = types.SimpleNamespace(max_position_embeddings=20)

    def __init__(self, text="y\nz"):
        self.text = text

    def generate(self, input_ids, attention_mask, stopping_criteria, **options):
        self.read, self.steps = (input_ids, attention_mask), 0
        for letter in self.text.encode():
            input_ids = torch.cat([input_ids, torch.full((len(input_ids), 1), letter)], dim=1)
            self.steps += 1
            if stopping_criteria(input_ids, None).all():
                break
        return input_ids


def test_prompts_too_long_for_an_hf_model_warn_and_keep_their_end():
    pytest.importorskip("transformers")
    from linattn.hf.tokenizer import hf_tokenizer

    echo = Echo()
    complete = hf_completer(echo, hf_tokenizer(BYTES), max_new_tokens=8)
    with pytest.warns(UserWarning, match="1 of 2 prompts are longer than the 12 tokens .* by up to 3"):
        assert complete(["abcdefghijklmno", "xyz"]) == ["y", "y"]
    ids, mask = echo.read
    assert bytes(ids[0].tolist()) == b"defghijklmno" and mask[0].tolist() == [1] * 12
    assert bytes(ids[1, 9:].tolist()) == b"xyz" and mask[1].tolist() == [0] * 9 + [1] * 3


@pytest.mark.parametrize(("text", "said", "steps"), [("yes\nno", "yes", 4), ("\nyes", "", 1), ("yes", "yes", 3)])
def test_an_answer_ends_at_its_first_newline(text, said, steps):
    pytest.importorskip("transformers")
    from linattn.hf.tokenizer import hf_tokenizer

    echo = Echo(text)
    assert hf_completer(echo, hf_tokenizer(BYTES), max_new_tokens=8)(["a", "bc"]) == [said, said]
    assert echo.steps == steps


# ---- the command


def evaluate(capsys, *argv):
    code = main(["eval", *map(str, argv)])
    out = capsys.readouterr()
    return code, out.out, out.err


def test_eval_runs_tasks(folder, capsys):
    code, out, err = evaluate(capsys, folder, "--tasks", "attributes,cloze", "--read-twice", "--limit", 2, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert [(f["task"], f["order"], f["documents"], f["metric"]) for f in found] == [
        ("attributes", "QCCQ", 2, "contains"),
        ("cloze", "QCCQ", 2, "contains"),
    ]
    code, out, _ = evaluate(capsys, folder, "--tasks", "attributes", "--limit", 2, "--context-tokens", 64)
    assert code == 0 and "attributes" in out and "contains" in out and "2 documents" in out


def test_eval_shows_the_model_what_the_order_says(folder, capsys, monkeypatch, tmp_path):
    import linattn.cli.evaluate_tasks as verb

    shown = []
    monkeypatch.setattr(verb, "_completer", lambda *a: (lambda prompts: shown.append(list(prompts)) or ["Acme"], CODEC))
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROWS["fda"]))
    for options in ([], ["--read-twice"], ["--order", "CCQ"]):
        code, out, _ = evaluate(capsys, folder, "--tasks", "fda", "--task-data", path, *options, "--json")
        assert code == 0 and json.loads(out)[0]["value"] == 1.0
    assert [prompts[0] for prompts in shown] == [
        "Made by Acme. . Applicant:",
        "Information about Applicant. Made by Acme. .\nMade by Acme. . Applicant:",
        "Made by Acme. .\nMade by Acme. . Applicant:",
    ]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--tasks", " "], "--tasks names none; recall tasks are fda"),
        (["--tasks", "cloze", "--text", "x"], "--tasks takes neither --data nor --text"),
        (["--tasks", "cloze,fda", "--task-data", "x.jsonl"], "--task-data is one task's file, and there are 2"),
        (["--tasks", "cloze", "--read-twice", "--order", "CCQ"], "--read-twice is --order QCCQ"),
        (["--tasks", "piqa", "--context-tokens", "9"], "piqa is lm-eval's"),
        (["--tasks", "cloze", "--context-tokens", "0"], "--context-tokens 0 must be at least 1"),
        ([], "one of --data FOLDER, --text FILE and --tasks NAMES"),
    ],
)
def test_eval_refuses_in_one_sentence(argv, words, folder, capsys):
    code, _, err = evaluate(capsys, folder, *argv)
    assert code == 2 and words in err


def test_eval_without_lm_eval_says_what_to_install(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "linattn.tasks.lm_eval", raising=False)
    code, _, err = evaluate(capsys, folder, "--tasks", "piqa")
    assert code == 2 and "needs lm-eval: pip install 'linattn[eval]'" in err and "Traceback" not in err


def test_eval_of_a_transformers_folder_without_transformers_says_what_to_install(tmp_path, capsys, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    monkeypatch.setitem(sys.modules, "transformers", None)
    code, _, err = evaluate(capsys, tmp_path, "--tasks", "attributes")
    assert code == 2 and "pip install 'linattn[hf]'" in err


def test_eval_runs_any_causal_model_of_transformers(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    from linattn.hf.tokenizer import hf_tokenizer

    dials = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(**dials, vocab_size=264, max_position_embeddings=4096)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    hf_tokenizer(BYTES).save_pretrained(tmp_path)
    capsys.readouterr()
    code, out, err = evaluate(capsys, tmp_path, "--tasks", "attributes", "--read-twice", "--limit", 2)
    assert code == 0 and "2 documents" in out, err
