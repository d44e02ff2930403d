"""Every way to call a causal language model: patched gives what unpatched gives."""

import threading
from contextlib import nullcontext

import pytest
import torch
from models import VOCABULARY, batch, causal_lm, with_lora
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DataCollatorWithFlattening, DynamicCache
from transformers.modeling_outputs import ModelOutput

from fastft.decode.cache_name import own_name
from fastft.patch import patch
from fastft.patch.lazy import LazyLogits
from fastft.patch.swap import switched_off

NAMES = ["llama", "gpt2", "gemma2"]


def step(model, inputs):
    model.zero_grad()
    output = model(**inputs)
    loss = output.loss if isinstance(output, ModelOutput) else output[0]
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return output, grads


def assert_same(got, wanted, real=None, tolerance=1e-4):
    """Outputs, field by field; at real tokens where the shape begins with (batch, length)."""
    assert type(got) is type(wanted)
    if isinstance(wanted, torch.Tensor) or isinstance(got, LazyLogits):
        assert got.shape == wanted.shape and got.dtype == wanted.dtype
        if real is not None and wanted.shape[:2] == real.shape:
            got, wanted = got[real], wanted[real]
        if real is not None and wanted.dim() == 4:  # attention weights: (batch, heads, q, k)
            got, wanted = (x.transpose(1, 2)[real] for x in (got, wanted))
        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)
    elif isinstance(wanted, dict):
        # A training step that does not ask for a cache gets none, where that moves no other field.
        names = (
            list(wanted) if len(wanted) > 3 else [n for n in wanted if n != own_name() or n in got]
        )
        assert list(got) == names
        for name in names:
            assert_same(_plain(got[name]), _plain(wanted[name]), real, tolerance)
    elif isinstance(wanted, (tuple, list)):
        assert len(got) == len(wanted)
        for ours, theirs in zip(got, wanted, strict=True):
            assert_same(_plain(ours), _plain(theirs), real, tolerance)
    elif isinstance(wanted, DynamicCache):
        assert got.get_seq_length() == wanted.get_seq_length()


def _plain(x):
    return x.materialize() if isinstance(x, LazyLogits) else x


def compare(model, inputs, tolerance=1e-4):
    """Patched against unpatched: the whole output, and every gradient."""
    with switched_off(model):
        wanted, wanted_grads = step(model, inputs)
    got, grads = step(model, inputs)
    mask = inputs.get("attention_mask")
    real = mask.bool() if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None
    assert_same(got, wanted, real, tolerance)
    assert grads.keys() == wanted_grads.keys()
    largest = max(g.norm() for g in wanted_grads.values())
    for name, grad in wanted_grads.items():
        assert (grad - grads[name]).norm() <= tolerance * max(grad.norm(), 1e-2 * largest), name
    return got


def model_of(name="llama", **settings):
    model = causal_lm(name, **settings).train()
    patch(model)
    return model


def without(inputs, *names):
    return {k: v for k, v in inputs.items() if k not in names}


def forms(inputs, model):
    ids, mask, labels = inputs["input_ids"], inputs["attention_mask"], inputs["labels"]
    places = (mask.cumsum(1) - 1).clamp(min=0)
    causal = torch.ones(11, 11, dtype=torch.bool).tril()[None, None]
    allowed = causal & mask[:, None, None].bool() | torch.eye(11, dtype=torch.bool)
    if model.config.model_type == "gemma2":  # eager attention, which adds its mask
        allowed = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    embeds = model.get_input_embeddings()(ids).detach()
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()
    return {
        "logits_to_keep": {"logits_to_keep": 11},
        "output_hidden_states": {"output_hidden_states": True},
        "one hidden state": {"output_hidden_states": 0},
        "output_attentions": {"output_attentions": True},
        "return_dict": {"return_dict": False},
        "inputs_embeds": {"input_ids": None, "inputs_embeds": embeds},
        "position_ids": {"position_ids": places},
        "position_ids of one row": {"position_ids": torch.arange(11)[None] + 3},
        "use_cache": {"use_cache": True},
        "no cache": {"use_cache": False},
        "4-D mask": {"attention_mask": allowed},
        "boolean mask": {"attention_mask": mask.bool()},
        "float mask": {"attention_mask": mask.float()},
        "shift_labels": {"shift_labels": shifted},
        "num_items int": {"num_items_in_batch": 7},
        "num_items tensor": {"num_items_in_batch": torch.tensor(7)},
        "labels on padding": {"labels": ids},
        "no mask": {"attention_mask": None},
        "row of padding": {"attention_mask": mask * torch.tensor([[1], [1], [0]])},
    }


FORMS = list(forms(batch(), causal_lm("llama")))


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", FORMS)
def test_form(form, name, padding):
    model, inputs = model_of(name), batch(padding)
    given = {**inputs, **forms(inputs, model)[form]}
    if form == "row of padding":
        # Eager attention over nothing but masked keys is not defined; no label asks for it.
        labels = given["labels"].masked_fill(given["attention_mask"] == 0, -100)
        given["labels"] = labels
    if form == "no mask":
        given = without(given, "attention_mask")
    compare(model, given)


