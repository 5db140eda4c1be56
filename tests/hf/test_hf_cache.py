"""`LinattnCache`: a model's States with the manners of transformers' caches."""

import copy
import pickle

import pytest
import torch
from hf_tiny import GREEDY, prompts

from linattn.generate import load_snapshot, save_snapshot
from linattn.hf import LinattnCache


@pytest.fixture
def cache(model):
    with torch.no_grad():
        return model(prompts(), past_key_values=LinattnCache()).past_key_values


def following(model, cache, rows=2):
    with torch.no_grad():
        return model(prompts(rows, 3, seed=7), past_key_values=copy.deepcopy(cache)).logits


def test_it_counts_columns_and_rows(cache):
    assert (cache.get_seq_length(), cache.batch_size, cache.get_max_length()) == (12, 2, -1)
    assert cache.get_mask_sizes(3, 0) == (15, 0)
    assert cache.has_previous_state()
    assert cache.is_initialized
    assert not cache.is_compileable
    assert not cache.is_croppable
    assert "rows=2, columns=12" in repr(cache)


def test_only_softmax_grows(model, cache):
    with torch.no_grad():
        longer = model(prompts(2, 200)).past_key_values
    if "full_attention" in model.config.layer_types:
        longer.state = None  # keys and values of every token: no promise
        cache.state = None
    assert longer.nbytes() == cache.nbytes()


def test_rows_can_be_chosen_repeated_and_reordered(model, cache):
    want = following(model, cache)
    chosen = copy.deepcopy(cache)
    chosen.batch_select_indices(torch.tensor([1, 0]))
    with torch.no_grad():
        swapped = model(prompts(2, 3, seed=7).flip(0), past_key_values=chosen).logits
    torch.testing.assert_close(swapped.flip(0), want, rtol=0, atol=1e-5)
    repeated = copy.deepcopy(cache)
    repeated.batch_repeat_interleave(2)
    with torch.no_grad():
        doubled = model(prompts(2, 3, seed=7).repeat_interleave(2, 0), past_key_values=repeated).logits
    torch.testing.assert_close(doubled[::2], want, rtol=0, atol=1e-5)
    reordered = copy.deepcopy(cache)
    reordered.reorder_cache(torch.tensor([0, 0]))
    assert torch.equal(reordered.state.layers[0][0][1], cache.state.layers[0][0][0])


def test_reset_is_a_new_cache(model, cache):
    cache.reset()
    assert (cache.get_seq_length(), cache.batch_size, cache.nbytes()) == (0, -1, 0)
    torch.testing.assert_close(following(model, cache), following(model, LinattnCache()))


def test_it_pickles(model, cache):
    # plain data of our own making
    torch.testing.assert_close(following(model, pickle.loads(pickle.dumps(cache))), following(model, cache))  # noqa: S301


def test_it_refuses_what_a_state_cannot_do(cache):
    cache.crop(0)
    with pytest.raises(ValueError, match="cannot forget tokens"):
        cache.crop(-2)
    with pytest.raises(ValueError, match="takes no keys and values"):
        cache.update(None, None, 0)


def test_a_cache_is_a_snapshot_of_linattn(model, tmp_path):
    ids = prompts(1, 16)
    with torch.no_grad():
        cache = model(ids[:, :12], past_key_values=LinattnCache()).past_key_values
    save_snapshot(tmp_path / "read.state", model.model, cache.state, "none")
    again = LinattnCache(load_snapshot(tmp_path / "read.state", model.model, "none").state)
    assert again.get_seq_length() == 12
    texts = [model.generate(ids, past_key_values=c, max_new_tokens=4, **GREEDY) for c in (cache, again)]
    assert torch.equal(*texts)
