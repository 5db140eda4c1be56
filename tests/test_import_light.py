"""`import linattn` stays light: what it may pull in is a list, and how long it may take is a number."""

import json
import subprocess
import sys

HEAVY = {"triton", "transformers", "lm_eval", "fastapi", "uvicorn", "datasets", "pyarrow", "matplotlib", "tokenizers"}


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_imports_nothing_heavy():
    code = "import sys, json, torch; before = set(sys.modules); import linattn, linattn.models, linattn.mixers.taylor; "
    code += "print(json.dumps(sorted({m.split('.')[0] for m in set(sys.modules) - before})))"
    assert set(run(code)) & HEAVY == set()


def test_import_takes_a_third_of_a_second_at_most():
    code = "import json, time, torch; t = time.perf_counter(); import linattn; "
    code += "print(json.dumps(time.perf_counter() - t))"
    assert any(run(code) < 0.3 for _ in range(3))
