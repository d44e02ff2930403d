"""Streamers and the iterator give the tokens that generate returns."""

import pytest
import torch
from decoders import padded, prompt, tiny
from transformers import TextStreamer

import fastft

pytestmark = pytest.mark.usefixtures("every_draft")


@pytest.fixture(scope="module")
def llama():
    return tiny("llama")


class Collector:
    """A streamer for batches."""

    def __init__(self):
        self.shown, self.ended = [], False

    def put(self, value):
        assert not self.ended
        self.shown.append(value)

    def end(self):
        self.ended = True


class Words:
    """As much of a tokenizer as TextStreamer asks for."""

    def decode(self, ids, **kwargs):
        return "".join(f"{int(i)} " for i in ids)


@pytest.mark.parametrize("speculation", [None, "prompt_lookup", "itself"])
@pytest.mark.parametrize("lengths", [[6], [6, 3, 5]])
def test_streamer(llama, lengths, speculation):
    x = padded(lengths)
    eos = int(llama.generate(**x, max_new_tokens=9)[0, -1])
    drafts = llama if speculation == "itself" else speculation
    theirs, ours = Collector(), Collector()
    if len(lengths) == 1:
        llama.generate(**x, max_new_tokens=14, streamer=theirs, eos_token_id=eos)
    out = fastft.generate(
        llama, x, max_new_tokens=14, streamer=ours, eos_token_id=eos, speculation=drafts
    )
    assert ours.ended and torch.equal(ours.shown[0], x["input_ids"])
    assert torch.equal(torch.stack(ours.shown[1:], 1), out.sequences[:, 6:])
    if len(lengths) == 1:
        assert [v.tolist() for v in ours.shown] == [v.tolist() for v in theirs.shown]


def test_text_streamer(llama, capsys):
    printed = []
    for generate in (llama.generate, lambda **kwargs: fastft.generate(llama, **kwargs)):
        generate(input_ids=prompt(1, 5), max_new_tokens=6, streamer=TextStreamer(Words()))
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] != ""


def test_a_streamer_is_handed_over(llama):
    streamer = Collector()
    out = fastft.generate(llama, prompt(1, 5), max_new_tokens=6, use_cache=False, streamer=streamer)
    assert (
        streamer.ended and torch.cat(streamer.shown[1:]).tolist() == out.sequences[0, 5:].tolist()
    )
    with pytest.raises(ValueError, match="streamer"):
        fastft.generate(llama, prompt(1, 5), num_beams=2, streamer=streamer)


@pytest.mark.parametrize("speculation", [None, "prompt_lookup", "itself"])
def test_stream(llama, speculation):
    x, kwargs = padded([6, 3]), {"max_new_tokens": 14, "eos_token_id": 28}
    drafts = llama if speculation == "itself" else speculation
    want = fastft.generate(llama, x, **kwargs).sequences[:, 6:]
    rows = [[], []]
    for new in fastft.stream(llama, x, **kwargs, speculation=drafts):
        assert len(new) == 2 and any(new)
        for row, tokens in zip(rows, new, strict=True):
            row += tokens
    assert [row + [0] * (want.shape[1] - len(row)) for row in rows] == want.tolist()


def test_between_rounds_everything_is_the_callers(llama):
    ids = prompt(1, 5)
    want = fastft.generate(llama, ids, max_new_tokens=6).sequences[0, 5:].tolist()
    first = fastft.stream(llama, ids, max_new_tokens=6)
    second = fastft.stream(llama, ids, max_new_tokens=6)
    got = [], []
    for one, two in zip(first, second, strict=True):
        assert torch.is_grad_enabled()
        got[0].extend(one[0])
        got[1].extend(two[0])
    assert got == (want, want)


def test_breaking_out_leaves_a_cache_that_goes_on(llama):
    from fastft.decode.cache import KVCache

    ids, cache = prompt(1, 5), KVCache(3)
    whole = fastft.generate(llama, ids, max_new_tokens=12).sequences
    seen = []
    for new in fastft.stream(llama, ids, max_new_tokens=12, cache=cache):
        seen += new[0]
        if len(seen) >= 4:
            break
    more = torch.cat((ids, torch.tensor([seen])), 1)
    mask = torch.ones_like(more)  # a pad token among them is none
    assert cache.lengths == [8] and cache.tokens == [more[0, :8].tolist()]
    out = fastft.generate(llama, more, attention_mask=mask, max_new_tokens=8, cache=cache)
    assert torch.equal(out.sequences, whole)


def test_stream_refuses_at_the_call(llama):
    with pytest.raises(ValueError, match="beam_search"):
        fastft.stream(llama, prompt(1, 5), num_beams=2)
    with pytest.raises(TypeError, match="inputs"):
        fastft.stream(llama, prompt(1, 5).float())
    with pytest.raises(TypeError, match="streamer"):
        fastft.stream(llama, prompt(1, 5), streamer=Collector())
