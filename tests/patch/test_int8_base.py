"""base_weights with the rest: fused adapters, decoding from the same numbers of int8, verify."""

import copy
import math

import pytest
import torch
from test_base_weights import batch, gradients, llama, with_lora
from torch.nn import functional as F

import fastft
from fastft.decode.layers import read
from fastft.decode.linears import DECODE_WEIGHT, Reading
from fastft.decode.weights import perplexity
from fastft.ops.quantized_layer import QuantizedLinear, computing, quantized_layers
from fastft.ops.quantized_linear import dequantize


def patched(tmp_path=None, kind="int8", **options):
    model = with_lora(llama(), **options).eval()
    report = fastft.patch(model, base_weights=kind, originals=tmp_path)
    return model, report


def test_what_is_swapped_does_not_depend_on_the_base(base):
    """Inputs rounded to eight bits once made attention look like another one."""
    _, plain = (model := with_lora(llama())), fastft.patch(model)
    _, report = patched(kind=base)
    for operator in ("attention", "gated_mlp", "norm", "lora", "rotary", "linear_cross_entropy"):
        assert report.count(operator) == plain.count(operator), operator
    assert report.count("attention") == 2
    left = {e.reason for e in report.left} - {e.reason for e in plain.left}
    assert bool(left) == (base == "fp8") and all("transformers' own" in each for each in left)


def test_fused_adapters_are_the_composition(base):
    """Gate and up share one rounding: layer by layer, each of its own, gives the same numbers."""
    model, _ = patched(kind=base)
    apart = copy.deepcopy(model)
    for module in apart.modules():
        if type(module).__name__ == "LlamaMLP" or hasattr(module, "lora_A"):
            module._fastft_swap.active = False  # PEFT's own path over QuantizedLinear.forward
    inputs = batch()
    (loss, grads), (wanted, truth) = gradients(model, inputs), gradients(apart, inputs)
    torch.testing.assert_close(loss, wanted, rtol=1e-3, atol=0)
    for name, grad in truth.items():
        gap = (grads[name] - grad).norm() / grad.norm()
        assert gap < 0.05, name  # roundings fall the other way where sums differ in their last bit


def test_decodes_from_the_same_numbers():
    model, _ = patched()
    layers = quantized_layers(model)
    at = [layer.values.data_ptr() for layer in layers]
    inner = model.get_base_model()
    read_ = read(inner).layers
    assert [linear.weight.values.data_ptr() for layer in read_ for linear in layer.linears] == at
    assert all(linear.weight.round_inputs for layer in read_ for linear in layer.linears)
    ids = torch.randint(2, 96, (2, 9))
    out = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert out.shape == (2, 17)
    report = fastft.patch(model, decode_weights="int8")
    assert report.count("quantized_linear") == 15  # the head's copy is the only one
    copies = {n for n, m in model.named_modules() if DECODE_WEIGHT in vars(m)}
    assert len(copies) == 15
    for layer in layers:  # moved into one memory, and still the layer's own
        assert vars(layer)[DECODE_WEIGHT].stored.values.data_ptr() == layer.values.data_ptr()
    with pytest.raises(ValueError, match="decode_weights: expected int8 or int8_weight_only"):
        fastft.patch(model, decode_weights="int4")
    fastft.patch(model, decode_weights="int8_weight_only")
    read_ = read(inner, Reading()).layers
    assert not any(linear.weight.round_inputs for layer in read_ for linear in layer.linears)
    fastft.unpatch(model)
    assert not any(DECODE_WEIGHT in vars(m) for m in model.modules())
    assert not quantized_layers(model)


def test_decodes_without_an_adapter():
    model = llama().eval().requires_grad_(False)
    report = fastft.patch(model, base_weights="int8")
    assert report.count("int8_linear") == 14 and report.count("decoder_layer") == 1
    ids = torch.randint(2, 96, (2, 9))
    assert fastft.generate(model, ids, max_new_tokens=4).stats.path == "decoder_layer"


def test_the_decode_step_computes_the_int8_model():
    """By the weights that the numbers stand for: to the last digits; rounded: nearly."""
    model, _ = patched()
    inner, ids = model.get_base_model(), torch.randint(2, 96, (3, 12))
    with computing(model, "numbers"), torch.no_grad():
        logits = inner(input_ids=ids).logits[:, :-1].flatten(0, 1)
    wanted = math.exp(F.cross_entropy(logits, ids[:, 1:].flatten()))
    assert perplexity(inner, ids, None, stored=False) == pytest.approx(wanted, rel=1e-5)
    assert perplexity(inner, ids, None, stored=True) == pytest.approx(wanted, rel=1e-2)


def test_trained_then_decoded_then_trained():
    model, _ = patched(lora_dropout=0.1)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=3e-2)
    inputs = batch()
    ids, outs = inputs["input_ids"][:1, :5], []
    for _ in range(3):
        model.train()
        for _ in range(3):
            model(**inputs).loss.backward()
            optimizer.step(), optimizer.zero_grad()
        model.eval()
        fresh = with_lora(llama()).eval()
        fresh.load_state_dict(model.state_dict())
        fastft.patch(fresh, base_weights="int8")
        options = dict(input_ids=ids, max_new_tokens=6, do_sample=False, eos_token_id=None)
        outs.append(model.generate(**options))
        assert torch.equal(outs[-1], fresh.generate(**options))


def test_verify_tells_what_the_base_costs(base, tmp_path):
    original, inputs = with_lora(llama()), batch()
    wanted, truth = gradients(original.eval(), inputs)
    model, _ = patched(tmp_path / "kept", base)
    model.base_model.model.lm_head.weight.grad = None
    found = fastft.verify(model, inputs)
    assert found.ok, found
    before, now = found.base.perplexity
    assert before == pytest.approx(math.exp(wanted), rel=1e-5) and now != before
    assert found.base.loss[0] == pytest.approx(float(wanted), rel=1e-5)
    assert set(found.base.cosines) == set(truth)
    assert all(0.99 < cosine < 1 for cosine in found.base.cosines.values())
    assert f"\n{base} base ".ljust(13) + "perplexity" in str(
        found
    ) and "cosine of gradients" in str(found)
    assert all(layer.computes == "stored" for layer in quantized_layers(model))
    kept, _ = patched(kind=base)
    found = fastft.verify(kept, inputs)
    assert found.ok and isinstance(found.base, str) and "no originals" in str(found)


def test_computing_by_other_weights_ends_with_the_block(base, tmp_path):
    model, _ = patched(tmp_path / "kept", base)
    layer = next(m for m in model.modules() if isinstance(m, QuantizedLinear))
    x = torch.randn(3, layer.in_features)
    outs = {}
    for how in ("numbers", "original"):
        with computing(model, how):
            outs[how] = layer(x)
    numbers = dequantize(layer.stored)
    torch.testing.assert_close(outs["numbers"], F.linear(x, numbers, layer.bias))
    torch.testing.assert_close(outs["original"], F.linear(x, layer.original(), layer.bias))
    with pytest.raises(RuntimeError, match="stop"), computing(model, "numbers"):
        raise RuntimeError("stop")
    assert layer.computes == "stored"
