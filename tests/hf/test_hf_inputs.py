"""`forward`: masks in every form, positions, which logits, and refusals that say what to do."""

import pytest
import torch
from hf_tiny import left_padded, prompts
from transformers.masking_utils import create_masks_for_generate

from linattn.hf import LinattnCache
from linattn.hf.inputs import packed_documents


@pytest.fixture
def padded(model):
    """A batch with pads on the left, in the middle and on the right, and the logits of its rows alone."""
    ids = prompts(3)
    mask = torch.ones(3, 12, dtype=torch.long)
    mask[0, :4] = 0
    mask[1, 5:8] = 0
    mask[2, 7:] = 0
    with torch.no_grad():
        alone = [model(row[real.bool()][None], prefix_length=0).logits[0] for row, real in zip(ids, mask, strict=True)]
    return ids, mask, alone


def real_logits(model, ids, mask, given, **options):
    with torch.no_grad():
        logits = model(ids, attention_mask=given, prefix_length=0, **options).logits
    return [row[real.bool()] for row, real in zip(logits, mask, strict=True)]


@pytest.mark.parametrize("kind", [torch.long, torch.bool, torch.float32])
def test_padding_anywhere_changes_nothing(model, padded, kind):
    ids, mask, alone = padded
    for got, want in zip(real_logits(model, ids, mask, mask.to(kind)), alone, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_masks_by_layer_type_are_the_mask(model, padded):
    ids, mask, alone = padded
    made = create_masks_for_generate(
        config=model.config,
        inputs_embeds=torch.empty(3, 12, 0),
        attention_mask=mask,
        past_key_values=None,
    )
    assert made.keys() == set(model.config.layer_types)
    flat = dict.fromkeys(model.config.layer_types, mask)
    for given in (made, flat):
        for got, want in zip(real_logits(model, ids, mask, given), alone, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    nothing = dict.fromkeys(model.config.layer_types)
    ones = torch.ones_like(mask)
    torch.testing.assert_close(real_logits(model, ids, ones, nothing), real_logits(model, ids, ones, None))


def test_a_mask_covers_these_tokens_or_all(model):
    batch = left_padded([prompts()[0], prompts()[1, :7]])
    more = prompts(2, 4, seed=5)
    columns = torch.cat([batch["attention_mask"], torch.ones(2, 4, dtype=torch.long)], 1)
    columns[1, -4] = 0
    results = []
    for mask in (columns, columns[:, -4:]):
        cache = LinattnCache()
        with torch.no_grad():
            model(**batch, past_key_values=cache)
            results.append(model(more, attention_mask=mask, past_key_values=cache).logits[:, 1:])
        assert cache.state.tokens.tolist() == [16, 10]
        assert cache.get_seq_length() == 16
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_masks_by_layer_type_after_a_cache_are_the_mask(model):
    mask = torch.ones(2, 16, dtype=torch.long)
    mask[1, :3] = 0
    mask[0, 13] = 0
    more = prompts(2, 4, seed=5)
    results = []
    for made in (False, True):
        cache, given = LinattnCache(), mask
        with torch.no_grad():
            model(prompts(), attention_mask=mask[:, :12], past_key_values=cache)
            if made:
                given = create_masks_for_generate(
                    config=model.config,
                    inputs_embeds=torch.empty(2, 4, 0),
                    attention_mask=mask,
                    past_key_values=cache,
                )
            results.append(model(more, attention_mask=given, past_key_values=cache).logits[mask[:, 12:].bool()])
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(2, 11), (3, 12), (2, 1, 12, 12)])
def test_a_mask_of_another_shape_is_refused(model, shape):
    with pytest.raises(ValueError, match=r"attention_mask must be \[B, T\] = \[2, 12\]"):
        model(prompts(), attention_mask=torch.ones(shape))


