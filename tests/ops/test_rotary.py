"""rotary against transformers' function and a float64 truth: values, gradients, layouts, errors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llama_rotary
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb as phi3_rotary
from truth import assert_as_exact, assert_same_bits_for_any_threads, run

from fastft.ops.rotary import _rotary, _rotary_backward, rotary

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def eager(q, k, cos, sin, unsqueeze_dim=1):
    """transformers' Phi-3, which knows partial rotary, in the dtype its models use: that of q."""
    return phi3_rotary(q, k, cos.to(q.dtype), sin.to(q.dtype), unsqueeze_dim)


def fused(q, k, cos, sin, unsqueeze_dim=1):
    return rotary(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)


def angles(batch, tokens, rotary_dim, dtype=torch.float32):
    """Halves that differ, so that a kernel which reads only one of them is found out."""
    angle = torch.rand(batch, tokens, rotary_dim) * 6
    return angle.cos().to(dtype), angle.sin().to(dtype)


def heads(batch, count, tokens, head_dim, dtype=torch.float32, grad=True):
    """As a model makes them: (batch, tokens, heads, head_dim) in memory."""
    x = torch.randn(batch, tokens, count, head_dim).to(dtype)
    return x.transpose(1, 2).requires_grad_(grad)


@pytest.mark.parametrize("dtype", DTYPES)
def test_as_exact_as_eager(isa, dtype):
    for head_dim, rotary_dim in [(2, 2), (6, 4), (64, 64), (80, 32), (96, 96), (100, 90)]:
        for batch in (1, 3):
            q, k = heads(3, 4, 7, head_dim, dtype), heads(3, 2, 7, head_dim, dtype)
            cos, sin = angles(batch, 7, rotary_dim, dtype)
            assert_as_exact(fused, eager, (q, k, cos, sin))
            swapped = [x.detach().transpose(1, 2).requires_grad_() for x in (q, k)]
            assert_as_exact(fused, eager, (*swapped, cos, sin, 2))


