"""base_weights="fp8": where it is refused, what it does not go with, and decoding over it.

What it shares with int8 is in test_base_weights.py, test_int8_base.py and test_loading.py.
"""

import copy

import pytest
import torch
from test_base_weights import batch, llama, with_lora

import fastft
from fastft.ops.quantized_layer import quantized_layers
from fastft.patch.swap import swap_of


def untouched(model):
    return not quantized_layers(model) and not any(swap_of(m) for m in model.modules())


def test_refused_where_the_device_has_none(tmp_path):
    """This processor has none: no model is touched, and int8 is told of."""
    for model in (with_lora(llama()), llama()):
        with pytest.raises(ValueError, match="compute capability 8.9 .*lie on cpu; 'int8' runs"):
            fastft.patch(model, base_weights="fp8")
        assert untouched(model)
    llama().save_pretrained(tmp_path)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="'fp8' needs .*sees no CUDA device"):
            fastft.load(tmp_path, base_weights="fp8")


def test_the_device_of_the_layers_is_asked_about(monkeypatch):
    asked = []
    monkeypatch.setattr("fastft.ops.fp8_linear.why_not", lambda device: asked.append(device))
    fastft.patch(with_lora(llama()), base_weights="int8")
    assert not asked
    fastft.patch(with_lora(llama()), base_weights="fp8")
    assert asked == [torch.device("cpu")]


def test_a_model_holds_one_kind(base):
    model = with_lora(llama())
    fastft.patch(model, base_weights=base)
    other = {"int8": "fp8", "fp8": "int8"}[base]
    with pytest.raises(ValueError, match="base_weights"):
        fastft.patch(model, base_weights=other)
    assert {layer.kind for layer in quantized_layers(model)} == {base}


@pytest.mark.usefixtures("fp8_anywhere")
class TestWhereItIs:
    def test_decoding_is_transformers_own_and_says_so(self):
        model = with_lora(llama()).eval()
        report = fastft.patch(model, base_weights="fp8")
        told = [e.reason for e in report.left if "generate" in e.reason]
        assert len(told) == 1 and "holds fp8 numbers, which the step does not read" in told[0]
        assert report.count("decoder_layer") == 0
        ids = torch.randint(2, 96, (2, 9))
        settings = dict(max_new_tokens=6, do_sample=False, eos_token_id=None)
        out = fastft.generate(model, {"input_ids": ids}, **settings)
        assert "fp8" in out.stats.reason
        same = model.generate(input_ids=ids, **settings)
        assert torch.equal(out.sequences, same) and same.shape == (2, 15)

    @pytest.mark.parametrize("kind", ["int8", "int4", "int8_weight_only"])
    def test_copies_for_decoding_are_refused(self, kind):
        model = with_lora(llama())
        with pytest.raises(ValueError, match="decode_weights: expected None with base_weights"):
            fastft.patch(model, base_weights="fp8", decode_weights=kind)
        assert untouched(model)

    def test_the_numbers_are_bytes_to_whoever_moves_them(self):
        model = with_lora(llama()).bfloat16()
        fastft.patch(model, base_weights="fp8")
        wanted = model(**(inputs := batch())).logits
        assert wanted.dtype is torch.bfloat16
        twin = copy.deepcopy(model).to(torch.float32).to(torch.bfloat16)
        assert torch.equal(twin(**inputs).logits, wanted)
        held = [b for layer in quantized_layers(model) for b in layer.buffers()]
        assert {b.dtype for b in held} == {torch.int8, torch.float32}

    def test_half_the_bytes_of_bfloat16(self):
        model = with_lora(llama()).bfloat16()
        before = sum(p.numel() * 2 for n, p in model.named_parameters() if ".base_layer." in n)
        fastft.patch(model, base_weights="fp8")
        layers = quantized_layers(model)
        now = sum(b.numel() * b.element_size() for m in layers for b in m.buffers())
        assert 1.8 < before / now <= 2

    def test_sizes_that_the_product_does_not_take_are_told(self):
        model = torch.nn.Sequential(torch.nn.Linear(32, 24), torch.nn.Linear(24, 48))
        report = fastft.patch(model.requires_grad_(False), base_weights="fp8")
        told = "by the reference: sizes are no multiples of 16"
        assert report.count("fp8_linear") == 2 and {e.reason for e in report.swapped} == {told}
        model = torch.nn.Sequential(torch.nn.Linear(32, 16), torch.nn.Linear(16, 48))
        report = fastft.patch(model.requires_grad_(False), base_weights="fp8")
        assert report.count("fp8_linear") == 2 and {e.reason for e in report.swapped} == {""}
