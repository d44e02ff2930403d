"""decoder_layer: values against float64, one token at a time or many, alone or beside others."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from truth import assert_close

from fastft.ops.decoder_layer import (
    DecoderLayer,
    Linear,
    NormWeight,
    Tokens,
    decoder_layer,
    decoder_layers,
)
from fastft.ops.quantized_linear import Adapter, QuantizedWeight, dequantize, quantize

HIDDEN, HEADS, KV_HEADS, DIM, INNER = 36, 6, 2, 10, 44
CAPACITY = 300
KINDS = ["separate", "joint", "gpt2", "plain_mlp"]
STORED = [torch.float32, torch.bfloat16, torch.float16, 8, 4]
# Bits of a stored weight whose inputs are rounded too.
ROUNDED = {"8, rounded": 8, "4, rounded": 4}
HEAD_NORMS = dict.fromkeys(("query_norm", "key_norm"), NormWeight(torch.linspace(0.2, 1, DIM)))


def stored(weight: Tensor, kind) -> QuantizedWeight:
    if isinstance(kind, torch.dtype):
        return QuantizedWeight(weight.to(kind))
    bits = ROUNDED.get(kind, kind)
    return replace(quantize(weight, bits, 32 if bits == 4 else None), round_inputs=kind in ROUNDED)


def make_layer(kind="separate", weights=torch.float32, ranks=(), seed=0, hidden=HIDDEN, inner=INNER,
               heads=HEADS, dim=DIM, **settings) -> DecoderLayer:  # fmt: skip
    torch.manual_seed(seed)
    q, kv = heads * dim, KV_HEADS * dim
    sizes = {
        "separate": [(q, hidden), (kv, hidden), (kv, hidden), (hidden, q), (inner, hidden),
                     (inner, hidden), (hidden, inner)],
        "joint": [(q + 2 * kv, hidden), (hidden, q), (2 * inner, hidden), (hidden, inner)],
        "gpt2": [(q + 2 * kv, hidden), (hidden, q), (inner, hidden), (hidden, inner)],
        "plain_mlp": [(q, hidden), (kv, hidden), (kv, hidden), (hidden, q), (inner, hidden),
                      (hidden, inner)],
    }[kind]  # fmt: skip
    linears = []
    for i, (out, inputs) in enumerate(sizes):
        weight = torch.randn(out, inputs) * inputs**-0.5
        if kind == "gpt2" and isinstance(weights, torch.dtype):
            held = QuantizedWeight(weight.to(weights).t().contiguous().t())
        else:
            held = stored(weight, weights)
        adapters = tuple(
            Adapter(torch.randn(rank, inputs) * 0.1, torch.randn(out, rank) * 0.3, 0.5 + j)
            if rank and (i + j) % 3 else None
            for j, rank in enumerate(ranks)
        )  # fmt: skip
        linears.append(Linear(held, torch.randn(out) * 0.1 if i % 2 == 0 else None, adapters))
    center = kind == "gpt2"

    def norm(size):
        return NormWeight(1 + torch.randn(size) * 0.1, torch.randn(size) * 0.1 if center else None)

    settings = {"activation": "gelu_tanh" if center else "silu", "offset": 0.0, **settings}
    return DecoderLayer(
        linears=tuple(linears), attention_norm=norm(hidden), mlp_norm=norm(hidden), heads=heads,
        gated=kind in ("separate", "joint"), center=center, eps=1e-2, scale=dim**-0.5, **settings,
    )  # fmt: skip


def make_cache(batch, dtype=torch.float32, dim=DIM):
    cache = torch.full((batch, KV_HEADS, CAPACITY, dim), float("nan"), dtype=dtype)
    return cache, cache.clone()


def angles(positions: Tensor, dim=DIM) -> tuple[Tensor, Tensor]:
    turns = positions[:, None].double() * 100.0 ** -(torch.arange(dim // 2) / dim)
    turns = torch.cat((turns, turns), 1).float()
    return turns.cos(), turns.sin()


def place(counts, before, adapter_of=None, rotary=True, dim=DIM) -> Tokens:
    """Rows that have `before` tokens in the cache and get `counts` new ones."""
    cu = torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32)
    lengths = torch.tensor([b + c for b, c in zip(before, counts, strict=True)], dtype=torch.int32)
    positions = torch.cat(
        [torch.arange(b, b + c) for b, c in zip(before, counts, strict=True)] or [torch.empty(0)]
    )
    cos, sin = angles(positions, dim) if rotary else (None, None)
    chosen = None if adapter_of is None else torch.tensor(adapter_of, dtype=torch.int32)
    return Tokens(cu, lengths, max(counts, default=0), cos, sin, chosen)


def run(layer, xs: list[Tensor], steps: list[list[int]], cache_dtype=torch.float32,
        adapter_of=None, dim=DIM, turned=None) -> list[Tensor]:  # fmt: skip
    """Each row's outputs, its tokens fed as the steps say: steps[i][row] of them in step i.

    turned: the dimensions that are rotated, all of them unless given.
    """
    keys, values = make_cache(len(xs), cache_dtype, dim)
    done, outs = [0] * len(xs), [[] for _ in xs]
    for counts in steps:
        x = torch.cat([x[d : d + c] for x, d, c in zip(xs, done, counts, strict=True)])
        tokens = place(counts, done, adapter_of, not layer.center, turned or dim)
        y = decoder_layer(x, layer, keys, values, tokens)
        for row, part in enumerate(y.split(counts)):
            outs[row].append(part)
            done[row] += counts[row]
    return [torch.cat(out) for out in outs]


def wide(layer: DecoderLayer) -> DecoderLayer:
    """The same layer in float64: what the stored weights stand for."""

    def norm(n):
        return NormWeight(*(None if t is None else t.double() for t in (n.weight, n.bias)))

    linears = tuple(
        Linear(
            QuantizedWeight(dequantize(linear.weight, torch.float64)),
            None if linear.bias is None else linear.bias.double(),
            tuple(
                None if a is None else Adapter(a.a.double(), a.b.double(), a.scale)
                for a in linear.adapters
            ),
        )
        for linear in layer.linears
    )
    return replace(
        layer, linears=linears, attention_norm=norm(layer.attention_norm),
        mlp_norm=norm(layer.mlp_norm), query_norm=norm(layer.query_norm),
        key_norm=norm(layer.key_norm),
    )  # fmt: skip


def plain(layer: DecoderLayer, x: Tensor, adapter: int | None = None, turned=None) -> Tensor:
    """One row from its first token on, written out in plain PyTorch in x's dtype."""

    def linear(i, h):
        held = layer.linears[i]
        y = h @ dequantize(held.weight, torch.float64).to(h.dtype).t()
        if held.bias is not None:
            y = y + held.bias.to(h.dtype)
        lora = held.adapters[adapter] if adapter is not None else None
        if lora is not None:
            y = y + h @ lora.a.to(h.dtype).t() @ lora.b.to(h.dtype).t() * lora.scale
        return y

    def norm(x, n):
        if n.weight is None:
            return x
        weight = n.weight.to(x.dtype) + layer.offset
        if layer.center:
            return torch.nn.functional.layer_norm(
                x, x.shape[-1:], weight, n.bias.to(x.dtype), layer.eps
            )
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + layer.eps) * weight

    def rotate(t):
        if layer.center:
            return t
        size = turned or t.shape[-1]
        cos, sin = (a.to(t.dtype)[:, None] for a in angles(torch.arange(len(t)), size))
        low, high = t[..., :size].chunk(2, -1)
        rotated = t[..., :size] * cos + torch.cat((-high, low), -1) * sin
        return torch.cat((rotated, t[..., size:]), -1)

    h = norm(x, layer.attention_norm)
    inputs = 1 if len(layer.linears) == 4 else 3
    qkv = torch.cat([linear(i, h) for i in range(inputs)], 1)
    dim = qkv.shape[1] // (layer.heads + 2 * KV_HEADS)
    q, k, v = qkv.unflatten(1, (-1, dim)).split([layer.heads, KV_HEADS, KV_HEADS], 1)
    q, k = rotate(norm(q, layer.query_norm)), rotate(norm(k, layer.key_norm))
    k, v = (t.repeat_interleave(layer.heads // KV_HEADS, 1) for t in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) * layer.scale
    if layer.softcap:
        scores = layer.softcap * torch.tanh(scores / layer.softcap)
    i = torch.arange(len(x))
    seen = i[None] <= i[:, None]
    if layer.window >= 0:
        seen = seen & (i[:, None] - i[None] < layer.window)
    p = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    x = x + linear(inputs, torch.einsum("hij,jhd->ihd", p, v).flatten(1))
    h = norm(x, layer.mlp_norm)
    last = len(layer.linears) - 1
    h = torch.cat([linear(i, h) for i in range(inputs + 1, last)], 1)
    gate, up = h.chunk(2, 1) if layer.gated else (h, None)
    act = {
        "silu": torch.nn.functional.silu,
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda t: torch.nn.functional.gelu(t, approximate="tanh"),
    }[layer.activation](gate)
    return x + linear(last, act if up is None else act * up)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weights", STORED)
def test_values(isa, kind, weights):
    sizes = {"hidden": 64, "inner": 96, "dim": 16, "heads": 4} if weights == 4 else {}
    layer = make_layer(kind, weights, ranks=(5,), **sizes)
    dim = sizes.get("dim", DIM)
    x = torch.randn(9, sizes.get("hidden", HIDDEN))
    (ours,) = run(layer, [x], [[4], [1], [3], [1]], dim=dim)
    truth = plain(wide(layer), x.double(), 0)
    assert_close(ours, plain(layer, x, 0), truth, kind)


@pytest.mark.parametrize(
    "settings",
    [
        {"window": 3},
        {"softcap": 2.0},
        {"offset": 1.0},
        {"activation": "gelu"},
        HEAD_NORMS,
    ],
    ids=lambda settings: next(iter(settings)),  # the same in every process of the suite
)
def test_settings(isa, settings):
    layer = make_layer(**settings)
    x = torch.randn(11, HIDDEN)
    (ours,) = run(layer, [x], [[5], [1], [4], [1]])
    assert_close(ours, plain(layer, x), plain(wide(layer), x.double()), str(settings))


def test_partial_rotary():
    """The head's dimensions behind those that are rotated pass through."""
    layer, x = make_layer(), torch.randn(11, HIDDEN)
    (ours,) = run(layer, [x], [[5], [1], [4], [1]], turned=6)
    assert_close(ours, plain(layer, x, turned=6), plain(wide(layer), x.double(), turned=6), "")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("more", [False, True])
def test_reference(kind, more):
    """What serves CUDA and tracing computes the same, rows of different lengths included."""
    settings = {"window": 6, "softcap": 2.0, "offset": 1.0} if more else {}
    if more and kind != "gpt2":  # whose norms have a bias
        settings |= HEAD_NORMS
    layer = wide(make_layer(kind, ranks=(4, 3), **settings))
    xs = [torch.randn(n, HIDDEN).double() for n in (7, 21, 2)]
    steps = [[5, 18, 0], [1, 3, 1], [0, 0, 0], [1, 0, 1]]
    outs = run(layer, xs, steps, torch.float64, [1, -1, 0])
    for x, out, adapter in zip(xs, outs, [1, None, 0], strict=True):
        torch.testing.assert_close(out, plain(layer, x, adapter), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("weights", [*STORED, *ROUNDED])
@pytest.mark.parametrize("kind", ["separate", "gpt2"])
@pytest.mark.parametrize("threads", [1, 2])
def test_same_bits(kind, weights, threads, request):
    """A row alone a token at a time; in a batch; verified as a draft; as a prompt."""
    before = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(before))
    torch.set_num_threads(threads)
    sizes = {"hidden": 160, "inner": 416, "dim": 32, "heads": 8}
    cache = weights if isinstance(weights, torch.dtype) else torch.float32
    layer = make_layer(kind, weights, ranks=(8, 3), **sizes)
    xs = [torch.randn(n, 160) for n in (70, 33, 5)]
    adapters = [0, -1, 1]
    alone = [
        run(layer, [x], [[1]] * len(x), cache, [a], 32)[0]
        for x, a in zip(xs, adapters, strict=True)
    ]
    for steps in (
        [[70, 33, 5]],
        [[40, 2, 0], [16, 17, 3], [1, 14, 1], [13, 0, 1]],
        [[1, 1, 1]] * 5 + [[1, 1, 0]] * 28 + [[7, 0, 0], [16, 0, 0], [14, 0, 0]],
    ):
        for row, out in enumerate(run(layer, xs, steps, cache, adapters, 32)):
            assert torch.equal(out, alone[row]), (row, steps)
    (first,) = run(layer, xs[:1], [[70]], cache, [0], 32)
    assert torch.equal(first, alone[0])


@pytest.mark.parametrize("weights", STORED)
@pytest.mark.parametrize("kind", ["separate", "gpt2"])
@pytest.mark.parametrize("adapters", [None, [1, -1, 0]])
@pytest.mark.parametrize("threads", [1, 2])
def test_layers_in_one_call(isa, kind, weights, adapters, threads, request):
    """Several layers at once have the bits of one after the other, and write the same caches."""
    before = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(before))
    torch.set_num_threads(threads)
    sizes = {"hidden": 160, "inner": 416, "dim": 32, "heads": 8}
    ranks = (8,) if adapters is None else (8, 3)
    layers = [make_layer(kind, weights, ranks, seed, **sizes) for seed in range(3)]
    dtype = weights if isinstance(weights, torch.dtype) else torch.float32
    for counts, done in (
        ([40, 2, 9], [0, 0, 0]),
        ([1, 1, 1], [40, 2, 9]),
        ([0, 3, 1], [41, 3, 290]),
    ):
        tokens = place(counts, done, adapters, kind != "gpt2", 32)
        x = torch.randn(sum(counts), 160)
        caches = [make_cache(3, dtype, 32) for _ in layers]
        for part in itertools.chain(*caches):
            part.normal_()
        ours = [(keys.clone(), values.clone()) for keys, values in caches]
        y = decoder_layers(x, layers, *zip(*ours, strict=True), tokens)
        for layer, (keys, values) in zip(layers, caches, strict=True):
            x = decoder_layer(x, layer, keys, values, tokens)
        assert torch.equal(y, x)
        for own, their in zip(itertools.chain(*ours), itertools.chain(*caches), strict=True):
            assert torch.equal(own, their)


def test_plan_sees_weights_written_in_place():
    layer, (keys, values), x = make_layer(), make_cache(1), torch.randn(2, HIDDEN)
    tokens = place([2], [0])
    first = decoder_layers(x, [layer], [keys], [values], tokens)
    with torch.no_grad():
        layer.linears[0].weight.values.mul_(2)
    second = decoder_layers(x, [layer], [keys], [values], tokens)
    assert not torch.equal(first, second)
    assert torch.equal(second, decoder_layer(x, layer, keys, values, tokens))


def test_one_call_refuses_what_is_no_plan():
    layer, (keys, values), x = make_layer(), make_cache(1), torch.randn(2, HIDDEN)
    vars(layer)["plan"] = torch.zeros(10_000, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="plans"):
        decoder_layers(x, [layer], [keys], [values], place([2], [0]))
    vars(layer)["plan"] = make_layer().plan.clone()  # its addresses are another's
    with pytest.raises(RuntimeError, match="plans"):
        decoder_layers(x, [layer], [keys], [values], place([2], [0]))
    with pytest.raises(RuntimeError, match="keys, values"):
        decoder_layers(x, [make_layer()], [], [], place([2], [0]))


def test_one_adapter_needs_no_choice():
    layer, x = make_layer(ranks=(8,)), torch.randn(6, HIDDEN)
    assert torch.equal(run(layer, [x], [[6]])[0], run(layer, [x], [[6]], adapter_of=[0])[0])
    assert not torch.allclose(run(layer, [x], [[6]])[0], run(layer, [x], [[6]], adapter_of=[-1])[0])


@pytest.mark.parametrize(
    "broken, message",
    [
        ({"lengths": torch.tensor([CAPACITY + 1], dtype=torch.int32)}, "lengths"),
        ({"lengths": torch.tensor([1], dtype=torch.int32)}, "lengths"),
        ({"cu_seqlens": torch.tensor([0, 3], dtype=torch.int32)}, "cu_seqlens"),
        ({"queries": 1}, "queries"),
        ({"adapter_of": torch.tensor([1], dtype=torch.int32)}, "adapter_of"),
        ({"cos": torch.zeros(3, DIM)}, "cos"),
    ],
    ids=str,
)
def test_refuses(broken, message):
    layer, (keys, values) = make_layer(), make_cache(1)
    good = vars(place([2], [0]))
    with pytest.raises(RuntimeError, match=message):
        decoder_layer(torch.randn(2, HIDDEN), layer, keys, values, Tokens(**good | broken))
    assert keys.isnan().all()
    wrong = make_layer(hidden=HIDDEN, inner=INNER)
    linears = (*wrong.linears[:3], wrong.linears[6], *wrong.linears[4:])
    wrong = replace(wrong, linears=linears)
    with pytest.raises(RuntimeError, match="linears"):
        decoder_layer(torch.randn(2, HIDDEN), wrong, keys, values, Tokens(**good))


def test_refuses_weights_of_which_some_round_their_inputs():
    layer = make_layer(weights=8)
    first, *rest = layer.linears
    first = replace(first, weight=replace(first.weight, round_inputs=True))
    with pytest.raises(ValueError, match="linears: expected round_inputs of all"):
        replace(layer, linears=(first, *rest))