@pytest.mark.parametrize("asked", ["by the call", "by the configuration"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma"])
def test_attention_weights_of_either_implementation(name, implementation, asked):
    model = causal_lm(name).train()
    model.set_attn_implementation(implementation)
    inputs = {**batch("right"), "output_hidden_states": True}
    if asked == "by the call":
        inputs["output_attentions"] = True
    elif implementation == "eager":  # transformers refuses it for sdpa
        model.config.output_attentions = True
    wanted = model(**inputs)
    patch(model)
    got = model(**inputs)
    assert_same(got, wanted, inputs["attention_mask"].bool())
    assert bool(got.attentions) == (implementation == "eager")


@pytest.mark.parametrize("name", NAMES)
def test_configuration_asks_for_states(name):
    model, inputs = model_of(name), batch("right")
    model.config.output_hidden_states = True
    compare(model, inputs)
    compare(model.eval(), inputs)


@pytest.mark.parametrize("name", NAMES)
def test_without_labels_in_either_mode(name):
    model, inputs = model_of(name), without(batch("left"), "labels")
    for mode in (True, False):
        model.train(mode)
        with torch.no_grad(), switched_off(model):
            wanted = model(**inputs)
        with torch.no_grad():
            got = model(**inputs)
        assert_same(got, wanted, inputs["attention_mask"].bool())


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_and_no_grad(name):
    model, inputs = model_of(name).eval(), batch("right")
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            with switched_off(model):
                wanted = model(**inputs)
            got = model(**inputs)
        assert not got.loss.requires_grad and not got.logits.requires_grad
        assert_same(got, wanted, inputs["attention_mask"].bool())


@pytest.mark.parametrize("name", NAMES)
def test_nothing_labelled_is_zero_not_nan(name):
    model, inputs = model_of(name), batch("right")
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    output, grads = step(model, inputs)
    assert output.loss == 0 and grads
    assert all(not g.any() for g in grads.values())
    torch.testing.assert_close(output.logits.shape, (3, 11, VOCABULARY))


@pytest.mark.parametrize("padding", ["none", "right"])
@pytest.mark.parametrize("wrong", [VOCABULARY, -1, -99, 10**6])
def test_mistyped_label(wrong, padding):
    model, inputs = model_of(), batch(padding)
    inputs["labels"][1, 5] = wrong
    with pytest.raises(ValueError, match=f"labels.*{wrong}"):
        model(**inputs)


@pytest.mark.parametrize("name", NAMES)
def test_one_token_and_one_row(name):
    model = model_of(name)
    ids = torch.tensor([[5]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert_same(model(**inputs).logits, causal_lm(name)(**inputs).logits)
    assert model(**inputs, labels=ids).loss == 0  # nothing follows the only token
    compare(model, {"input_ids": torch.tensor([[5, 6]]), "labels": torch.tensor([[5, 6]])})


def flattened(**settings):
    rows = [torch.arange(3 + 2 * i, 12 + 3 * i).tolist() for i in range(3)]
    collator = DataCollatorWithFlattening(return_tensors="pt", **settings)
    return collator([{"input_ids": row, "labels": row} for row in rows])


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "gemma2"])
@pytest.mark.parametrize("kwargs", [False, True], ids=["positions", "cu_seq_lens"])
def test_flattened_batch(name, kwargs):
    # transformers looks for restarts in the positions only where there is no cache.
    inputs = {**flattened(return_flash_attn_kwargs=kwargs), "use_cache": False}
    assert "attention_mask" not in inputs and ("cu_seq_lens_q" in inputs) == kwargs
    output = compare(model_of(name), inputs)
    alone = causal_lm(name)(input_ids=inputs["input_ids"][:, :9]).logits
    torch.testing.assert_close(output.logits[:, :9], alone, rtol=1e-4, atol=1e-4)


def test_flattened_batch_with_checkpointing():
    model = with_lora(causal_lm("llama")).train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    patch(model)
    compare(model, dict(flattened(return_flash_attn_kwargs=True)))
    compare(model, batch("left"))


@pytest.mark.parametrize("name", dict.fromkeys([own_name(), "past_key_values"]))
@pytest.mark.parametrize("trained", [True, False])
def test_a_given_cache_is_filled(name, trained):
    """By the name before transformers 5.24 too, which its forwards still take."""
    model, inputs, found = model_of().train(trained), batch("right"), []
    real = inputs["attention_mask"].bool()
    for context in (switched_off(model), nullcontext()):
        cache = DynamicCache(config=model.config)
        with context:
            output = model(**inputs, **{name: cache})
        assert output[own_name()] is cache and cache.get_seq_length() == 11
        found.append((output.loss, cache.layers[1].keys.transpose(1, 2)[real]))
    assert_same(*found)


def test_backward_twice():
    model, inputs = model_of(), batch("right")
    loss = model(**inputs).loss
    loss.backward(retain_graph=True)
    first = {n: p.grad.clone() for n, p in model.named_parameters()}
    loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, 2 * first[name])


def test_threads():
    """Two padded models and one model without padding, all at once."""
    models = [model_of(), model_of("gpt2"), model_of()]
    inputs = [batch("right"), batch("left"), batch("none")]
    wanted = [model(**each).loss.item() for model, each in zip(models, inputs, strict=True)]
    same = (models[0], inputs[1], models[0](**inputs[1]).loss.item())
    failures = []

    def work(model, each, loss):
        try:
            for _ in range(15):
                output = model(**each)
                output.loss.backward()
                assert output.loss.item() == loss
        except BaseException as error:
            failures.append(error)

    jobs = [*zip(models, inputs, wanted, strict=True), same]
    threads = [threading.Thread(target=work, args=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


def test_mask_is_not_built_for_packed_rows(monkeypatch):
    """Neither a (tokens, tokens) mask nor PyTorch's dense attention: only ours runs."""
    model, inputs = model_of(), batch("right")

    def build(*args, **kwargs):
        raise AssertionError("a mask was built")

    monkeypatch.setattr("transformers.masking_utils.sdpa_mask", build)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):  # PyTorch's own would raise: not on this device
        step(model, inputs)
