"""Every operator on the GPU: values and gradients against float64, same bits, opcheck, tracing.

Inputs and eager forms are those of the CPU's tests, made on the device.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from ops import test_cross_entropy as losses
from ops import test_gated_mlp as mlp
from ops import test_linear_cross_entropy as heads
from ops import test_lora as lora
from ops import test_lora_mlp as lora_mlp
from ops import test_norm as norm
from ops import test_rotary as rotary
from packed import inputs as packed_inputs
from packed import sides as packed_sides
from truth import assert_as_exact, leaves, run

pytestmark = pytest.mark.usefixtures("on_device")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@dataclass(frozen=True)
class Case:
    """ours and eager, on arguments made anew by make(dtype)."""

    ours: Callable
    eager: Callable
    make: Callable[[torch.dtype], tuple]


def _norms():
    for rows, hidden in ((1, 9), (33, 577), (70, 4096), (5, 5000)):
        for residual in (False, True):

            def make(dtype, shape=(rows, hidden), residual=residual):
                return norm.inputs(dtype, shape, residual)

            name = f"{rows}x{hidden}{' residual' * residual}"
            yield f"layer_norm {name}", Case(norm.fused_layer_norm, norm.eager_layer_norm, make)
            for offset in (0.0, 1.0):

                def rms(dtype, make=make, offset=offset):
                    return *make(dtype)[:3], offset

                case = Case(norm.fused_rms_norm, norm.eager_rms_norm, rms)
                yield f"rms_norm {name} offset {offset}", case


def _gated_mlps():
    for activation in mlp.ACTIVATIONS:
        for shape in ((1,), (3, 17), (2, 5, 64), (40, 4097)):
            yield (
                f"gated_mlp {activation} {shape}",
                Case(
                    mlp.gated_mlp,
                    mlp.eager,
                    lambda dtype, s=shape, a=activation: (*mlp.inputs(dtype, *s), a),
                ),
            )

    def halves(dtype):
        both = (4 * torch.randn(7, 200)).to(dtype)
        return *(half.requires_grad_() for half in both.chunk(2, -1)), "silu"

    yield "gated_mlp halves", Case(mlp.gated_mlp, mlp.eager, halves)


def _rotaries():
    for head_dim, rotary_dim in ((2, 2), (64, 64), (80, 32), (100, 90), (256, 256)):
        for batch, swapped in ((1, False), (3, True)):

            def make(dtype, sizes=(head_dim, rotary_dim), batch=batch, swapped=swapped):
                q, k = (rotary.heads(3, n, 37, sizes[0], dtype) for n in (5, 2))
                if swapped:
                    q, k = (x.detach().transpose(1, 2).requires_grad_() for x in (q, k))
                return q, k, *rotary.angles(batch, 37, sizes[1], dtype), 1 + swapped

            yield (
                f"rotary {rotary_dim} of {head_dim}{' swapped' * swapped}",
                Case(rotary.fused, rotary.eager, make),
            )


def _losses():
    for shape in ((1, 2), (7, 17), (2, 3, 1025), (4, 50_003), (3, 128_256)):
        for reduction in ("mean", "none"):
            for options in ({}, {"label_smoothing": 0.1, "softcap": 3.0}):

                def make(dtype, shape=shape, options=options, reduction=reduction):
                    args = losses.inputs(dtype, shape, bool(options))
                    return *args, {**options, "reduction": reduction}

                yield (
                    f"cross_entropy {shape} {reduction}{' all options' * bool(options)}",
                    Case(
                        losses.beside_logits(losses.fused), losses.beside_logits(losses.eager), make
                    ),
                )


def _heads():
    plain = {}
    capped = {"softcap": 3.0, "logit_scale": 0.7, "label_smoothing": 0.1}
    for rows, vocab, hidden in ((1, 5, 24), (50, 301, 24), (2100, 4099, 72)):
        for adapters in (False, True):
            for options in (plain, capped):

                def make(dtype, sizes=(rows, vocab, hidden), adapters=adapters, options=options):
                    args = heads.inputs(dtype, *sizes)
                    if not adapters:
                        args[3] = args[4] = None
                    return *args, options

                name = f"{rows}x{vocab}x{hidden}{' LoRA' * adapters}"
                name += " all options" * bool(options)
                yield (
                    f"linear_cross_entropy {name}",
                    Case(heads.beside_logits(heads.fused), heads.beside_logits(heads.eager), make),
                )


def _loras():
    for tokens, inputs, outputs, rank in ((1, 13, 15, 1), (7, 65, 33, 3), (130, 100, 97, 8),
                                          (300, 576, 1000, 16), (64, 64, 64, 80)):  # fmt: skip
        for wide in (False, True):

            def make(dtype, sizes=(tokens, inputs, outputs, rank), wide=wide):
                tokens, inputs, outputs, rank = sizes
                x = lora.make(tokens, inputs, dtype=dtype)
                own = torch.float32 if wide else dtype
                return x, *lora.adapter(rank, inputs, outputs, (dtype, own))

            name = f"lora {tokens}x{inputs}->{outputs} rank {rank}{' float32 adapters' * wide}"
            yield name, Case(lora.fused, lora.eager, make)


def _lora_mlps():
    for activation in lora_mlp.ACTIVATIONS:

        def make(dtype):
            x = lora_mlp.make(90, 72, dtype=dtype, std=1.0)
            return x, *lora_mlp.layers(72, 200, 8, dtype, dtype)

        ours, eager = lora_mlp.fused(activation), lora_mlp.eager(activation)
        yield f"lora_mlp {activation}", Case(ours, eager, make)


def _attentions():
    options = [
        {},
        {"causal": True},
        {"causal": True, "window": 5},
        {"window": 70},
        {"causal": True, "window": 100, "softcap": 3.0},
        {"softcap": 0.7, "scale": 0.3},
    ]
    sizes = (
        ([1, 17, 130], 4, 4, 20),
        ([70, 0, 5], 6, 2, 64),
        ([300], 2, 1, 128),
        ([90], 2, 1, 256),
    )
    for option in options:
        for lengths, *rest in sizes:

            def make(dtype, lengths=lengths, rest=rest):
                return packed_inputs(dtype, sum(lengths), sum(lengths), *rest)

            # Their bounds are made where the test runs, so on the device.
            def ours(*qkv, lengths=lengths, option=option):
                return packed_sides(lengths, **option)[0](*qkv)

            def eager(*qkv, lengths=lengths, option=option):
                return packed_sides(lengths, **option)[1](*qkv)

            name = f"attention {lengths} {rest[0]}/{rest[1]}x{rest[2]} {option}"
            yield name, Case(ours, eager, make)


CASES = dict(
    case
    for group in (
        _norms, _gated_mlps, _rotaries, _losses, _heads, _loras, _lora_mlps, _attentions,
    )
    for case in group()
)  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_as_exact_as_eager(name, dtype):
    case = CASES[name]
    assert_as_exact(case.ours, case.eager, case.make(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_twice_the_same_bits(name, dtype):
    case = CASES[name]
    args = case.make(dtype)
    first, second = (run(case.ours, leaves(args)) for _ in range(2))
    for a, b in zip(first[0] + first[1], second[0] + second[1], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "name",
    [
        "rms_norm 33x577 residual offset 1.0",
        "layer_norm 33x577",
        "gated_mlp silu (40, 4097)",
        "rotary 32 of 80",
        "cross_entropy (4, 50003) mean all options",
        "linear_cross_entropy 50x301x24 LoRA",
        "lora 130x100->97 rank 8",
        "lora_mlp silu",
        "attention [300] 2/1x128 {'causal': True}",
    ],
)
def test_compiles_in_one_graph(name):
    case = CASES[name]
    compiled = torch.compile(case.ours, fullgraph=True)
    assert_as_exact(compiled, case.eager, case.make(torch.float32))


@pytest.mark.parametrize("wrong", [-1, 40, 2**40])
@pytest.mark.parametrize("loss", [losses.fused, heads.fused], ids=["logits", "head"])
def test_a_label_outside_the_vocabulary_is_never_read_wildly(loss, wrong):
    """It raises, or where the host would have to wait for that, its loss is NaN."""
    if loss is losses.fused:
        *args, labels = losses.inputs(torch.float32, (30, 40))
    else:
        *args, labels = heads.inputs(torch.float32, 30, 40)
    labels[3] = wrong
    try:
        value = loss(*args, labels, {})
    except ValueError as error:
        assert f"got {wrong} at position 3" in str(error)
    else:
        assert value.isnan()
    labels[3] = 0
    assert loss(*args, labels, {}).isfinite()
