"""States on disk: they go on bit by bit, and what is damaged is refused."""

import json
import resource
import struct
from dataclasses import replace

import pytest
import torch
from small_models import BYTES, CONFIGS, DTYPES, KINDS, PROMPTS, greedy, make_model

import linattn.generate.snapshot as snapshot_module
from linattn.generate import GREEDY, generate, load_snapshot, model_hash, prefill, save_snapshot, weights_hash
from linattn.models import Decoder, map_model_state


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_snapshot_goes_on_bit_by_bit(kind, dtype, tmp_path):
    model = make_model(kind, dtype)
    state = prefill(model, PROMPTS).state
    save_snapshot(tmp_path / "a.state", model, state, tokenizer_hash=BYTES.hash, metadata={"title": "Emma ✓"})
    loaded = load_snapshot(tmp_path / "a.state", model, tokenizer_hash=BYTES.hash)
    assert loaded.metadata == {"title": "Emma ✓"} and loaded.tokenizer_hash == BYTES.hash
    assert [type(layer) for layer in loaded.state.layers] == [type(layer) for layer in state.layers]
    map_model_state(lambda a, b: torch.testing.assert_close(a, b, rtol=0, atol=0) or a, loaded.state, state)
    more = [[1, 2, 3]] * len(PROMPTS)
    want, got = prefill(model, more, state=state), prefill(model, more, state=loaded.state)
    assert torch.equal(got.logits, want.logits)
    assert greedy(model, more, state=loaded.state) == greedy(model, more, state=state)
    assert [p.name for p in tmp_path.iterdir()] == ["a.state"]


def test_snapshot_of_one_row_of_a_batch_and_of_a_shared_state(tmp_path):
    model = make_model("transformer")
    result = generate(model, PROMPTS, max_new_tokens=3, sampling=GREEDY, return_state=True)[2]
    save_snapshot(tmp_path / "row.state", model, result.state)
    assert load_snapshot(tmp_path / "row.state", model).state.tokens.tolist() == [40]
    shared = map_model_state(lambda leaf: leaf.expand(3, *leaf.shape[1:]), result.state)
    save_snapshot(tmp_path / "shared.state", model, shared)
    assert load_snapshot(tmp_path / "shared.state", model, "any hash").state.tokens.tolist() == [40] * 3


@pytest.fixture
def saved(tmp_path):
    """A snapshot of the small Based model after PROMPTS."""
    path = tmp_path / "a.state"
    save_snapshot(path, make_model("based"), prefill(make_model("based"), PROMPTS).state, tokenizer_hash=BYTES.hash)
    return path


