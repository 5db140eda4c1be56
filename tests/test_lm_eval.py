"""linattn in lm-eval: its model type, its tasks, and JRT-Prompt around any model of lm-eval's."""

import json
import os
import subprocess
import sys
import types
from dataclasses import dataclass, field

import pytest
import torch

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.filterwarnings("default::DeprecationWarning", "default::FutureWarning")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.model import LM  # noqa: E402
from lm_eval.api.registry import get_model  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402
from tiny_checkpoint import BYTES, write_checkpoint  # noqa: E402

from linattn.cli.main import main  # noqa: E402
from linattn.data import load_tokenizer  # noqa: E402
from linattn.generate import GREEDY, generate_text  # noqa: E402
from linattn.hf import LinattnForCausalLM  # noqa: E402
from linattn.hf.tokenizer import hf_tokenizer  # noqa: E402
from linattn.tasks.lm_eval import LinattnLM, ReadTwice, evaluate_harness, split_prompt  # noqa: E402
from linattn.tasks.lm_eval_tasks import TASKS, write_tasks  # noqa: E402
from linattn.train.weights import load_model  # noqa: E402

STOP = {"until": ["\n"], "max_gen_toks": 6, "do_sample": False}
PROMPTS = ["Made by Acme. Applicant:", "The sky over there is blue. Colour:"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def requests(kind, arguments):
    return [Instance(kind, {}, a, i) for i, a in enumerate(arguments)]


def greedy(folder, prompts):
    model, _ = load_model(folder)
    return [generate_text(model, BYTES, [p], max_new_tokens=6, sampling=GREEDY, stop=("\n",))[0].text for p in prompts]


@dataclass
class Spy:
    """A model that answers with what it was asked."""

    max_length: int = 10_000
    rank: int = 0
    world_size: int = 1
    tokenizer_name: str = "spy"
    device: str = "none"
    asked: list = field(default_factory=list)

    def tok_encode(self, text):
        return list(text)

    def generate_until(self, requests, disable_tqdm=False):
        self.asked = [r.args for r in requests]
        return [r.args[0] for r in requests]

    def loglikelihood(self, requests, disable_tqdm=False):
        self.asked = [r.args for r in requests]
        return [(0.0, True) for _ in requests]


# ---- the model type


@pytest.mark.parametrize("batch", [1, 8])
def test_the_linattn_model_says_what_linattn_generate_says(folder, batch):
    model = get_model("linattn")(pretrained=str(folder), batch_size=batch, device="cpu")
    assert isinstance(model, LinattnLM) and isinstance(model, HFLM) and model.max_length == 32_768
    said = model.generate_until(requests("generate_until", [(p, dict(STOP)) for p in PROMPTS]), disable_tqdm=True)
    assert said == greedy(folder, PROMPTS)


def test_the_linattn_model_scores_as_the_model_does(folder):
    model = LinattnLM(folder, batch_size=2, device="cpu")
    pairs = [("Made by", " Acme"), ("The sky", " is blue")]
    scored = model.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    decoder, _ = load_model(folder)
    for (context, continuation), (score, _) in zip(pairs, scored, strict=True):
        ids = torch.tensor([BYTES.encode(context + continuation)])
        with torch.no_grad():
            logs = decoder(ids).logits.log_softmax(-1)[0, :-1]
        picked = logs.gather(1, ids[0, 1:, None])[-len(continuation) :].sum()
        assert score == pytest.approx(float(picked), abs=1e-3)


@pytest.fixture(scope="module")
def export(folder, tmp_path_factory):
    """The same model as a folder for transformers."""
    path = tmp_path_factory.mktemp("export")
    LinattnForCausalLM.from_decoder(*load_model(folder)).save_pretrained(path)
    hf_tokenizer(load_tokenizer("bytes")).save_pretrained(path)
    return path


def test_the_linattn_model_reads_exports_too(folder, export):
    model = LinattnLM(export, device="cpu", dtype="float32", max_length=512)
    said = model.generate_until(requests("generate_until", [(PROMPTS[0], dict(STOP))]), disable_tqdm=True)
    assert said == greedy(folder, PROMPTS[:1]) and model.max_length == 512


@pytest.mark.parametrize("batch", [1, 8])
def test_lm_evals_own_model_type_reads_exports(folder, export, batch):
    model = get_model("hf")(pretrained=str(export), batch_size=batch, device="cpu", max_length=512)
    said = model.generate_until(requests("generate_until", [(p, dict(STOP)) for p in PROMPTS]), disable_tqdm=True)
    assert said == greedy(folder, PROMPTS)


@pytest.mark.slow
def test_plain_lm_eval_runs_an_export_by_its_stub(export, tmp_path):
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--limit", "2", "--device", "cpu"]
    command += ["--model_args", f"pretrained={export},trust_remote_code=True", "--tasks", "linattn_attributes"]
    command += ["--include_path", str(write_tasks(tmp_path / "tasks")), "--output_path", str(tmp_path / "out")]
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub"), "PYTHONWARNINGS": "default"}
    subprocess.run(command, check=True, env=offline, timeout=600)
    (results,) = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(results.read_text())
    assert found["results"]["linattn_attributes"].keys() >= {"contains,none", "contains_stderr,none"}
    assert found["n-samples"]["linattn_attributes"]["effective"] == 2


# ---- read twice around a model


def test_read_twice_rewrites_prompts_and_nothing_else():
    spy = Spy()
    twice = ReadTwice(spy)
    given = requests("generate_until", [(p, STOP) for p in PROMPTS])
    said = twice.generate_until(given)
    assert said == [
        "Information about Applicant. Made by Acme.\nMade by Acme. Applicant:",
        "Information about Colour. The sky over there is blue.\nThe sky over there is blue. Colour:",
    ]
    assert [r.args[0] for r in given] == PROMPTS and all(options == STOP for _, options in spy.asked)
    assert (twice.rank, twice.world_size, twice.tokenizer_name, twice.device) == (0, 1, "spy", "none")
    assert isinstance(twice, LM)


def test_read_twice_keeps_continuations_where_they_were():
    spy = Spy()
    ReadTwice(spy, order="CCQ", passes=3).loglikelihood(requests("loglikelihood", [("It is blue. It is", " blue")]))
    assert spy.asked == [("It is blue.\nIt is blue.\nIt is blue. It is", " blue")]


def test_read_twice_around_a_real_model_is_the_prompt_read_twice(folder):
    twice = ReadTwice(inner="linattn", pretrained=folder, device="cpu", batch_size=2)
    assert isinstance(twice, get_model("read-twice")) and isinstance(twice.lm, LinattnLM)
    said = twice.generate_until(requests("generate_until", [(p, dict(STOP)) for p in PROMPTS]), disable_tqdm=True)
    spy = Spy()
    assert said == greedy(
        folder, ReadTwice(spy).generate_until(requests("generate_until", [(p, STOP) for p in PROMPTS]))
    )


def test_read_twice_warns_when_the_model_would_cut_the_first_copy():
    prompt, options = "x" * 40 + ". Key:", {"max_gen_toks": 20}
    length = len("Information about Key. ") + 2 * 41 + 1 + len(" Key:")
    with pytest.warns(
        UserWarning, match=rf"1 of 1 prompts are longer than the {length - 1} tokens that Spy reads, by up to 1:"
    ):
        ReadTwice(Spy(max_length=length + 19)).generate_until(requests("generate_until", [(prompt, options)]))
    ReadTwice(Spy(max_length=length + 20)).generate_until(requests("generate_until", [(prompt, options)]))
    with pytest.warns(UserWarning, match="by up to 2:"):
        ReadTwice(Spy(max_length=length + 1)).loglikelihood(requests("loglikelihood", [(prompt, "abc")]))


def test_read_twice_refuses_what_has_no_question():
    twice = ReadTwice(Spy())
    with pytest.raises(ValueError, match="no context before the question in 'Key:'"):
        twice.generate_until(requests("generate_until", [("Key:", STOP)]))
    with pytest.raises(ValueError, match="leaves its answer open.*order CQ or CCQ"):
        twice.generate_until(requests("generate_until", [("It is blue. The sky is", STOP)]))
    with pytest.raises(ValueError, match="rolling likelihoods have no question"):
        twice.loglikelihood_rolling([])


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("Some text. Version:", ("Some text.", "Version:", "")),
        ("a: 1\nb: 2. Key: ", ("a: 1\nb: 2.", "Key:", "")),
        ("First.\nThe man went to", ("First.", "The man went to", "")),
        ("Paris is big. Who lives there?", ("Paris is big.", "Who lives there?", "")),
        (
            "Title: T\n\nText here.\n\nQuestion: Who?\nAnswer:",
            ("Title: T\n\nText here.", "Question: Who?\nAnswer:", "Who?"),
        ),
        ("Q: a? A: b\nText.\nQ: Who? A:", ("Q: a? A: b\nText.", "Q: Who? A:", "Who?")),
        ('He said "no." Then she said', ('He said "no."', "Then she said", "")),
    ],
)
def test_prompts_come_apart_before_their_question(prompt, parts):
    assert split_prompt(prompt) == parts


