"""Runs that are interrupted and go on, bit by bit."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_runs import BASED, lines_of, run_quietly, same_files, some_config, some_text

from linattn.core.config import to_data
from linattn.data import prepare
from linattn.train import NextToken, TrainingStopped, loop, weights


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The configuration of a run that is never stopped, and its folder. Tests copy what they change."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    config = some_config(data, tmp_path_factory.mktemp("whole") / "run")
    run_quietly(config)
    torch.set_num_threads(threads)
    return config, Path(config.out)


def test_resume_after_kill_9_is_bit_equal(whole, tmp_path):
    config, folder = whole
    config = replace(config, out=str(tmp_path / "killed"))
    (tmp_path / "config.json").write_text(json.dumps(to_data(config)))
    script = """
        import json, sys, time, torch
        torch.set_num_threads(1)
        from linattn.core.config import from_data
        from linattn.train import TrainConfig, loop, train
        step = loop._gradients
        def slow(*args):
            time.sleep(0.1)  # so that the signal comes in mid-run
            return step(*args)
        loop._gradients = slow
        train(from_data(TrainConfig, json.load(open(sys.argv[1]))))
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "config.json")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    log, deadline = tmp_path / "killed" / "metrics.jsonl", time.monotonic() + 120
    while not (log.exists() and '"step": 6' in log.read_text()):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    left = weights.checkpoints(tmp_path / "killed")
    assert [p.name for p in left] == ["step-00000004"]
    run_quietly(config)
    assert lines_of(config.out) == lines_of(folder)
    for step in (8, 12):
        assert same_files(tmp_path / "killed" / f"step-{step:08d}", folder / f"step-{step:08d}")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_saves_and_resume_is_bit_equal(whole, tmp_path, number, monkeypatch):
    config, folder = whole
    config = replace(config, out=str(tmp_path / "stopped"))
    step = loop._gradients

    def interrupted(run, *args):
        if run.progress.step == 4:
            os.kill(os.getpid(), number)
        return step(run, *args)

    monkeypatch.setattr(loop, "_gradients", interrupted)
    before = signal.getsignal(number)
    with pytest.raises(TrainingStopped, match=r"Stopped by (Ctrl-C|SIGTERM) after step 5 of 12") as stopped:
        run_quietly(config)
    assert stopped.value.exit_code == 1
    assert signal.getsignal(number) is before
    monkeypatch.undo()
    assert [p.name for p in weights.checkpoints(Path(config.out))] == ["step-00000004", "step-00000005"]
    run_quietly(config)
    assert lines_of(config.out) == lines_of(folder)
    assert same_files(Path(config.out) / "step-00000012", folder / "step-00000012")


def test_a_run_that_went_on_elsewhere_names_the_command_that_goes_on(whole, tmp_path, monkeypatch):
    config, folder = whole
    config = replace(config, out=str(tmp_path / "elsewhere"))
    step = loop._gradients

    def interrupted(run, *args):
        if run.progress.step == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return step(run, *args)

    monkeypatch.setattr(loop, "_gradients", interrupted)
    first = str(folder / "step-00000004")
    with pytest.raises(TrainingStopped, match="and the same command with --resume auto goes on from there"):
        run_quietly(config, resume=first)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="already holds step-00000007"):
        run_quietly(config, resume=first)
    run_quietly(config, resume="auto")
    assert same_files(Path(config.out) / "step-00000012", folder / "step-00000012")


def test_signal_during_evaluation_is_heard_and_the_evaluation_made_up(whole, tmp_path, monkeypatch):
    config, folder = whole
    config = replace(config, out=str(tmp_path / "stopped"))
    measure = loop.evaluate

    def interrupted(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        return measure(*args, **kwargs)

    monkeypatch.setattr(loop, "evaluate", interrupted)
    with pytest.raises(TrainingStopped, match="after step 4 of 12"):
        run_quietly(config)
    monkeypatch.undo()
    run_quietly(config)
    assert lines_of(config.out) == lines_of(folder)


def test_a_run_in_another_thread_leaves_signals_alone(config):
    with ThreadPoolExecutor() as pool:
        assert pool.submit(run_quietly, replace(config, steps=4)).result()["step"] == 4


def test_stateful_resume_is_bit_equal(config, tmp_path):
    config = replace(config, stateful=True, micro_batch=2)
    whole, stopped = replace(config, out=str(tmp_path / "a")), replace(config, out=str(tmp_path / "b"))
    run_quietly(whole)
    run_quietly(replace(stopped, out=str(tmp_path / "c")))
    run_quietly(stopped, resume=str(tmp_path / "c" / "step-00000004"))
    assert (tmp_path / "a" / "step-00000012" / "state.safetensors").exists()
    assert same_files(tmp_path / "a" / "step-00000012", tmp_path / "b" / "step-00000012")


def test_resume_may_change_the_length_of_the_run_but_not_what_the_position_means(whole, tmp_path):
    config, folder = whole
    config = replace(config, out=str(tmp_path / "run"))
    shutil.copytree(folder, config.out)
    assert run_quietly(replace(config, steps=14))["step"] == 14
    for change, message in (
        ({"length": 16}, "was trained with length=24, not length=16"),
        ({"seed": 6}, "seed=5, not seed=6"),
        ({"model": replace(BASED, window=7)}, r"model=BasedConfig\(window=5\), not model=BasedConfig\(window=7\)"),
        ({"objective": NextToken(reset_documents=False)}, "reset_documents=True"),
    ):
        with pytest.raises(ValueError, match=message):
            run_quietly(replace(config, **change))
    (tmp_path / "a.txt").write_text(some_text(500))
    prepare([tmp_path / "a.txt"], tmp_path / "other")
    with pytest.raises(ValueError, match="was trained on other text"):
        run_quietly(replace(config, data=str(tmp_path / "other")))
    with pytest.raises(ValueError, match="already holds step-00000014"):
        run_quietly(config, resume="never")
    with pytest.raises(ValueError, match=r"holds no train.json"):
        run_quietly(config, resume=str(tmp_path))
    with pytest.raises(
        ValueError, match=r"already holds step-00000014; .* give another out to go on from .*step-00000008"
    ):
        run_quietly(config, resume=str(tmp_path / "run" / "step-00000008"))