def split(path):
    """The header of a safetensors file as data, and what follows it."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def join(path, header, data):
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


def test_snapshot_of_another_model_names_both_hashes(saved):
    model, wider = make_model("based"), make_model("jrt")
    with pytest.raises(
        ValueError, match=f"model hash is {model_hash(model)}, .* has {model_hash(wider)}: another arch"
    ):
        load_snapshot(saved, wider)
    other = make_model("based", seed=1)
    assert model_hash(other) == model_hash(model)
    words = f"weights hash is {weights_hash(model)}, .* has {weights_hash(other)}: the same model with other weights"
    with pytest.raises(ValueError, match=words):
        load_snapshot(saved, other)
    with pytest.raises(ValueError, match=f"tokenizer hash is {BYTES.hash}, .* has 0123: other ids"):
        load_snapshot(saved, model, tokenizer_hash="0123")
    with pytest.raises(ValueError, match="weights of torch.float32, and the model given here has torch.float64"):
        load_snapshot(saved, make_model("based", torch.float64))


def test_weights_hash_sees_one_step_of_training():
    model = Decoder(replace(CONFIGS["based"].decoder()))
    before = weights_hash(model), model_hash(model)
    with torch.no_grad():
        model.blocks[1].mixer.proj_q.weight.mul_(1.001)
    assert weights_hash(model) != before[0] and model_hash(model) == before[1]


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1])
def test_snapshot_cut_short_is_refused_before_anything_is_read(saved, keep, monkeypatch):
    raw = saved.read_bytes()
    saved.write_bytes(raw[:keep])
    monkeypatch.setattr(snapshot_module, "load_file", lambda *a, **k: pytest.fail("tensors were read"))
    with pytest.raises(ValueError, match=f"{saved.name}: (cut short|not a safetensors file)"):
        load_snapshot(saved, make_model("based"))


def test_snapshot_that_is_damaged_is_refused_by_its_header(saved, tmp_path, monkeypatch):
    model, (header, data) = make_model("based"), split(saved)
    monkeypatch.setattr(snapshot_module, "load_file", lambda *a, **k: pytest.fail("tensors were read"))

    def refuses(change, words, data=data):
        edited = json.loads(json.dumps(header))
        change(edited)
        join(saved, edited, data)
        with pytest.raises(ValueError, match=words):
            load_snapshot(saved, model)

    def swap(name, **changes):
        return lambda h: h[name].update(changes)

    shape = header["layers.1.S"]["shape"]
    refuses(swap("layers.1.S", shape=[shape[0], shape[2], shape[1], shape[3]]), r"layers.1.S is \[5, 15, 2, 16\]")
    refuses(swap("layers.1.S", shape=[2**40, 2**20, 1, 1]), "contradicts itself")
    refuses(swap("layers.1.S", dtype="I32"), "layers.1.S is torch.int32")
    refuses(swap("layers.1.S", dtype="X8"), "not one of safetensors")
    refuses(swap("tokens", shape=[1, 5]), r"tokens must be \[N\]")
    refuses(lambda h: h.update({"layers.9.S": h.pop("layers.1.S")}), "missing are .*layers.1.S.* unknown are .*9.S")
    refuses(lambda h: h["__metadata__"].update(format="other"), "not a snapshot")
    refuses(lambda h: h["__metadata__"].update(version="7"), "format 7, and this version of linattn reads 1")
    refuses(lambda h: None, "longer than its header says", data=data + b"x")
    saved.write_bytes(b"\x10" + b"\0" * 7 + b"not json at all ")
    with pytest.raises(ValueError, match="not one of safetensors"):
        load_snapshot(saved, model)
    saved.write_bytes(b"some text that is no safetensors file")
    with pytest.raises(ValueError, match="not a safetensors file"):
        load_snapshot(saved, model)
    with pytest.raises(ValueError, match="no such snapshot"):
        load_snapshot(tmp_path / "none.state", model)


@pytest.mark.parametrize(
    "kind, leaf", [("based", "layers.2.count"), ("transformer", "layers.0.count"), ("based", "tokens")]
)
def test_snapshot_with_counts_beyond_its_tensors_is_refused(kind, leaf, tmp_path):
    model, path = make_model(kind), tmp_path / "a.state"
    save_snapshot(path, model, prefill(model, PROMPTS).state)
    header, data = split(path)
    start, end = header[leaf]["data_offsets"]
    join(path, header, data[:start] + b"\xff" * (end - start) + data[end:])
    with pytest.raises(ValueError, match="counts do not fit"):
        load_snapshot(path, model)


def test_snapshot_that_cannot_be_written_leaves_the_old_one_whole(saved):
    model, before = make_model("based"), saved.read_bytes()
    state = prefill(model, PROMPTS).state
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError, match="could not be written .* untouched. It needs [0-9,]+ bytes: free some space"):
            save_snapshot(saved, model, state)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert saved.read_bytes() == before and [p.name for p in saved.parent.iterdir()] == ["a.state"]


def test_snapshot_replaces_a_file_and_does_not_write_into_it(saved):
    model, before = make_model("based"), saved.read_bytes()
    with saved.open("rb") as reader:
        save_snapshot(saved, model, prefill(model, [[1, 2, 3]]).state)
        assert reader.read() == before
    assert load_snapshot(saved, model).state.tokens.tolist() == [3]


def test_snapshot_refuses_to_save_what_it_could_not_load(tmp_path):
    model = make_model("based")
    state = prefill(model, [[1, 2]]).state
    with pytest.raises(ValueError, match="the state to save: not a state of this model"):
        save_snapshot(tmp_path / "a", make_model("transformer"), state)
    with pytest.raises(ValueError, match="there is no folder"):
        save_snapshot(tmp_path / "none" / "a", model, state)
    with pytest.raises(ValueError, match="text by text"):
        save_snapshot(tmp_path / "a", model, state, metadata={"n": 3})
    assert not list(tmp_path.iterdir())
