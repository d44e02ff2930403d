"""Decoding: transformers' generate with and without the patch, and the operators made for it."""

import importlib
import importlib.util

import torch
from torch.nn import functional as F

from bench.gpu.case import BANDWIDTH, Case, Floor, Report, Skip, randn
from bench.gpu.measure import Session, Side
from bench.gpu.shapes import LLAMA_1B, LLAMA_8B, RANK, Shape
from bench.gpu.steps import causal_lm, patched

PROMPT, NEW = 512, 64


def operator(name: str):
    """The module fastft.ops.<name>."""
    if importlib.util.find_spec(f"fastft.ops.{name}") is None:
        raise Skip(f"fastft has no {name} yet")
    return importlib.import_module(f"fastft.ops.{name}")


def generate(session: Session, shape: Shape, rows: int) -> Report:
    """Greedy; the floor reads every weight once per token."""
    here, shape = session.here, shape.here(session.here)
    prompt, new = (8, 4) if here.toy else (PROMPT, NEW)
    model = causal_lm(here, shape).eval()
    ids = torch.randint(1, shape.vocab, (rows, prompt), device=here.device)

    def side(model):
        settings = {
            "attention_mask": torch.ones_like(ids), "do_sample": False, "use_cache": True,
            "max_new_tokens": new, "min_new_tokens": new, "pad_token_id": 0,
        }  # fmt: skip
        # Random weights choose between nearly equal logits, so tokens are not compared.
        return Side(lambda: (model.generate(ids, **settings),), compare=False)

    weights = {p.data_ptr(): p for p in model.parameters()}.values()
    floor = Floor(bytes=new * sum(p.numel() * p.element_size() for p in weights))
    sides = {"eager": side(model), "fastft": side(patched(model))}
    return session.measure(sides, floor=floor, tokens=rows * new, queued=False)


def decode_attention(session: Session, shape: Shape, rows: int) -> Report:
    """One query per row over caches of different lengths."""
    function = operator("decode_attention").decode_attention
    here, shape = session.here, shape.here(session.here)
    capacity = 32 if here.toy else 8192
    query = randn(here, rows, 1, shape.heads, shape.head_dim)
    cache = rows, shape.kv_heads, capacity, shape.head_dim
    keys, values = randn(here, *cache), randn(here, *cache)
    lengths = torch.linspace(capacity // 4, capacity, rows, device=here.device).to(torch.int32)
    mask = (torch.arange(capacity, device=here.device) < lengths[:, None])[:, None, None]

    def eager():
        q = query.transpose(1, 2)
        out = F.scaled_dot_product_attention(q, keys, values, mask, enable_gqa=True)
        return (out.transpose(1, 2),)

    seen = int(lengths.sum()) * shape.kv_heads * shape.head_dim
    sides = {
        "eager": Side(eager),
        "fastft": Side(lambda: (function(query, keys, values, lengths),)),
    }
    floor = Floor(bytes=2 * seen * keys.element_size())
    return session.measure(sides, floor=floor).judge(BANDWIDTH)


def quantized_linear(session: Session, shape: Shape, bits: int, rows: int, lora: bool) -> Report:
    """x W^T for a few rows; the floor reads the stored weight once."""
    module = operator("quantized_linear")
    here, shape = session.here, shape.here(session.here)
    x = randn(here, rows, shape.hidden)
    weight = randn(here, shape.intermediate, shape.hidden, std=shape.hidden**-0.5)
    a = randn(here, RANK, shape.hidden, std=shape.hidden**-0.5)
    b = randn(here, shape.intermediate, RANK, std=0.1)
    stored = weight if bits == 16 else module.quantize(weight, bits)
    plain = weight if bits == 16 else module.dequantize(stored, here.dtype)
    adapter = module.Adapter(a, b, 2.0) if lora else None

    def eager():
        y = F.linear(x, plain)
        return (y + F.linear(F.linear(x, a), b) * 2.0 if lora else y,)

    sides = {
        "eager": Side(eager),
        "fastft": Side(lambda: (module.quantized_linear(x, stored, None, adapter),)),
    }
    floor = Floor(bytes=weight.numel() * bits // 8)
    return session.measure(sides, floor=floor).judge(BANDWIDTH)


def inference(function):
    """Nothing here has gradients."""
    return torch.no_grad()(function)


def cases() -> list[Case]:
    made = [
        Case.of(
            f"decode_attention {shape.name}, {rows} rows", inference(decode_attention), shape, rows
        )
        for shape in (LLAMA_8B, LLAMA_1B)
        for rows in (1, 8, 64)
    ]
    for bits in (16, 8, 4):
        for rows in (1, 4, 16):
            for lora in (False, True):
                name = f"quantized_linear {LLAMA_8B.name}, {bits} bits, {rows} rows"
                name += ", LoRA" if lora else ""
                call = inference(quantized_linear), LLAMA_8B, bits, rows, lora
                made.append(Case.of(name, *call))
    for shape, rows in ((LLAMA_1B, 1), (LLAMA_1B, 8), (LLAMA_8B, 1)):
        made.append(
            Case.of(f"generate {shape.name}, {rows} rows", inference(generate), shape, rows)
        )
    return made
