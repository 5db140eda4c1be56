"""Read twice: the orders, the trap they keep out of, the published prompts to the letter, and contexts made shorter."""

import warnings

import pytest

from linattn.data import ByteTokenizer
from linattn.generate import ask
from linattn.generate.cutting import Codec, cut_context, warn_if_too_long
from linattn.generate.prompting import opening_of, read_twice
from linattn.generate.templates import published_prompt
from linattn.models import BasedConfig, Decoder

BYTES = ByteTokenizer()
WORDS = Codec(str.split, " ".join)
ORDERS = ("CQ", "QCQ", "CCQ", "CQCQ", "QCCQ")


# ---- orders and passes


def test_a_question_that_is_a_sentence_is_its_own_opening():
    texts = {
        "CQ": "C. Who?",
        "QCQ": "Who? C. Who?",
        "CCQ": "C.\nC. Who?",
        "CQCQ": "C. Who?\nC. Who?",
        "QCCQ": "Who? C.\nC. Who?",
    }
    assert {order: read_twice("C.", "Who?", order=order) for order in ORDERS} == texts


def test_passes_read_the_context_that_often():
    texts = {
        "CCQ": "C.\nC.\nC. Key:",
        "CQCQ": "C. Information about Key.\nC. Information about Key.\nC. Key:",
        "QCCQ": "Information about Key. C.\nC.\nC. Key:",
    }
    assert {order: read_twice("C.", "Key:", order=order, passes=3) for order in texts} == texts
    for order in texts:
        assert read_twice("C.", "Key:", order=order, passes=2) == read_twice("C.", "Key:", order=order)
        assert read_twice("Xyz.", "Key:", order=order, passes=7).count("Xyz.") == 7
        with pytest.raises(ValueError, match="2 or more times, got passes=1"):
            read_twice("C.", "Key:", order=order, passes=1)
    for order in ("CQ", "QCQ"):
        assert read_twice("C.", "Key:", order=order, passes=1) == read_twice("C.", "Key:", order=order)
        with pytest.raises(ValueError, match="once, got passes=2"):
            read_twice("C.", "Key:", order=order, passes=2)


def test_the_separator_is_between_context_and_question_alone():
    question = {"opening": "Who?", "separator": "\n\n"}
    prompt = read_twice("C.", "Question: Who? Answer:", **question)
    assert prompt == "Who?\n\nC.\nC.\n\nQuestion: Who? Answer:"


# ---- the trap


@pytest.mark.parametrize("passes", [None, 3])
@pytest.mark.parametrize("order", ORDERS)
def test_an_open_line_stands_at_the_end_and_nowhere_else(order, passes):
    passes = passes if order in ("CCQ", "CQCQ", "QCCQ") else None
    prompt = read_twice("Made by Acme.", "Applicant:", order=order, passes=passes)
    assert prompt.count("Applicant:") == 1 and prompt.endswith("Applicant:")


@pytest.mark.parametrize("order", ["QCQ", "CQCQ", "QCCQ"])
@pytest.mark.parametrize(
    ("question", "opening", "words"),
    [
        ("The applicant is", None, "leaves its answer open.*order CQ or CCQ"),
        ("Question: Who sued? Answer:", None, "leaves its answer open"),
        ("Applicant:", "Applicant:", 'say "Information about Applicant."'),
        ("Applicant:", "The applicant is:", "make it a whole sentence"),
        ("The applicant is", "The applicant is", "make it a whole sentence"),
        ("Applicant:", " ", "make it a whole sentence"),
    ],
)
def test_an_open_line_before_the_last_is_refused(order, question, opening, words):
    with pytest.raises(ValueError, match=words):
        read_twice("Made by Acme.", question, order=order, opening=opening)


def test_orders_that_ask_once_take_any_question():
    for order in ("CQ", "CCQ"):
        assert read_twice("Made by Acme.", "The applicant is", order=order).endswith("Acme. The applicant is")


def test_openings_close_a_key_and_keep_a_sentence():
    assert opening_of("Applicant:") == "Information about Applicant."
    assert opening_of(" device class: ") == "Information about device class."
    assert opening_of('Who said "no"?') == 'Who said "no"?'
    assert opening_of('She said "no."') == 'She said "no."'
    for question in ("Applicant", ":", "See 1. Key:", "Key\nvalue:"):
        with pytest.raises(ValueError, match="leaves its answer open"):
            opening_of(question)


def test_ask_takes_an_opening_for_each_item():
    dials = BasedConfig(
        d_model=32,
        n_layers=2,
        n_heads=2,
        feature_dim=4,
        linear_layers=(1,),
        window_layers=(),
        d_hidden=48,
        vocab_size=257,
    )
    model = Decoder(dials.decoder()).eval()
    items = [("The sky is blue.", "The sky is"), ("Grass is green.", "Colour:")]
    assert len(ask(model, BYTES, items, order="QCCQ", opening=["What is the sky?", None], max_new_tokens=2)) == 2
    with pytest.raises(ValueError, match="leaves its answer open"):
        ask(model, BYTES, items, order="QCCQ", max_new_tokens=2)
    with pytest.raises(ValueError, match="argument"):
        ask(model, BYTES, items, order="QCCQ", opening=["One."], max_new_tokens=2)


# ---- the published prompts