# ---- the tasks


def test_every_task_loads_with_the_published_stop_and_length(tmp_path):
    rows = {"text": "C. k:", "key": "k", "value": "v", "context": "C.", "question": "Who", "orig_question": "Who?"}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({**rows, "answers": ["v"]}))
    manager = TaskManager(
        include_path=str(write_tasks(tmp_path / "tasks")), include_defaults=False, metadata={"data": str(path)}
    )
    tasks = manager.load(sorted(TASKS))["tasks"]
    assert tasks.keys() == TASKS.keys() and "linattn_squad_completion" in tasks
    for name, task in tasks.items():
        assert task.config.generation_kwargs == {"until": ["\n"], "max_gen_toks": 48, "do_sample": False}
        (row,) = task.test_docs()
        prompt = task.doc_to_text(row)
        assert prompt.count("\n") == int(name.endswith("_twice")), prompt
        assert task.process_results(row, [" it is V\nmore"]) == {"contains": 1.0}
        assert task.process_results(row, [" it is\nv"]) == {"contains": 0.0}
        request = task.construct_requests(row, prompt)
        assert request.args == (prompt, task.config.generation_kwargs)


def test_tasks_cut_contexts_by_the_models_tokens(tmp_path, folder):
    manager = TaskManager(
        include_path=str(write_tasks(tmp_path)),
        include_defaults=False,
        metadata={"pretrained": str(folder), "context_tokens": 64},
    )
    task = manager.load("linattn_attributes")["tasks"]["linattn_attributes"]
    prompts = [task.doc_to_text(row) for row in task.test_docs()]
    assert len(prompts) == 300 and max(len(BYTES.encode(p)) for p in prompts) <= 64 + len(". Installed-Size:")


