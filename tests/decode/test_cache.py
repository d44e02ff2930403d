"""KVCache over turns, interruptions and transformers' own generation."""

import pytest
import torch
from decoders import PAD, padded, prompt, tiny
from transformers import DynamicCache, StaticCache

import fastft
from fastft.decode.cache import KVCache
from fastft.decode.cache_name import NAMES, own_name


@pytest.fixture(scope="module")
def llama():
    return tiny("llama")


@pytest.mark.parametrize("name", NAMES)
def test_either_name_is_taken_and_the_output_has_transformers_own(llama, name):
    ids, cache = prompt(2, 6), KVCache(3)
    theirs = llama.generate(ids, max_new_tokens=4, return_dict_in_generate=True)
    for inputs, given in ((ids, {name: cache}), ({"input_ids": ids, name: cache}, {})):
        ours = fastft.generate(llama, inputs, max_new_tokens=4, **given)
        assert ours.stats.path == "decoder_layer"
        assert list(ours) == [*theirs, "stats"] and ours[own_name()] is cache
    out = fastft.generate(llama, ids, max_new_tokens=4, **{name: DynamicCache()})
    assert out.stats.reason == "a cache of type DynamicCache"  # not an argument nobody knows
    for new in fastft.stream(llama, ids, max_new_tokens=7, **{name: cache}):
        assert len(new) == 2
    assert max(cache.lengths) > 9
    with pytest.raises(TypeError, match="cache and as past_key_values"):
        fastft.generate(llama, ids, **dict.fromkeys(NAMES, cache))


def turns(model, **kwargs):
    """The second turn of a chat, with the cache of the first and without."""
    x, cache = padded([7, 4]), KVCache(3)
    first = fastft.generate(model, x, max_new_tokens=8, cache=cache, **kwargs)
    assert first[own_name()] is cache and min(cache.lengths) > 4
    more = prompt(2, 5, seed=7)
    mask = torch.cat((x["attention_mask"], (first.sequences[:, 7:] != PAD).long()), 1)
    mask = torch.cat((mask, torch.ones_like(more)), 1)
    y = {"input_ids": torch.cat((first.sequences, more), 1), "attention_mask": mask}
    ours = fastft.generate(model, y, max_new_tokens=8, cache=cache, **kwargs)
    return ours, fastft.generate(model, y, max_new_tokens=8)


@pytest.mark.parametrize("speculation", [None, "prompt_lookup", "itself"])
def test_a_second_turn_equals_one_call(llama, speculation, every_draft):
    drafts = llama if speculation == "itself" else speculation
    ours, whole = turns(llama, speculation=drafts)
    assert torch.equal(ours.sequences, whole.sequences)


def test_the_cache_is_read_not_computed_again(llama):
    cache, ids = KVCache(3), prompt(1, 6)
    fastft.generate(llama, ids, max_new_tokens=4, cache=cache)
    longer = torch.cat((ids, prompt(1, 3, seed=2)), 1)
    for layer in cache.layers:
        layer.values[:, :, :6] += 1.0
    changed = fastft.generate(llama, longer, max_new_tokens=8, cache=cache)
    assert not torch.equal(
        changed.sequences, fastft.generate(llama, longer, max_new_tokens=8).sequences
    )


def test_only_what_the_input_begins_with_is_kept(llama):
    cache, ids = KVCache(3), prompt(2, 9)
    fastft.generate(llama, ids, max_new_tokens=5, cache=cache)
    for other in (ids, ids[:, :4], torch.cat((ids[:, :6], prompt(2, 5, seed=3)), 1), ids.flip(0)):
        ours = fastft.generate(llama, other, max_new_tokens=5, cache=cache)
        want = fastft.generate(llama, other, max_new_tokens=5)
        assert torch.equal(ours.sequences, want.sequences)


@pytest.mark.parametrize("where", ["streamer", "criterion", "processor"])
@pytest.mark.parametrize("speculation", [None, "prompt_lookup", "itself"])
def test_a_cache_is_whole_after_an_interruption(llama, where, speculation, every_draft):
    drafts = llama if speculation == "itself" else speculation
    x, calls = padded([7, 4]), []

    def interrupt(*args, **kwargs):
        calls.append(0)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return torch.zeros(len(args[0]), dtype=torch.bool) if where == "criterion" else args[-1]

    class Streamer:
        put = interrupt

        def end(self):
            pass

    given = {
        "streamer": {"streamer": Streamer()},
        "criterion": {"stopping_criteria": [interrupt]},
        "processor": {"logits_processor": [interrupt]},
    }[where]
    whole = fastft.generate(llama, x, max_new_tokens=12)
    cache = KVCache(3)
    with pytest.raises(KeyboardInterrupt):
        fastft.generate(llama, x, max_new_tokens=12, cache=cache, speculation=drafts, **given)
    assert [len(t) for t in cache.tokens] == cache.lengths
    for row, keep in enumerate(x["attention_mask"].bool()):
        own = whole.sequences[row, torch.cat((keep, keep.new_ones(12)))].tolist()
        assert cache.tokens[row] == own[: cache.lengths[row]] and cache.lengths[row] >= keep.sum()
    held = list(cache.lengths)
    again = fastft.generate(llama, x, max_new_tokens=12, cache=cache)
    assert held and torch.equal(again.sequences, whole.sequences)