def test_same_meaning_as_llama(isa):
    q, k, (cos, sin) = heads(2, 3, 5, 64), heads(2, 1, 5, 64), angles(2, 5, 64)
    assert_as_exact(fused, llama_rotary, (q, k, cos, sin))


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(st.integers(0, 3), st.integers(0, 40), st.integers(0, 4), st.integers(0, 3)),
    st.integers(0, 40),
    st.integers(0, 9),
    st.sampled_from(DTYPES),
)
def test_any_shape(sizes, half, tail, dtype):
    batch, tokens, q_heads, k_heads = sizes
    q = heads(batch, q_heads, tokens, 2 * half + tail, dtype)
    k = heads(batch, k_heads, tokens, 2 * half + tail, dtype)
    assert_as_exact(fused, eager, (q, k, *angles(1, tokens, 2 * half, dtype)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_inputs(isa, dtype):
    packed = torch.randn(2, 6, 5 * 16).to(dtype).view(2, 6, 5, 16)
    q, k = packed[:, :, :3].transpose(1, 2), packed[:, :, 3:].transpose(1, 2)
    cos, sin = (x[:, ::2, 1:17] for x in angles(2, 12, 20, dtype))
    assert_as_exact(fused, eager, (q.requires_grad_(), k.requires_grad_(), cos, sin))
    last = torch.randn(2, 3, 16, 6).to(dtype).transpose(2, 3).requires_grad_()
    turned = [x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in (cos, sin)]
    assert_as_exact(fused, eager, (last, k, *turned))
    # Shared memory cannot be copied stride by stride, so this layout is compared with a dense one.
    shared = torch.randn(2, 1, 6, 16).to(dtype).expand(2, 3, 6, 16)
    angle = cos[:1].expand(2, 6, 16), sin[:1].expand(2, 6, 16)
    for got, wanted in zip(
        rotary(shared, q, *angle),
        rotary(shared.contiguous(), q, *(a.contiguous() for a in angle)),
        strict=True,
    ):
        assert torch.equal(got, wanted)


def test_results_and_gradients_lie_as_the_inputs_do():
    q, k, (cos, sin) = heads(2, 3, 5, 8), heads(2, 2, 5, 8), angles(1, 5, 8)
    for x, y in zip((q, k), rotary(q, k, cos, sin), strict=True):
        assert y.stride() == x.stride()
        (dx,) = torch.autograd.grad(y, x, torch.randn(y.shape), retain_graph=True)
        assert dx.transpose(1, 2).is_contiguous()
    q, k = q.detach().contiguous(), k.detach().contiguous()
    assert [y.stride() for y in rotary(q, k, cos, sin)] == [q.stride(), k.stride()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_angles_with_half_precision_queries(isa, dtype):
    """Here transformers rounds cos or promotes the result; ours is the exact one rounded once."""
    q, k, (cos, sin) = heads(2, 3, 5, 40, dtype), heads(2, 1, 5, 40, dtype), angles(2, 5, 40)
    exact, _ = run(llama_rotary, (q, k, cos.double(), sin.double()))
    for ours, truth in zip(rotary(q, k, cos, sin), exact, strict=True):
        assert ours.dtype == dtype
        difference = (ours.double() - truth).abs()
        assert (difference <= torch.finfo(dtype).eps * truth.abs().clamp(min=2e-2)).all()
    mixed = rotary(q, k, cos, sin.to(dtype))[0]
    wanted = rotary(q, k, cos, sin.to(dtype).float())[0]
    assert torch.equal(mixed, wanted)


def test_angles_of_another_half_dtype():
    q, k, (cos, sin) = heads(1, 2, 3, 8), heads(1, 2, 3, 8), angles(1, 3, 8)
    half = rotary(q, k, cos.bfloat16(), sin.half())
    wide = rotary(q, k, cos.bfloat16().float(), sin.half().float())
    assert all(torch.equal(a, b) for a, b in zip(half, wide, strict=True))


def test_no_gradient_that_nobody_needs():
    frozen_q, q = heads(2, 3, 5, 8, grad=False), heads(2, 3, 5, 8)
    frozen_k, k = heads(2, 1, 5, 8, grad=False), heads(2, 1, 5, 8)
    cos, sin = angles(1, 5, 8)
    assert_as_exact(lambda *a: fused(*a)[0], lambda *a: eager(*a)[0], (q, frozen_k, cos, sin))
    assert_as_exact(lambda *a: fused(*a)[1], lambda *a: eager(*a)[1], (frozen_q, k, cos, sin))
    y = rotary(q, k, cos, sin)
    (dq,) = torch.autograd.grad(y[0].sum(), q, retain_graph=True)
    assert torch.autograd.grad(y[0].sum(), k, allow_unused=True, retain_graph=True) == (None,)
    torch.testing.assert_close(dq, torch.autograd.grad(eager(q, k, cos, sin)[0].sum(), q)[0])


def test_gradcheck_of_the_reference():
    q, k = (
        torch.randn(2, n, 3, 6, dtype=torch.float64).transpose(1, 2).requires_grad_()
        for n in (3, 3)
    )
    cos, sin = angles(1, 3, 4, torch.float64)
    assert torch.autograd.gradcheck(lambda q, k: fused(q, k, cos, sin), (q, k))


def test_same_bits_for_any_thread_count():
    q, k, (cos, sin) = heads(2, 9, 70, 64), heads(2, 3, 70, 64), angles(1, 70, 64)

    def bits():
        y = rotary(q, k, cos, sin)
        return *y, *torch.autograd.grad(y[0].square().sum() + y[1].square().sum(), (q, k))

    assert_same_bits_for_any_threads(bits)


def test_opcheck():
    q, k = heads(2, 3, 5, 8, grad=False), heads(2, 1, 5, 8, grad=False).contiguous()
    cos, sin = angles(1, 5, 6)
    opcheck(_rotary.op, (q, k, cos, sin, 1))
    opcheck(_rotary.op, (q.transpose(1, 2), k.transpose(1, 2), cos, sin, 2))
    opcheck(_rotary_backward.op, (q, k, cos, sin, 1, True))
    opcheck(_rotary_backward.op, (k, None, cos, sin, 1, False))


def test_kernel_and_reference_agree_in_layout():
    cos, sin = angles(1, 5, 6)
    for count in (1, 3):
        for k in (heads(1, count, 5, 8), heads(2, count, 5, 8).detach().contiguous()):
            q = heads(k.shape[0], 2, 5, 8)
            ours, reference = (f(q, k, cos, sin, 1) for f in (_rotary.op, _rotary.reference))
            for a, b in zip(ours, reference, strict=True):
                assert a.stride() == b.stride()
                torch.testing.assert_close(a, b)


def test_compiles_in_one_graph():
    args = heads(2, 3, 5, 64), heads(2, 1, 5, 64), *angles(1, 5, 64)
    assert_as_exact(torch.compile(fused, fullgraph=True), eager, args)


def test_autocast_leaves_the_dtype():
    q, k, (cos, sin) = heads(1, 2, 3, 8), heads(1, 2, 3, 8), angles(1, 3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = rotary(q, k, cos, sin)
    torch.testing.assert_close(y, eager(q, k, cos, sin))


def test_errors_name_the_argument():
    q, k, (cos, sin) = heads(2, 3, 5, 8), heads(2, 1, 5, 8), angles(2, 5, 8)
    cases = [
        (ValueError, "unsqueeze_dim: expected 1 or 2", (q, k, cos, sin, 3)),
        (ValueError, "q: expected four dimensions", (q[0], k, cos, sin)),
        (ValueError, "k: expected the shape of q", (q, k[:, :, :4], cos, sin)),
        (ValueError, "cos: expected shape", (q, k, cos[:, :4], sin)),
        (ValueError, "cos: expected shape", (q, k, cos[..., :7], sin[..., :7])),
        (ValueError, "cos: expected shape", (q, k, cos[0], sin[0])),
        (ValueError, "cos: expected shape", (q, k, *angles(2, 5, 10))),
        (ValueError, "cos: expected shape", (q, k, *angles(3, 5, 8))),
        (ValueError, "sin: expected shape", (q, k, cos, sin[..., :4])),
        (TypeError, "k: expected torch.float32", (q, k.double(), cos, sin)),
        (TypeError, "q: expected a floating-point", (q.long(), k.long(), cos, sin)),
        (TypeError, "cos: expected a floating-point", (q, k, cos.long(), sin)),
    ]
    for error, message, args in cases:
        with pytest.raises(error, match=message):
            fused(*args)
