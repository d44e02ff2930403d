"""torch.compile and generate: patched models compile as whole graphs and give the same tokens."""

import pytest
import torch
from models import batch, causal_lm, with_lora

from fastft.patch import patch

RIGHT = batch("right")


@pytest.mark.parametrize("lora", [False, True])
def test_compile_without_breaks(lora):
    model = causal_lm("llama")
    model = with_lora(model) if lora else model
    inputs = {k: v for k, v in RIGHT.items() if k != "labels"}
    wanted = model(**inputs).logits
    plain = torch._dynamo.explain(model)(**inputs).graph_break_count
    torch._dynamo.reset()
    patch(model)
    assert torch._dynamo.explain(model)(**inputs).graph_break_count <= plain == 0
    torch._dynamo.reset()
    got = torch.compile(model, backend="eager", fullgraph=True)(**inputs).logits
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def _compiled_step_is_the_same(backend):
    model = with_lora(causal_lm("llama")).train()
    loss = model(**RIGHT).loss
    loss.backward()
    wanted = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    patch(model)
    output = torch.compile(model, backend=backend)(**RIGHT)
    output.loss.backward()
    torch.testing.assert_close(output.loss, loss)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            gap = (parameter.grad - wanted[name]).norm()
            assert gap <= 1e-4 * wanted[name].norm(), name


def test_compiled_step():
    _compiled_step_is_the_same("eager")


@pytest.mark.slow
def test_compiled_step_inductor():
    _compiled_step_is_the_same("inductor")


DECODING = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sampling": {"do_sample": True, "temperature": 1.3, "top_k": 20, "num_return_sequences": 2},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "scores": {"output_scores": True, "return_dict_in_generate": True, "output_logits": True},
    "penalty": {"repetition_penalty": 1.2, "min_new_tokens": 4},
}


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mistral"])
@pytest.mark.parametrize("way", DECODING)
def test_generate(way, name):
    model = with_lora(causal_lm(name))
    inputs = {k: v for k, v in batch("left").items() if k != "labels"}
    inputs |= {"do_sample": False, "max_new_tokens": 8, **DECODING[way]}

    def run():
        torch.manual_seed(11)
        return model.generate(**inputs)

    wanted = run()
    patch(model)
    got = run()
    if way == "scores":
        end = model.generation_config.eos_token_id
        new = wanted.sequences[:, -len(wanted.scores) :]
        for i, (ours, theirs) in enumerate(zip(got.scores, wanted.scores, strict=True)):
            # Behind a row's end nothing is computed, where transformers goes on with padding.
            open_rows = ~(new[:, :i] == (-1 if end is None else end)).any(1)
            torch.testing.assert_close(ours[open_rows], theirs[open_rows], rtol=1e-4, atol=1e-4)
        got, wanted = got.sequences, wanted.sequences
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_assisted_generation(name):
    model, assistant = causal_lm(name), causal_lm(name, num_hidden_layers=1)
    prompt = torch.tensor([[5, 6, 7, 8]])
    inputs = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "max_new_tokens": 10}
    wanted = model.generate(prompt, **inputs)
    patch(model), patch(assistant)
    assert torch.equal(model.generate(prompt, assistant_model=assistant, **inputs), wanted)