def test_caches_of_other_classes_are_transformers_to_fill(llama):
    ids = prompt(1, 6)
    want = llama.generate(ids, max_new_tokens=5)
    for cache in (DynamicCache(config=llama.config), StaticCache(llama.config, 20)):
        out = fastft.generate(llama, ids, max_new_tokens=5, cache=cache)
        assert out.stats.path == "model.generate" and "Cache" in out.stats.reason
        assert torch.equal(out.sequences, want) and cache.get_seq_length() == 10


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2"])
def test_transformers_generates_with_it(kind):
    model, x = tiny(kind), padded([7, 4])
    one = {"input_ids": prompt(1, 6)}
    for kwargs, inputs in (
        ({}, x),
        ({"num_beams": 3}, x),
        ({"num_beams": 3, "num_return_sequences": 2}, one),
        ({"do_sample": True, "num_return_sequences": 3}, one),
        ({"assistant_model": tiny(kind, seed=1)}, one),
        ({"prompt_lookup_num_tokens": 3}, one),
    ):
        if kind == "mistral" and ("assistant_model" in kwargs or "prompt_lookup" in str(kwargs)):
            continue  # transformers' own default cache refuses to roll back a window
        kwargs["max_new_tokens"] = 8
        torch.manual_seed(0)
        want = model.generate(**inputs, **kwargs)
        torch.manual_seed(0)
        cache = KVCache(3)
        assert torch.equal(model.generate(**inputs, **kwargs, **{own_name(): cache}), want)


def test_a_cache_that_transformers_filled_goes_on_here(llama):
    ids, cache = prompt(2, 6), KVCache(3)
    first = llama.generate(ids, max_new_tokens=5, **{own_name(): cache}, eos_token_id=None)
    ours = fastft.generate(llama, first, max_new_tokens=5, cache=cache)
    assert ours.stats.path == "decoder_layer"
    assert torch.equal(ours.sequences, llama.generate(first, max_new_tokens=5))


def test_a_cache_that_holds_padding_goes_on_in_transformers(llama):
    x, cache = padded([7, 4]), KVCache(3)
    first = llama.generate(**x, max_new_tokens=5, **{own_name(): cache}, eos_token_id=None)
    mask = torch.cat((x["attention_mask"], torch.ones(2, 5, dtype=torch.long)), 1)
    ours = fastft.generate(llama, first, attention_mask=mask, max_new_tokens=5, cache=cache)
    assert ours.stats.path == "model.generate" and "padding" in ours.stats.reason
    want = llama.generate(first, attention_mask=mask, max_new_tokens=5)
    assert torch.equal(ours.sequences, want)


def test_what_does_not_belong_together_is_refused(llama):
    cache = KVCache(3)
    fastft.generate(llama, prompt(2, 6), max_new_tokens=3, cache=cache)
    with pytest.raises(ValueError, match=f"{own_name()}.*3, 2"):
        fastft.generate(llama, prompt(3, 9), max_new_tokens=3, cache=cache)
    with pytest.raises(ValueError, match=f"{own_name()}: expected 3 layers, got 2"):
        fastft.generate(llama, prompt(2, 6), max_new_tokens=3, cache=KVCache(2))
    with pytest.raises(ValueError, match=f"{own_name()}: expected torch.bfloat16"):
        fastft.generate(tiny().bfloat16(), prompt(2, 9), max_new_tokens=3, cache=cache)
    unknown = KVCache(3)
    llama.generate(prompt(1, 9), max_new_tokens=3, **{own_name(): unknown})
    with pytest.raises(ValueError, match=f"{own_name()}: row 0 holds 11 tokens"):
        fastft.generate(llama, prompt(1, 4), max_new_tokens=3, cache=unknown)
    ragged = KVCache(3)
    fastft.generate(llama, padded([6, 3]), max_new_tokens=3, cache=ragged)
    with pytest.raises(ValueError, match="rows of different lengths"):
        llama(input_ids=prompt(2, 1), **{own_name(): ragged})


def test_rows_are_chosen_and_cropped():
    cache = KVCache(1)
    cache.reserve(8)
    cache.allocate(3, 1, 2, torch.float32, "cpu")
    for row in range(3):
        cache.layers[0].keys[row] = row
    cache.set_lengths([3, 5, 4])
    cache.tokens = [[1] * 3, [2] * 5, [3] * 4]
    cache.keep_rows([2, 0, 2])
    assert cache.lengths == [4, 3, 4] and cache.tokens[0] == [3] * 4
    assert cache.layers[0].keys[:, 0, 0, 0].tolist() == [2, 0, 2]
    cache.tokens[0].append(9)
    assert cache.tokens[2] == [3] * 4
    cache.batch_repeat_interleave(2)
    assert cache.lengths == [4, 4, 3, 3, 4, 4] and len(cache.layers[0].values) == 6
    cache.batch_select_indices(torch.tensor([True, False, True, False, False, False]))
    assert cache.lengths == [4, 3] and len(cache.layers[0].keys) == 2
    cache.crop(0)
    assert cache.lengths == [4, 3]
    cache.crop(-1)
    assert cache.lengths == [3, 3]
    cache.crop(2)
    assert cache.lengths == [2, 2] and cache.get_seq_length() == 2
    cache.crop(-9)
    assert cache.lengths == [0, 0]
    with pytest.raises(ValueError, match="length"):
        cache.roll_back(0, 1)
    cache.set_lengths([2, 1])
    cache.reset()
    assert cache.lengths == [0, 0]


def test_growing_keeps_what_is_there():
    cache = KVCache(2)
    cache.reserve(3)
    cache.allocate(2, 1, 4, torch.float32, "cpu")
    for layer in cache.layers:
        layer.keys.fill_(1.0)
        layer.values.fill_(2.0)
    cache.reserve(200)
    assert cache.capacity >= 200
    for layer in cache.layers:
        assert (layer.keys[:, :, :3] == 1).all() and (layer.values[:, :, :3] == 2).all()
        assert layer.keys.shape[2] == cache.capacity
