"""Text in and out: stop strings, streaming, prompting twice."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from small_models import _BASED, BYTES, DTYPES, PREFIX, VOCAB, all_logits, greedy, make_model, some_ids

from linattn.core.numerics import relative_error
from linattn.generate import (
    GREEDY,
    SamplingConfig,
    StopFilter,
    ask,
    generate,
    generate_short,
    generate_text,
    pad_left,
    prefill,
    read,
    read_twice,
)
from linattn.models import BasedConfig, Decoder


class Script:
    """Stands in for a model: makes `generate_text` write the given tokens. Row i writes scripts[i]."""

    def __init__(self, monkeypatch, scripts):
        import linattn.generate.engine as engine

        self.scripts, self.place = scripts, [0] * len(scripts)
        self.model = make_model("based")
        monkeypatch.setattr(engine, "prefill", self.prefill)
        monkeypatch.setattr(self.model, "step_", self.step_)
        monkeypatch.setattr(self.model, "put_", lambda pool, slots, state: None)

    def logits(self, rows):
        logits = torch.zeros(len(rows), VOCAB)
        for i, row in enumerate(rows):
            if row >= 0:
                logits[i, self.scripts[row][self.place[row]]] = 9.0
                self.place[row] += 1
        return logits

    def prefill(self, model, rows, **options):
        return self.logits(range(len(rows))), None

    def step_(self, tokens, pool, slots):
        return self.logits(slots.tolist())


def scripted(monkeypatch, texts, **options):
    """Results and streamed pieces of rows that write these texts byte by byte, then end the document."""
    script = Script(monkeypatch, [[*BYTES.encode(t), BYTES.eos] if isinstance(t, str) else t for t in texts])
    pieces = [[] for _ in texts]
    results = generate_text(
        script.model,
        BYTES,
        ["x"] * len(texts),
        sampling=GREEDY,
        on_text=lambda row, piece: pieces[row].append(piece),
        **options,
    )
    assert all("".join(p) == r.text for p, r in zip(pieces, results, strict=True))
    assert all(piece for p in pieces for piece in p)
    return results, pieces


def test_stop_strings_across_tokens_end_the_text_and_are_never_streamed(monkeypatch):
    texts = ["a line\n\nrest", "no end\n", "END", "almost EN then ENDED", "néant\n\n"]
    results, pieces = scripted(monkeypatch, texts, stop=("\n\n", "END"))
    assert [r.text for r in results] == ["a line", "no end\n", "", "almost EN then ", "néant"]
    assert [r.finish_reason for r in results] == ["stop", "eos", "stop", "stop", "stop"]
    assert results[0].tokens == BYTES.encode("a line\n\n")
    # "EN" may become "END", and is shown once it has not.
    assert pieces[3][:8] == [*"almost ", "EN "] and pieces[2] == []


def test_streamed_pieces_are_whole_characters_and_join_to_the_text(monkeypatch):
    texts = ["naïve café – 猫 🐈 end", "🐈"]
    results, pieces = scripted(monkeypatch, texts)
    assert [r.text for r in results] == texts
    assert "🐈" in pieces[0] and "猫" in pieces[0] and pieces[1] == ["🐈"]
    # Cut by the length inside a character: its bytes are shown as what they are, damage, once nothing more can come.
    results, pieces = scripted(monkeypatch, ["ab🐈"], max_new_tokens=4)
    assert results[0].text == "ab\ufffd" and results[0].finish_reason == "length" and pieces[0][:2] == ["a", "b"]


def test_a_stop_string_may_be_of_characters_of_many_bytes(monkeypatch):
    results, _ = scripted(monkeypatch, ["ça va。もう", "。", "e\u3001"], stop=["。"])
    assert [r.text for r in results] == ["ça va", "", "e\u3001"]


def test_the_end_of_document_token_can_be_ignored(monkeypatch):
    results, _ = scripted(monkeypatch, [[97, 256, 98, 99]], stop_at_eos=False, max_new_tokens=4)
    assert results[0].text == "abc" and results[0].finish_reason == "length"


@pytest.mark.parametrize("seed", range(20))
def test_stop_filter_does_not_depend_on_where_pieces_end(seed):
    rng = np.random.default_rng(seed)
    text = "".join(rng.choice(list("ab"), 40))
    stop = ["".join(rng.choice(list("ab"), n)) for n in rng.integers(3, 7, 3)]
    ends = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
    want = text[: min(ends)[1]] if ends else text
    for size in (1, 2, 5, 40):
        filtered, shown = StopFilter(stop), ""
        for start in range(0, 40, size):
            shown += filtered.push(text[start : start + size])
            assert want.startswith(shown)
        assert shown + filtered.flush() == want and filtered.stopped == bool(ends)


def test_text_is_the_tokens_of_the_model():
    model = make_model("based")
    prompts = ["Call me", "It is a truth universally"]
    config = SamplingConfig(seed=3)
    results = generate_text(model, BYTES, prompts, sampling=config, max_new_tokens=30, return_state=True)
    ids = generate(model, [BYTES.encode(p) for p in prompts], sampling=config, max_new_tokens=30, eos_id=BYTES.eos)
    assert [r.tokens for r in results] == [r.tokens for r in ids]
    assert [r.text for r in results] == [BYTES.decode(r.tokens) for r in ids]
    assert results[0].state.tokens.tolist() == [len(prompts[0]) + len(results[0].tokens)]


def test_bad_text_arguments_are_refused():
    model = make_model("based")
    for prompts, options, words in (
        ("abc", {}, "prompts must be a list"),
        (["a", ""], {}, "prompt 1 is empty"),
        (["a"], {"stop": "\n"}, "stop must be a list"),
        (["a"], {"stop": [""]}, "a stop string is empty"),
        (["a"], {"short": "pad"}, "is for prefix models"),
        (["a"], {"short": "pat"}, "not one of"),
    ):
        with pytest.raises(ValueError, match=words):
            generate_text(model, BYTES, prompts, **options)
    small = Decoder(replace(BasedConfig(**_BASED | {"vocab_size": 100}).decoder()))
    with pytest.raises(ValueError, match="prompt 0 holds token id 255 .* 0 to 99; encode the text with the tokenizer"):
        generate(small, [[1, 255]])


def test_read_twice_writes_the_five_orders():
    texts = {
        "CQ": "C. Q:",
        "QCQ": "Information about Q. C. Q:",
        "CCQ": "C.\nC. Q:",
        "CQCQ": "C. Information about Q.\nC. Q:",
        "QCCQ": "Information about Q. C.\nC. Q:",
    }
    for order, text in texts.items():
        assert read_twice("C.", "Q:", order=order) == text
    published = "Information about Applicant. Made by Acme.\nMade by Acme. Applicant:"
    assert read_twice("Made by Acme.", "Applicant:", opening="Information about Applicant.") == published
    with pytest.raises(ValueError, match="'QQ' is not one of"):
        read_twice("C", "Q", order="QQ")
    with pytest.raises(ValueError, match="must hold text"):
        read_twice("", "Q")


def test_prefix_pad_is_the_prompt_behind_real_pads():
    model, short = make_model("jrt"), [some_ids(4), some_ids(PREFIX + 3)]
    assert pad_left([7, 8], 5, 32) == [32, 32, 32, 7, 8] and pad_left([1, 2, 3], 2, 32) == [1, 2, 3]
    got = generate_short(model, short, short="pad", pad_id=32, max_new_tokens=8, sampling=GREEDY)
    want = greedy(model, [[32] * (PREFIX - 4) + short[0], short[1]], new=8)
    assert [r.tokens for r in got] == want
    assert want[0] != greedy(model, short, new=8)[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_prefix_iterate_reads_all_again_until_the_prefix_is_full(dtype):
    model, prompts = make_model("jrt", dtype), [some_ids(4), some_ids(PREFIX - 1), some_ids(PREFIX + 6)]
    results = generate_short(model, prompts, short="iterate", max_new_tokens=14, sampling=GREEDY, return_state=True)
    for prompt, result in zip(prompts, results, strict=True):
        text = list(prompt)
        for token in result.tokens:
            assert token == all_logits(model, text, len(text))[-1].argmax()
            text.append(token)
        want = read(model, text).state
        assert result.state.tokens.tolist() == [len(text)]
        for got_layer, want_layer in zip(result.state.layers, want.layers, strict=True):
            for got, wanted in zip(got_layer, want_layer, strict=True):
                assert relative_error(got.double(), wanted.double()) < 1e-4
    assert results[0].tokens != greedy(model, prompts, new=14)[0]
    assert results[2].tokens == greedy(model, prompts, new=14)[2]


def test_prefix_iterate_draws_as_generate_does():
    model, config = make_model("jrt"), SamplingConfig(seed=2)
    prompts = [some_ids(PREFIX + 6, 1), some_ids(PREFIX, 2)]
    seen = []
    got = generate_short(
        model,
        prompts,
        short="iterate",
        sampling=config,
        max_new_tokens=9,
        on_token=lambda row, token: seen.append((row, token)),
    )
    assert [r.tokens for r in got] == [r.tokens for r in generate(model, prompts, sampling=config, max_new_tokens=9)]
    assert [t for row, t in seen if row == 1] == got[1].tokens


def test_prefix_strategies_of_ask_are_these_prompts():
    model = make_model("jrt")
    items = [("The sky is blue.", "The sky:"), ("Ab.", "A?")]

    def answers(order, short):
        prompts = [read_twice(c, q, order=order) for c, q in items]
        options = {"max_new_tokens": 8, "sampling": GREEDY, "stop": ("\n",), "short": short}
        return [r.tokens for r in generate_text(model, BYTES, prompts, **options)]

    for strategy, order, short in (
        ("exact", "CQ", "exact"),
        ("pad", "CQ", "pad"),
        ("read-twice", "QCCQ", "pad"),
        ("iterate", "CQ", "iterate"),
    ):
        got = [r.tokens for r in ask(model, BYTES, items, strategy=strategy, max_new_tokens=8)]
        assert got == answers(order, short)
    twice = ask(make_model("based"), BYTES, items, order="QCCQ", max_new_tokens=8)
    assert len(twice) == 2
    with pytest.raises(ValueError, match="'twice' is not one of"):
        ask(model, BYTES, items, strategy="twice")
    with pytest.raises(ValueError, match="for prefix models"):
        ask(make_model("based"), BYTES, items, strategy="iterate")


def test_prefix_strategies_refuse_what_they_cannot_do():
    model = make_model("jrt")
    state = prefill(model, [[1]]).state
    for options, words in (
        ({"short": "pad"}, "needs pad_id"),
        ({"short": "pad", "pad_id": 32, "state": state}, "with state"),
        ({"short": "iterate", "prefix_lengths": [1]}, "with prefix_lengths"),
        ({"short": "iterate", "max_new_tokens": 0}, "max_new_tokens=0"),
    ):
        with pytest.raises(ValueError, match=words):
            generate_short(model, [[1, 2]], **options)
    with pytest.raises(TypeError, match="unknown"):
        generate_short(model, [[1, 2]], short="iterate", unknown=1)