def test_positions_that_begin_anew_pack_documents(model):
    ids = prompts(2)
    positions = torch.cat([torch.arange(n) for n in (5, 7, 12)]).view(2, 12)
    with torch.no_grad():
        packed = model(ids, position_ids=positions, use_cache=False, prefix_length=0).logits
        for row, start, stop in ((0, 0, 5), (0, 5, 12), (1, 0, 12)):
            alone = model(ids[row : row + 1, start:stop], prefix_length=0).logits[0]
            torch.testing.assert_close(packed[row, start:stop], alone, rtol=0, atol=1e-5)


def test_positions_that_count_on_are_no_news(model):
    ids = prompts()
    with torch.no_grad():
        plain = model(ids, prefix_length=0).logits
        for positions in (torch.arange(12)[None], torch.arange(12).expand(2, 12) + 100):
            torch.testing.assert_close(model(ids, position_ids=positions, prefix_length=0).logits, plain)


@pytest.mark.parametrize(
    "positions, message",
    [
        ([[0, 1, 3, 4]], "count up by one"),
        ([[0, 1, 0, 0], [0, 1, 1, 2]], "count up by one"),
        ([[0, 1, 2]], r"must be \[B, T\] = \[2, 4\]"),
    ],
)
def test_positions_that_mean_nothing_here_are_refused(positions, message):
    with pytest.raises(ValueError, match=message):
        packed_documents(torch.tensor(positions), torch.Size((2, 4)), None, False)


def test_packing_goes_with_neither_pads_nor_a_cache():
    positions, shape = torch.tensor([[0, 1, 0, 1]]), torch.Size((1, 4))
    assert packed_documents(positions, shape, None, False).tolist() == [0, 2, 4]
    for mask, cached in ((None, True), (torch.tensor([[True, True, True, False]]), False)):
        with pytest.raises(ValueError, match="neither pads nor a cache"):
            packed_documents(positions, shape, mask, cached)


def test_packing_goes_with_no_cache_that_is_empty_either(model):
    """It would hold a row a document, where the next call has one a row of the batch."""
    ids = prompts()
    positions = torch.arange(ids.shape[1]) % (ids.shape[1] // 2)
    with pytest.raises(ValueError, match="neither pads nor a cache"):
        model(ids, position_ids=positions.expand(ids.shape), past_key_values=LinattnCache())


def test_vectors_are_not_taken_for_tokens(model):
    with pytest.raises(ValueError, match=r"input_ids must be int64 \[B, T\], got torch.float32; give vectors as"):
        model(torch.randn(2, 4, model.config.hidden_size))


def test_logits_to_keep(model):
    ids = prompts()
    with torch.no_grad():
        whole = model(ids, prefix_length=0).logits
        assert torch.equal(model(ids, prefix_length=0, logits_to_keep=0).logits, whole)
        some = model(ids, prefix_length=0, logits_to_keep=torch.tensor([3, 7])).logits
        last = model(ids, prefix_length=0, logits_to_keep=2).logits
    assert whole.shape == (2, 12, 257)
    torch.testing.assert_close(some, whole[:, [3, 7]])
    torch.testing.assert_close(last, whole[:, -2:])


def test_return_dict_and_use_cache(model):
    with torch.no_grad():
        out = model(prompts(), use_cache=False, return_dict=False)
        assert len(out) == 1
        assert model(prompts(), use_cache=False).past_key_values is None
        assert isinstance(model(prompts()).past_key_values, LinattnCache)


def test_what_is_not_there_is_refused(model):
    with pytest.raises(ValueError, match="output_attentions is not supported.*no attention matrix"):
        model(prompts(), output_attentions=True)
    with pytest.raises(TypeError, match="attention_masc"):
        model(prompts(), attention_masc=None)
    with pytest.raises(ValueError, match="cannot be resized to 300"):
        model.resize_token_embeddings(300)
    with pytest.raises(ValueError, match="token id 257 is outside 0 to 256"):
        model(torch.tensor([[257]]))
