"""Checkpoints, and what is whole after a full disk, a NaN or a damaged record."""

import errno
import itertools
import json
import math
import os
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_runs import lines_of, run_quietly, same_files

from linattn.core import files
from linattn.train import TrainingStopped, checkpoint, load_model, loop, metrics, weights


def test_checkpoint_holds_what_it_says_and_old_ones_go(config):
    run_quietly(replace(config, keep_checkpoints=2))
    folder = Path(config.out)
    assert [p.name for p in weights.checkpoints(folder)] == ["step-00000008", "step-00000012"]
    names = {p.name for p in (folder / "step-00000012").iterdir()}
    assert names == {"model.safetensors", "config.json", "optimizer.safetensors", "train.json", "run.yaml"}
    moments = load_file(folder / "step-00000012" / "optimizer.safetensors")
    parameters = load_file(folder / "step-00000012" / "model.safetensors")
    assert set(moments) == {f"{n}.{m}" for n in parameters for m in ("exp_avg", "exp_avg_sq", "step")}
    assert {float(v) for n, v in moments.items() if n.endswith(".step")} == {12.0}
    record = json.loads((folder / "step-00000012" / "train.json").read_text())
    assert record["progress"]["position"] == 12 * 4
    assert record["versions"]["torch"] == str(torch.__version__)


def test_disk_full_leaves_the_checkpoint_before_whole(config, monkeypatch):
    saved, write = [], checkpoint.write_tensors

    def full(path, tensors):
        saved.append(path)
        if len(saved) > 3:  # in mid-checkpoint: its weights are written, its optimizer is not
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(path, tensors)

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    monkeypatch.setattr(weights, "write_tensors", full)
    message = r"checkpoint of step 8 could not be written .*No space left.*step-00000004 is whole. Free some space"
    with pytest.raises(TrainingStopped, match=message):
        run_quietly(config)
    monkeypatch.undo()
    assert [p.name for p in Path(config.out).glob("*step-*")] == ["step-00000004"]
    load_model(config.out)
    assert run_quietly(config)["step"] == 12


