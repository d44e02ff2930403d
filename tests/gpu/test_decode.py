"""fastft.generate on the GPU, with CUDA graphs and without, with drafts and without."""

import copy

import pytest
import torch
from decode.tape import FakeGraphs
from decode.test_cuda_graph import Both, feed
from models import VOCABULARY, causal_lm, with_lora

from fastft.decode.cuda_graph import CudaGraphs, GraphStep
from fastft.decode.generate import generate
from fastft.decode.linears import DECODE_WEIGHT
from fastft.decode.step import FusedStep
from fastft.decode.weights import DecodeWeight
from fastft.ops.quantized_linear import dequantize

NAMES = ["llama", "gpt2", "qwen3"]
DTYPES = [torch.float32, torch.bfloat16]
NEW = 24


def made(name, device, dtype=torch.float32, seed=0):
    sizes = {} if name == "gpt2" else {"intermediate_size": 64}
    return causal_lm(name, seed=seed, **sizes).to(device, dtype)


def prompts(device, rows=3):
    """Padded on the left, with repetitions that a lookup finds."""
    ids = torch.randint(3, VOCABULARY, (rows, 6)).repeat(1, 2)
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, : 2 * row] = 0
    return {"input_ids": (ids * mask).to(device), "attention_mask": mask.to(device)}


def tokens(serve, inputs, **settings):
    # Rows that end early stay in the batch, and some do.
    out = serve(**inputs, max_new_tokens=NEW, do_sample=False, pad_token_id=0, **settings)
    return out if isinstance(out, torch.Tensor) else out.sequences


def ours(model, inputs, **settings):
    out = generate(model, inputs, max_new_tokens=NEW, do_sample=False, pad_token_id=0, **settings)
    assert out.stats.path == "decoder_layer", out.stats.reason
    if inputs["input_ids"].is_cuda:
        told = out.stats.cuda_graphs
        assert "none" not in told, told
        # With drafts a batch is ragged.
        assert not told.startswith("0 ") or settings.get("speculation") is not None
    return out.sequences


def drafting(speculation, name, device, dtype=torch.float32):
    return made(name, device, dtype, seed=1) if speculation == "model" else speculation


@pytest.mark.parametrize("speculation", [None, "prompt_lookup", "model"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_transformers_own(device, name, rows, speculation):
    model, inputs = made(name, device), prompts(device, rows)
    wanted = tokens(model.generate, inputs)
    got = ours(model, inputs, speculation=drafting(speculation, name, device))
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("speculation", [None, "prompt_lookup", "model"])
@pytest.mark.parametrize("name", NAMES)
def test_tokens_of_bfloat16_are_the_models_own_up_to_rounding(device, name, speculation):
    model, inputs = made(name, device, torch.bfloat16), prompts(device, 1)
    draft = drafting(speculation, name, device, torch.bfloat16)
    got = ours(model, inputs, speculation=draft)
    with torch.no_grad():
        logits = model(got).logits[0, inputs["input_ids"].shape[1] - 1 : -1].float()
        truth = copy.deepcopy(model).double()(got).logits[0, -len(logits) - 1 : -1]
    chosen = truth.gather(1, got[0, -len(logits) :, None])[:, 0]
    slack = 4 * (logits - truth).abs().amax()
    assert bool((chosen >= truth.amax(1) - slack).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lora", [False, True], ids=["plain", "LoRA"])
@pytest.mark.parametrize("name", NAMES)
def test_a_graph_gives_the_bits_of_the_eager_step(device, name, lora, dtype):
    model = causal_lm(name)
    model = with_lora(model).get_base_model() if lora else model
    model = model.to(device, dtype).eval()
    graphs = CudaGraphs if device == "cuda" else FakeGraphs
    with torch.no_grad():
        step = GraphStep(model, make_graphs=graphs)
        both = Both(step, FusedStep(model), capacity=40)
    both([[5] * 20, [7] * 3])
    for width in (1, 1, 3, 16, 3, 1, 1, 16, 1):  # the cache grows on the way
        both(feed(width))
    both.each(lambda cache: cache.roll_back(0, 11))
    for _ in range(3):
        both(feed(1))
    for _ in range(3):
        both([[3], []])
    assert step.reason is None and step.replayed >= 8


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_logits_are_no_further_from_float64(device, name, dtype):
    model = made(name, device, dtype)
    ids = torch.randint(3, VOCABULARY, (2, 30), device=device)
    with torch.no_grad():
        step = (GraphStep if device == "cuda" else FusedStep)(model)
        cache = step.new_cache(2, 30)
        parts = [step(cache, ids[:, :9].tolist(), 9).view(2, 9, -1)]
        for i in range(9, 30):
            parts.append(step(cache, ids[:, i : i + 1].tolist())[:, None])
        got, eager = torch.cat(parts, 1), model(ids).logits
        truth = copy.deepcopy(model).double()(ids).logits
    errors = [float((x.double() - truth).norm() / truth.norm()) for x in (got, eager)]
    assert errors[0] <= 1.5 * errors[1] + 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("speculation", [None, "prompt_lookup"])
@pytest.mark.parametrize("name", NAMES)
def test_unmerged_adapters(device, name, speculation):
    model, inputs = with_lora(made(name, device)).to(device).eval(), prompts(device)
    wanted = tokens(model.generate, inputs)
    with model.disable_adapter():
        assert not torch.equal(tokens(model.generate, inputs), wanted)
    assert torch.equal(ours(model, inputs, speculation=speculation), wanted)


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_for_each_row(device, name):
    model, inputs = with_lora(made(name, device)).to(device).eval(), prompts(device)
    got = ours(model, inputs, adapter_names=["default", "__base__", "default"])
    adapted = ours(model, inputs)
    with model.disable_adapter():
        plain = ours(model, inputs)
    width = min(got.shape[1], adapted.shape[1], plain.shape[1])
    for row, other in enumerate((adapted, plain, adapted)):
        assert torch.equal(got[row, :width], other[row, :width])


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("name", NAMES)
def test_quantized_weights_give_the_tokens_of_what_they_stand_for(device, name, kind):
    kind = kind if device == "cuda" else f"{kind}_weight_only"  # the CPU rounds inputs otherwise
    model, inputs = made(name, device), prompts(device)
    rounded = copy.deepcopy(model)
    head = model.get_output_embeddings()
    for path, module in model.named_modules():
        conv = type(module).__name__ == "Conv1D"
        if module is head or not (conv or isinstance(module, torch.nn.Linear)):
            continue
        weight = module.weight.detach()
        held = DecodeWeight.of(weight.t() if conv else weight, kind)
        setattr(module, DECODE_WEIGHT, held)
        whole = dequantize(held.stored)
        rounded.get_submodule(path).weight.data.copy_(whole.t() if conv else whole)
    wanted = tokens(rounded.generate, inputs)
    assert torch.equal(ours(model, inputs), wanted)
    assert torch.equal(ours(model, inputs, speculation="prompt_lookup"), wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_training_between_two_calls_is_seen(device, dtype):
    model, inputs = made("llama", device, dtype), prompts(device, 1)
    first = ours(model, inputs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data.mul_(-1.5)
    after = ours(model, inputs)
    fresh = copy.deepcopy(model)
    assert torch.equal(after, ours(fresh, inputs)) and not torch.equal(first, after)
