"""The command, verb by verb, on a run small enough to train here; and one clear sentence for each wrong request."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from linattn.cli.main import VERBS, main
from linattn.cli.read import PIECE_IDS, TextStream
from linattn.data import ByteTokenizer
from linattn.data.meta import TokenizerMeta
from linattn.models import JRTConfig, build_model
from linattn.train.weights import ModelCard, write_model

RECIPE = """
from linattn.models import BasedConfig
from linattn.train import AdamWConfig, Cosine, TrainConfig

config = TrainConfig(
    model=BasedConfig(d_model=32, n_layers=3, n_heads=2, feature_dim=4, window=8, linear_layers=(1,),
                      window_layers=(2,), d_hidden=48, vocab_size=257),
    data="data", out="run", batch=4, length=64, steps=6, optimizer=AdamWConfig(lr=1e-2),
    schedule=Cosine(warmup_steps=2, min_lr=1e-3), precision="fp32", eval_every=0, save_every=3, log_every=2,
)
"""
TEXT = "".join(f"Line {i}: the quick brown fox jumps over the lazy dog, {i * 7 % 13} times.\n" for i in range(400))


def call(capsys, *argv):
    code = main([str(a) for a in argv])
    out = capsys.readouterr()
    return code, out.out, out.err


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a recipe, shards and a run of six steps."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "recipe.py").write_text(RECIPE)
    (folder / "text.txt").write_text(TEXT)
    data, run = folder / "data", folder / "run"
    assert main(["prepare", str(folder / "text.txt"), "--out", str(data), "--validation-fraction", "0.1"]) == 0
    assert main(["train", str(folder / "recipe.py"), "--data", str(data), "--out", str(run)]) == 0
    return folder


def test_help_of_everything(capsys):
    code, out, _ = call(capsys, "--help")
    assert code == 0 and all(verb in out for verb in VERBS)
    assert "RECIPE.py" in call(capsys, "train", "--help")[1]
    for verb in VERBS.keys() - {"train"}:
        with pytest.raises(SystemExit) as left:
            main([verb, "--help"])
        assert left.value.code == 0
        assert "--help" in capsys.readouterr().out


def test_a_run_leaves_its_configuration_metrics_and_checkpoints(trained):
    run = trained / "run"
    resolved = yaml.safe_load((run / "run.yaml").read_text())
    assert resolved["steps"] == 6 and resolved["model"]["d_model"] == 32
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 6
    assert sorted(p.name for p in run.glob("step-*")) == ["step-00000003", "step-00000006"]


def test_run_yaml_trains_again(trained, capsys, tmp_path):
    code, out, _ = call(
        capsys, "train", "--config", trained / "run" / "run.yaml", "--out", tmp_path / "again", "--steps", 3
    )
    assert code == 0
    code, out, _ = call(capsys, "train", "--config", trained / "run" / "run.yaml", "--print-config", "--steps", 9)
    assert code == 0 and yaml.safe_load(out)["steps"] == 9


def test_eval_of_shards_and_of_a_text(trained, capsys):
    shards = call(capsys, "eval", trained / "run", "--data", trained / "data", "--length", 64, "--json")
    text = call(capsys, "eval", trained / "run", "--text", trained / "text.txt", "--json")
    for code, out, _ in (shards, text):
        assert code == 0
        found = json.loads(out)
        assert 0 < found["bits_per_byte"] < 8
    assert json.loads(text[1])["bytes"] == len(TEXT) - 1  # the first byte has nothing before it


def test_eval_of_a_prefix_model_counts_only_what_it_scores(tmp_path, capsys):
    """The prefix sees itself and is not scored, so its bytes are no part of the divisor."""
    torch.manual_seed(0)
    sizes = {"d_model": 32, "n_layers": 3, "n_heads": 2, "feature_dim": 4, "window": 8, "d_hidden": 48}
    config = JRTConfig(**sizes, linear_layers=(1,), window_layers=(2,), vocab_size=257, prefix_length=32)
    tokenizer, model = ByteTokenizer(), build_model(config)
    made = TokenizerMeta("bytes", tokenizer.name, tokenizer.hash, tokenizer.vocab_size, tokenizer.eos, None)
    write_model(model, ModelCard(config, made), tmp_path, tokenizer)
    (tmp_path / "text.txt").write_text(TEXT[:120])
    code, out, _ = call(capsys, "eval", tmp_path, "--text", tmp_path / "text.txt", "--json")
    ids = torch.tensor([tokenizer.encode(TEXT[:120])])
    with torch.no_grad():
        logits = model(ids, prefix_lengths=torch.tensor([32])).logits[0, 31:-1]
    want = torch.nn.functional.cross_entropy(logits, ids[0, 32:]).item() / math.log(2)
    found = json.loads(out)
    assert code == 0 and found["tokens"] == found["bytes"] == 88
    assert abs(found["bits_per_byte"] - want) < 1e-4


def test_a_stopped_reader_keeps_what_it_read(trained):
    tokenizer, left = ByteTokenizer(), iter([False, False, True])
    (trained / "long.txt").write_text(TEXT * 3)
    stream = TextStream(str(trained / "long.txt"), tokenizer, stopped=lambda: next(left))
    pieces = list(stream)
    assert sum(len(p) for p in pieces) == 2 * PIECE_IDS
    assert bytes(np.concatenate(pieces).tolist()).decode() == (TEXT * 3)[: 2 * PIECE_IDS]


def test_a_text_read_is_a_text_remembered(trained, capsys):
    """generate from the saved state is generate from the text itself."""
    half = TEXT[:3000]
    (trained / "half.txt").write_text(half)
    code, out, _ = call(capsys, "read", trained / "run", trained / "half.txt", "-o", trained / "half.state")
    assert code == 0 and "3,000 tokens" in out
    greedy = ("--temperature", 0, "--max-new-tokens", 12, "--json")
    whole = call(capsys, "generate", trained / "run", half + "Line", *greedy)[1]
    resumed = call(capsys, "generate", trained / "run", "Line", "--state", trained / "half.state", *greedy)[1]
    assert json.loads(whole)["text"] == json.loads(resumed)["text"]


def test_generate_streams_and_saves(trained, capsys):
    saved = trained / "after.state"
    options = ("--max-new-tokens", 5, "--seed", 3)
    code, out, err = call(capsys, "generate", trained / "run", "Line 1", *options, "--save-state", saved)
    assert code == 0 and out.startswith("Line 1") and "state of 11 tokens" in err and saved.exists()
    code, out, _ = call(capsys, "generate", trained / "run", "Line 1", "Line 22", *options)
    assert code == 0 and "--- Line 1\n" in out and "--- Line 22\n" in out


def test_info_and_doctor(trained, capsys):
    code, out, _ = call(capsys, "info", "based_360m", "--json")
    assert code == 0 and json.loads(out)["based_360m"]["parameters"] == 362_620_928
    code, out, _ = call(capsys, "info", trained / "run", "--json")
    assert code == 0 and next(iter(json.loads(out).values()))["parameters"] < 100_000
    code, out, _ = call(capsys, "doctor")
    assert code == 0 and "lightning" in out and "torch" in out


@pytest.mark.parametrize(
    "argv, code, message",
    [
        (["trian"], 2, "unknown verb 'trian'; did you mean 'train'?"),
        (["info", "based_36m"], 2, "did you mean 'based_360m'?"),
        (["train", "nowhere.py"], 2, "nowhere.py: no such file"),
        (["train", "RECIPE", "--clip=-1"], 2, "clip=-1"),
        (["eval", "RUN"], 2, "give one of --data FOLDER, --text FILE and --tasks NAMES"),
        (["eval", "RUN", "--text", "EMPTY"], 2, "holds no text"),
        (["eval", "RUN", "--text", "LATIN"], 2, "not UTF-8 at byte 3"),
        (["eval", "RUN", "--text", "bundled:hamlet"], 2, "no such bundled text"),
        (["eval", "nowhere", "--text", "TEXT"], 2, "nowhere"),
        (["read", "RUN", "nowhere.txt", "-o", "x"], 2, "nowhere.txt: no such file"),
        (["eval", "RUN", "--text", "TEXT", "--length", "0"], 2, "--length 0 must be at least 1"),
        (["train", "RECIPE", "--model.n-heads", "0"], 2, "BasedConfig.n_heads is 0"),
        (["train", "RECIPE", "--model.d-model", "-8"], 2, "BasedConfig.d_model is -8"),
        (["info", "--tokens", "-5"], 2, "--tokens -5"),
        (["generate", "RUN"], 2, "give a prompt"),
        (["generate", "RUN", "x", "--temperature", "-1"], 2, "temperature"),
        (["generate", "nowhere", "x"], 2, "nowhere"),
        (["generate", "RUN", "x", "--state", "EMPTY"], 2, "EMPTY"),
        (["prepare", "EMPTY", "--out", "made"], 2, "EMPTY"),
    ],
)
def test_wrong_requests(trained, capsys, tmp_path, argv, code, message):
    files = {"EMPTY": b"", "LATIN": b"caf\xe9 au lait"}
    for name, content in files.items():
        (tmp_path / f"{name}.txt").write_bytes(content)
    known = {"RUN": trained / "run", "RECIPE": trained / "recipe.py", "TEXT": trained / "text.txt"} | {
        n: tmp_path / f"{n}.txt" for n in files
    }
    try:
        got, _, err = call(capsys, *(known.get(a, a) for a in argv))
    except SystemExit as left:  # tyro's own parser leaves by itself
        got, err = left.code, "".join(capsys.readouterr())
    assert got == code
    assert message in err
    assert "Traceback" not in err
    assert not Path("made").exists()


def test_the_installed_command():
    done = subprocess.run([sys.executable, "-m", "linattn.cli.main", "--version"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip()


def test_bench_takes_its_op_by_place(tmp_path, capsys):
    code, out, _ = call(
        capsys, "bench", "taylor", "--cases", "b1-h2-t64-f4-v8", "--passes", "fwd", "--repeats", 2, "--out", tmp_path
    )
    assert code == 0 and "b1-h2-t64-f4-v8" in out