def test_disk_full_is_an_os_error_from_safetensors_too(tmp_path):
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            weights.write_tensors(tmp_path / "a", {"a": torch.zeros(500_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_weights_can_be_read_by_whom_the_umask_allows(tmp_path):
    weights.write_tensors(tmp_path / "a", {"a": torch.zeros(5)})
    (tmp_path / "b").touch()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_checkpoint_holds_the_random_numbers(config):
    run, _ = loop._open_run(config, "auto")
    Path(config.out).mkdir()
    path = checkpoint.save_checkpoint(run)
    want = torch.rand(3)
    torch.manual_seed(99)
    checkpoint.load_checkpoint(path, run)
    assert torch.equal(torch.rand(3), want)


def test_checkpoint_of_one_step_can_be_written_twice(config):
    run, _ = loop._open_run(config, "auto")
    Path(config.out).mkdir()
    path = checkpoint.save_checkpoint(run)
    with torch.no_grad():
        run.model.norm.weight.fill_(2.0)
    assert checkpoint.save_checkpoint(run) == path
    assert float(load_file(path / "model.safetensors")["norm.weight"].mean()) == 2.0
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def poison(monkeypatch, step, micros=2):
    """Make the loss of the last micro-batch of update ``step`` no number, once."""
    sums, calls = loop.term_sums, itertools.count(1)

    def poisoned(*args):
        found, state = sums(*args)
        if next(calls) == micros * step:
            found["next_token"] = found["next_token"] * math.nan
        return found, state

    monkeypatch.setattr(loop, "term_sums", poisoned)


@pytest.mark.parametrize("step, samples", [(6, "22 to 23"), (5, "18 to 19"), (1, "2 to 3")])
@pytest.mark.parametrize("stateful", [False, True])
def test_nan_saves_the_run_before_the_update_and_the_same_command_goes_on(config, monkeypatch, step, samples, stateful):
    config = replace(config, micro_batch=2, stateful=stateful)
    poison(monkeypatch, step)
    path = Path(config.out) / f"step-{step - 1:08d}"
    where = f"rows 2 to 3 of stream position {step - 1}" if stateful else rf"samples {samples} \(seed 5\)"
    message = (
        rf"loss is nan at step {step}, on {where}. Lower optimizer.lr, .* then the same command goes on from {path}"
    )
    with pytest.raises(TrainingStopped, match=message):
        run_quietly(config)
    monkeypatch.undo()
    assert weights.checkpoints(Path(config.out))[-1] == path
    assert not list(Path(config.out).glob("nan*"))
    run_quietly(config)
    whole = replace(config, out=config.out + "2")
    run_quietly(whole)
    assert lines_of(config.out) == lines_of(whole.out)
    assert same_files(Path(config.out) / "step-00000012", Path(whole.out) / "step-00000012")


def test_nan_again_after_going_on_leaves_the_checkpoint_alone(config, monkeypatch):
    poison(monkeypatch, 6, micros=1)
    with pytest.raises(TrainingStopped, match="at step 6"):
        run_quietly(config)
    monkeypatch.undo()
    poison(monkeypatch, 1, micros=1)  # the first update of what goes on from there
    monkeypatch.setattr(loop, "save_checkpoint", lambda run: pytest.fail("there already"))
    with pytest.raises(TrainingStopped, match=r"at step 6, on samples 20 to 23 .*goes on from .*step-00000005"):
        run_quietly(config)


def test_nan_on_a_full_disk_names_the_nan_first(config, monkeypatch):
    poison(monkeypatch, 6, micros=1)
    save = loop.save_checkpoint

    def full(run):
        if run.progress.step == 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return save(run)

    monkeypatch.setattr(loop, "save_checkpoint", full)
    message = r"^The loss is nan at step 6, on .* step 5 could not be written .*No space.*step-00000004 is whole.*lower"
    with pytest.raises(TrainingStopped, match=message):
        run_quietly(config)


def test_nan_in_a_gradient_alone_stops_too(config, monkeypatch):
    monkeypatch.setattr(loop.nn.utils, "clip_grad_norm_", lambda *args: torch.tensor(math.inf))
    with pytest.raises(TrainingStopped, match="gradient norm is inf at step 1, on samples 0 to 3 "):
        run_quietly(replace(config, micro_batch=2))


def full_disk(*args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_at_a_line_of_metrics_stops_with_what_is_whole(config, monkeypatch):
    write = metrics.JsonLog.write

    def full(log, step, values):
        if step == 6:
            log._file.write(b'{"step": 6, "lo')
            log._file.close()
            log._file = types.SimpleNamespace(write=full_disk, close=full_disk)
        write(log, step, values)

    monkeypatch.setattr(metrics.JsonLog, "write", full)
    message = (
        r"metrics of step 6 could not be written .*No space.*metrics.jsonl.*step-00000004 is whole. Free some space"
    )
    with pytest.raises(TrainingStopped, match=message):
        run_quietly(config)
    monkeypatch.undo()
    whole = replace(config, out=config.out + "2")
    assert run_quietly(config)["step"] == run_quietly(whole)["step"] == 12
    assert lines_of(config.out) == lines_of(whole.out)


@pytest.mark.parametrize("at", ["checkpoint", "metrics"])
def test_a_full_disk_at_the_start_leaves_the_run_as_it_was(config, monkeypatch, at):
    run_quietly(replace(config, steps=4))
    before = {name: (Path(config.out) / name).read_text() for name in ("run.yaml", "metrics.jsonl")}
    monkeypatch.setattr(files.os, "fsync", full_disk)
    other = {"checkpoint": files.write_text, "metrics": lambda path, text: None}[at]
    monkeypatch.setattr(checkpoint, "write_text", other)
    name = {"checkpoint": "run.yaml", "metrics": "metrics.jsonl"}[at]
    with pytest.raises(TrainingStopped, match=rf"run's folder .*No space.*{name}.*step-00000004 is whole. Free some"):
        run_quietly(config)
    assert {name: (Path(config.out) / name).read_text() for name in before} == before
    assert not list(Path(config.out).glob("*.partial"))


def test_a_logger_that_cannot_be_closed_is_told_unless_something_else_ended_the_run(config, monkeypatch):
    close = metrics.JsonLog.close
    monkeypatch.setattr(metrics.JsonLog, "close", lambda log: full_disk(close(log)))
    with pytest.raises(TrainingStopped, match=r"last metrics could not be written .*step-00000004 is whole"):
        run_quietly(replace(config, steps=4))
    poison(monkeypatch, 2, micros=1)
    with pytest.raises(TrainingStopped, match="loss is nan at step 2"):
        run_quietly(replace(config, out=config.out + "2"))


def test_write_text_leaves_what_was_there(tmp_path, monkeypatch):
    files.write_text(tmp_path / "a", "é")
    assert (tmp_path / "a").read_bytes() == "é".encode()
    monkeypatch.setattr(files.os, "fsync", full_disk)
    with pytest.raises(OSError, match=r"No space left on device: '.*/a'$"):
        files.write_text(tmp_path / "a", "other")
    assert (tmp_path / "a").read_text() == "é"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda r: r.update(rng={}), r"rng.cpu is missing"),
        (lambda r: r["rng"].update(cpu=r["rng"]["cpu"][:40]), r"rng.cpu has 30 bytes, a generator's state has"),
        (lambda r: r["rng"].update(cpu="%%%"), r"rng.cpu is missing or no base64"),
        (lambda r: r["rng"].update(cpu=7), r"rng.cpu is missing or no base64"),
        (lambda r: r["rng"].update(cpu="/" * len(r["rng"]["cpu"][:-2]) + "=="), r"rng"),
        (lambda r: r["progress"].update(position=-1), r"progress.position=-1 must be"),
        (lambda r: r["progress"].update(step=-3), r"progress.step=-3 must be"),
        (lambda r: r["progress"].update(tokens=-3), r"progress.tokens=-3 must be"),
        (lambda r: r["progress"].update(seconds=math.nan), r"progress.seconds=nan must be"),
        (lambda r: r["progress"].update(window={"next_token": "x"}), r"progress.window.next_token='x' is no number"),
        (lambda r: r["config"].update(batch=0), r"batch=0 must be at least 1"),
        (lambda r: r.pop("progress"), r"Record needs \['progress'\]"),
    ],
)
def test_a_damaged_record_is_one_clear_error(config, change, message):
    run_quietly(replace(config, steps=4))
    path = Path(config.out) / "step-00000004" / "train.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=message) as error:
        run_quietly(config)
    assert str(path) in str(error.value)
