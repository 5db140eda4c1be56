"""Imports point down, lazy ones included. The table is docs/architecture.md, section 3; any other arrow fails."""

import ast
from pathlib import Path

import pytest

import linattn

ALLOWED = {
    "core": set(),
    "nn": {"core"},
    "data": {"core"},
    "distributed": {"core"},
    "mixers": {"core", "nn"},
    "models": {"core", "nn", "mixers"},
    "generate": {"core", "data", "models"},
    "hf": {"core", "data", "models"},
    "train": {"core", "nn", "data", "distributed", "models", "generate"},
    "tasks": {"core", "nn", "mixers", "data", "models", "generate", "train", "hf"},
    "bench": {"core", "nn", "mixers", "data", "distributed", "models", "generate", "train"},
    "serve": {"core", "data", "models", "generate", "hf"},
    "cli": {"core", "mixers", "data", "models", "generate", "hf", "train", "tasks", "bench", "serve"},
}
ROOT = Path(linattn.__file__).parent
FILES = sorted(p for p in ROOT.rglob("*.py") if p.parent != ROOT)
MIXERS = sorted(p.parent.name for p in ROOT.glob("mixers/*/__init__.py"))


def uses(mixer):
    """The mixers that this one declares it stands on: USES in its __init__.py."""
    for node in ast.parse((ROOT / "mixers" / mixer / "__init__.py").read_text()).body:
        if isinstance(node, ast.Assign) and [t.id for t in node.targets if isinstance(t, ast.Name)] == ["USES"]:
            return set(ast.literal_eval(node.value))
    return set()


def imported(path, text=None):
    """Every dotted name of ours that a file imports, anywhere in it, as lists of parts below linattn."""
    package = ["linattn", *path.relative_to(ROOT).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text() if text is None else text)):
        names = []
        if isinstance(node, ast.Import):
            names = [a.name.split(".") for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            names = [[*base, a.name] for a in node.names]
        yield from (n[1:] for n in names if n[0] == "linattn" and len(n) > 1)


def wrong_arrows(path, text=None):
    part, *rest = path.relative_to(ROOT).parts
    wrong = []
    for to, *below in imported(path, text):
        if path.name == "reference.py":
            wrong.append(f"a reference is the definition and imports nothing of ours, not {to}")
        elif part == to == "mixers":
            if len(rest) > 1 and below and below[0] in MIXERS and below[0] not in {rest[0], *uses(rest[0])}:
                wrong.append(f"{rest[0]} uses {below[0]}: declare it in USES, or move what they share down")
        elif to != part and to in ALLOWED and to not in ALLOWED[part]:
            wrong.append(f"{part} may not import {to}; it may import {sorted(ALLOWED[part])}")
    return wrong


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    assert wrong_arrows(path) == []


def test_the_check_sees_every_kind_of_import():
    path = ROOT / "core" / "mixer.py"
    planted = [
        "import linattn.nn",
        "from linattn import nn",
        "from linattn.nn.norm import RMSNorm",
        "from ..nn import norm",
        "def f():\n    from linattn.models import based",
    ]
    for text in planted:
        assert len(wrong_arrows(path, text)) == 1, text
    assert wrong_arrows(ROOT / "mixers" / "window" / "layer.py", "from linattn.mixers.taylor import combine") != []
    assert wrong_arrows(ROOT / "mixers" / "taylor" / "reference.py", "from linattn.core import shapes") != []


def test_every_part_is_in_the_table():
    parts = {p.relative_to(ROOT).parts[0] for p in FILES}
    assert parts <= ALLOWED.keys()


@pytest.mark.parametrize("graph", [ALLOWED, {m: uses(m) for m in MIXERS}], ids=["parts", "mixers"])
def test_no_cycles(graph):
    done = set()
    while len(done) < len(graph):
        ready = {k for k, v in graph.items() if k not in done and v & graph.keys() <= done}
        assert ready, f"a cycle among {sorted(set(graph) - done)}"
        done |= ready


def test_the_table_is_the_documents(request):
    """docs/architecture.md prints the same table."""
    page = (request.config.rootpath / "docs" / "architecture.md").read_text()
    rows = [r.split("|")[1:3] for r in page.split("| part | may import |")[1].splitlines()[2:] if r.startswith("|")]
    names = {n.strip(): may for parts, may in rows for n in parts.split(",")}
    assert names.keys() == ALLOWED.keys()
    for part, may in names.items():
        words = set(may.replace(",", " ").replace(";", " ").split())
        want = set() if part == "core" else ALLOWED[part]
        if part == "cli":  # "everything above but nn, distributed"
            want = {"nn", "distributed"}
        assert want <= words, (part, want - words)


def test_no_assertion_stands_under_an_if():
    """An `if` in a test can turn its assertions off; nothing would show."""
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        hidden = [
            inner.lineno
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.If)
            for inner in ast.walk(node)
            if isinstance(inner, ast.Assert)
        ]
        assert hidden == [], path
