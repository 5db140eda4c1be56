"""The README and docs/ are true: their Python runs, the README's commands run, and the tree and links exist."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from linattn.cli.main import VERBS, main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SHORTER = {
    "train": ["--steps", "3", "--schedule.warmup-steps", "1", "--batch", "2", "--length", "64", "--eval-length", "64"],
    "generate": ["--max-new-tokens", "4"],
    "eval": ["--length", "512"],
}
"""Added to the README's commands, so that they run in seconds here."""


def commands():
    return [line.split("#")[0].strip() for line in re.findall(r"^    (linattn .*)$", README, re.M)]


def test_python_runs(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.startswith("[")


def test_commands_run(tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers")  # one of them exports
    book = "Call me Ishmael. Some years ago, never mind how long precisely, having little or no money in my purse.\n"
    (tmp_path / "book.txt").write_text(book * 300)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.syspath_prepend(ROOT / "tests" / "hf")
    write_released(tmp_path / "released")
    monkeypatch.chdir(tmp_path)
    ran = []
    for command in commands():
        verb, *rest = shlex.split(command)[1:]
        if "--text" in rest:  # the whole of Moby Dick is for the demo
            rest[rest.index("--text") + 1] = "book.txt"
        if verb == "convert":  # there is no network here
            rest[0] = "released"
        assert main([verb, *rest, *SHORTER.get(verb, [])]) == 0, command
        ran.append(verb)
    assert ran == ["prepare", "train", "eval", "read", "generate", "export", "convert", "info", "doctor"]
    assert set(ran) < VERBS.keys()


def test_the_tree_exists():
    tree = README.split("## Where things are")[1].split("## ")[0]
    for name in re.findall(r"^\s{4,8}([a-z]+)/", tree, re.M):
        folder = ROOT / name if (ROOT / name).exists() else ROOT / "src" / "linattn" / name
        assert folder.is_dir() or name == "src", name
    for path in re.findall(r"[\w/]+\.py\b", README):
        assert (ROOT / path).exists() or any(ROOT.rglob(path.split("/")[-1])), path


def test_links_and_pictures_exist():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_it_is_short():
    assert len(README.splitlines()) <= 150


def blocks(page):
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.S)


def write_released(folder):
    """A checkpoint in the published format of Based, tiny and random."""
    import published_tables

    config = published_tables.based_config(
        d=24, layers=5, heads=2, linear=(1, 4), window=(2,), feature_dim=4, window_size=8, vocab=37
    )
    weights = {name: torch.randn(shape) for name, shape in published_tables.based_shapes(config).items()}
    weights["lm_head.weight"] = weights["transformer.embeddings.word_embeddings.weight"].clone()
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors")


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda p: p.name)
def test_the_documentation_runs(page, tmp_path, monkeypatch):
    """The blocks of a page are one session, from top to bottom, in a folder that has a checkpoint to convert."""
    if "linattn.hf" in page.read_text():
        pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(ROOT / "tests" / "hf")
    write_released(tmp_path / "checkpoints" / "released")
    monkeypatch.chdir(tmp_path)
    session = {}
    for code in blocks(page):
        exec(compile(code, page.name, "exec"), session)


def test_the_quickstart_has_blocks_to_run():
    assert len(blocks(ROOT / "docs" / "quickstart.md")) == 5
