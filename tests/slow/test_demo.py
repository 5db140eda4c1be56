"""The demo as a user runs it: below unigrams, trigrams and xz on the same text, a novel read in constant memory."""

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow


def test_the_whole_demo(tmp_path):
    command = [sys.executable, "-m", "linattn.cli.main", "demo", "--out", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(os.cpu_count()), "GOMP_SPINCOUNT": "1000"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["based"] < min(found["unigram"], found["trigram"], found["xz"], found["xz_after_training_text"])
    assert found["novel_tokens"] > 1_000_000
    assert found["kv_cache_bytes"] > 100 * found["state_bytes"]
    assert found["end_speed"] > found["start_speed"] / 2
    assert (tmp_path / "memory.png").stat().st_size > 10_000