def test_the_harness_scores_both_ways(folder):
    names = ["linattn_attributes", "linattn_attributes_twice"]
    plain = evaluate_harness(folder, names, limit=2, batch_size=2, device="cpu")
    assert [(r["task"], r["order"], r["metric"], r["documents"]) for r in plain] == [
        (n, "CQ", "contains", 2) for n in names
    ]
    (twice,) = evaluate_harness(folder, names[:1], order="QCCQ", limit=2, batch_size=2, device="cpu")
    assert twice["order"] == "QCCQ" and twice["stderr"] is not None


@pytest.mark.slow
def test_a_task_that_nobody_knows_is_refused(folder):
    with pytest.raises(ValueError, match="neither linattn nor lm-eval knows the task nonesuch"):
        evaluate_harness(folder, ["nonesuch"])


def test_the_command_hands_other_tasks_to_lm_eval(folder, capsys, monkeypatch):
    import linattn.tasks.lm_eval as harness

    asked = types.SimpleNamespace()

    def fake(model, tasks, **options):
        asked.model, asked.tasks, asked.options = model, tasks, options
        return [{"task": "piqa", "order": "QCCQ", "documents": 3, "metric": "acc", "value": 0.5, "stderr": None}]

    monkeypatch.setattr(harness, "evaluate_harness", fake)
    assert main(["eval", str(folder), "--tasks", "piqa", "--read-twice", "--limit", "3", "--device", "cpu"]) == 0
    assert "acc 0.5000, 3 documents" in capsys.readouterr().out
    assert (asked.model, asked.tasks) == (folder, ["piqa"])
    assert asked.options == {
        "order": "QCCQ", "limit": 3, "batch_size": 8, "device": "cpu", "dtype": "auto", "hf": False
    }  # fmt: skip