PUBLISHED = {
    "fda": (
        {"text": "Made by Acme.\nClass II. \napplicant:Applicant:", "key": "applicant", "value": "Acme"},
        "Made by Acme.\nClass II. . Applicant:",
        "Information about Applicant. Made by Acme.\nClass II. .\nMade by Acme.\nClass II. . Applicant:",
    ),
    "swde": (
        {
            "text": "Film: Alien. \n Summary of information above... Summary of information above... director:",
            "key": "director",
            "value": "Scott",
        },
        "Film: Alien. Director:",
        "Information about Director. Film: Alien.\nFilm: Alien. Director:",
    ),
    "squad": (
        {
            "text": " Acme sued. In 2005 the plaintiff was ",
            "context": "Acme sued. Question: who",
            "question": "Who sued?",
            "value": "Acme",
        },
        "Acme sued. In 2005 the plaintiff was",
        "Who sued? Acme sued. \nAcme sued. In 2005 the plaintiff was",
    ),
    "triviaqa": (
        {
            "context": " [DOC] [TLE] Ely [PAR] Ely is in England . The county is",
            "question": "The County is",
            "orig_question": "Which county?",
            "answers": ["England"],
        },
        "Ely  Ely is in England . The County is",
        "Which county? Ely  Ely is in England.\nEly  Ely is in England. The County is",
    ),
    "nq": (
        {
            "context": "Bonn was the capital. The Capital was",
            "question": "The capital was",
            "orig_question": "what was the capital:",
            "answers": ["Bonn"],
        },
        # the default drops the stem only as it is written, the twice prompt in any case
        "Bonn was the capital. The Capital was. The capital was",
        "what was the capital Bonn was the capital.\nBonn was the capital. The capital was",
    ),
    "drop": (
        {
            "context": "Two ran .THEY NUMBEREDThey numbered",
            "question": " They numbered ",
            "orig_question": "How many?",
            "answers": ["Two"],
        },
        "Two ran . They numbered",
        "How many? Two ran.\nTwo ran. They numbered",
    ),
}
"""Documents that meet each template's special cases, and what they become."""


@pytest.mark.parametrize("template", PUBLISHED)
def test_published_prompts_are_exact(template):
    document, default, twice = PUBLISHED[template]
    before = dict(document)
    assert published_prompt(template, document) == default
    assert published_prompt(template, document, "QCCQ") == twice
    assert document == before


def test_published_parts_go_in_the_other_orders_too():
    document = {"text": "Made by Acme", "key": "applicant", "value": "Acme"}
    about = "Information about Applicant."
    assert published_prompt("fda", document, "QCQ") == f"{about} Made by Acme. Applicant:"
    assert published_prompt("fda", document, "CQCQ") == f"Made by Acme. {about}\nMade by Acme. Applicant:"
    assert published_prompt("fda", document, "CCQ") == "Made by Acme.\nMade by Acme. Applicant:"


def test_published_prompts_say_what_they_lack():
    with pytest.raises(ValueError, match="no published template 'nq_512'"):
        published_prompt("nq_512", {})
    with pytest.raises(ValueError, match="of fda has no column 'key'; it has"):
        published_prompt("fda", {"text": "x", "value": "y"})
    with pytest.raises(ValueError, match="squad's published prompts are CQ and QCCQ, got CCQ"):
        published_prompt("squad", PUBLISHED["squad"][0], "CCQ")


# ---- contexts made shorter


TEN = "a b c d e F g h i j"


@pytest.mark.parametrize(
    ("how", "options", "text", "kept", "found"),
    [
        ("head", {}, "a b c d", (0, 4), False),
        ("tail", {}, "g h i j", (6, 10), False),
        ("centred", {"answers": ["f"]}, "d e F g", (3, 7), True),
        ("centred", {"answers": ["x", "g", "c d"]}, "a b c d", (0, 4), True),
        ("centred", {"answers": ["j"]}, "h i j", (7, 10), True),
        ("centred", {"answers": ["x"]}, "a b c d", (0, 4), False),
        ("centred", {"answers": ["x"], "position": 6}, "e F g h", (4, 8), False),
        ("centred", {"position": 6}, "e F g h", (4, 8), False),
    ],
)
def test_cut_keeps_the_tokens_it_names(how, options, text, kept, found):
    short = cut_context(TEN, 4, WORDS, how=how, **options)
    assert short == (text, 10, kept, found)


def test_cut_leaves_what_fits_to_the_letter():
    spaced = "a  b\nc "
    for how in ("head", "tail", "centred"):
        assert cut_context(spaced, 3, WORDS, how=how, answers=["b"]) == (spaced, 3, (0, 3), True)


def test_cut_keeps_an_answer_whole_that_a_head_loses():
    text = "word " * 500 + "The applicant is Acme Corporation of Ohio. " + "word " * 500
    codec = Codec(BYTES.encode, BYTES.decode)
    for tokens in (64, 200, 950):
        centred = cut_context(text, tokens, codec, how="centred", answers=["acme corporation"])
        assert "Acme Corporation" in centred.text and len(BYTES.encode(centred.text)) == tokens
        assert "Acme Corporation" not in cut_context(text, tokens, codec).text


def test_cut_refuses_what_it_cannot_do():
    for options, words in (
        ({"how": "middle"}, "how='middle' is not one of"),
        ({"tokens": 0}, "tokens=0 must be at least 1"),
        ({"how": "centred"}, "needs answers to centre on"),
        ({"how": "centred", "answers": [""]}, "needs answers to centre on"),
    ):
        with pytest.raises(ValueError, match=words):
            cut_context(TEN, **{"tokens": 4, "codec": WORDS, **options})


def test_too_long_prompts_warn_with_the_numbers():
    with pytest.warns(
        UserWarning, match="2 of 4 prompts are longer than the 1,000 tokens that HFLM reads, by up to 250"
    ):
        assert warn_if_too_long([10, 1000, 1001, 1250], 1000, reader="HFLM") == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert warn_if_too_long([10, 1000], 1000) == 0
