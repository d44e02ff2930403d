"""The operators of a layer at the sizes of real models, forward and backward, and kernel by kernel.

Bytes are counted once for everything that must be read and once for everything that must be
written; a weight vector, the angles and the statistics of rows are nothing beside them.
"""

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.gpu import peers
from bench.gpu.case import BANDWIDTH, Case, Floor, Goal, Here, Report, randn
from bench.gpu.measure import Session, Side, passes
from bench.gpu.shapes import LLAMA_1B, LLAMA_8B, QWEN_05B, Shape, packed
from fastft.library import operators
from fastft.ops import cross_entropy as losses
from fastft.ops import gated_mlp as mlp
from fastft.ops import low_rank, norm, rotary, round_rows
from fastft.ops.attention import attention as fused_attention


def eager_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """transformers' LlamaRMSNorm."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return weight * wide.to(x.dtype)


def eager_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """transformers' apply_rotary_pos_emb."""

    def turned(x):
        first, second = x.chunk(2, -1)
        return x * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]

    return turned(q), turned(k)


def rms_norm(session: Session, shape: Shape) -> Report:
    here, shape = session.here, shape.here(session.here)
    x = randn(here, shape.tokens, shape.hidden, grad=True)
    weight, dy = randn(here, shape.hidden, grad=True), randn(here, *x.shape)

    def liger():
        function = peers.liger(here, "liger_rms_norm")
        return passes(lambda x, w: function(x, w, 1e-6), (x, weight), dy, fresh=True)

    sides = {
        "eager": passes(eager_rms_norm, (x, weight), dy),
        "fastft": passes(norm.rms_norm, (x, weight), dy),
        "F.rms_norm": passes(lambda x, w: F.rms_norm(x, w.shape, w, 1e-6), (x, weight), dy),
        "liger-kernel": liger,
        "torch.compile": passes(here.compile(eager_rms_norm), (x, weight), dy),
    }
    floor = Floor(bytes=5 * x.numel() * x.element_size())
    return session.measure(sides, floor=floor).judge(BANDWIDTH)


def gated_mlp(session: Session, shape: Shape) -> Report:
    here, shape = session.here, shape.here(session.here)
    gate, up = (randn(here, shape.tokens, shape.intermediate, grad=True) for _ in range(2))
    dh = randn(here, *gate.shape)

    def eager(gate, up):
        return F.silu(gate) * up

    sides = {
        "eager": passes(eager, (gate, up), dh),
        "fastft": passes(mlp.gated_mlp, (gate, up), dh),
        "liger-kernel": lambda: passes(
            peers.liger(here, "liger_swiglu"), (gate, up), dh, fresh=True
        ),
        "torch.compile": passes(here.compile(eager), (gate, up), dh),
    }
    floor = Floor(bytes=8 * gate.numel() * gate.element_size())
    return session.measure(sides, floor=floor).judge(BANDWIDTH)


def _heads(here: Here, shape: Shape, grad: bool = True) -> tuple[Tensor, Tensor]:
    """Queries and keys as a model makes them: tokens before heads in memory."""
    sequences = 4
    size = sequences, shape.tokens // sequences
    return tuple(
        randn(here, *size, n, shape.head_dim).transpose(1, 2).requires_grad_(grad)
        for n in (shape.heads, shape.kv_heads)
    )


def _angles(here: Here, q: Tensor) -> tuple[Tensor, Tensor]:
    angle = torch.rand(1, q.shape[2], q.shape[3] // 2, device=here.device).repeat(1, 1, 2) * 6
    return angle.cos().to(q.dtype), angle.sin().to(q.dtype)


def rotary_embedding(session: Session, shape: Shape) -> Report:
    here, shape = session.here, shape.here(session.here)
    q, k = _heads(here, shape)
    angles = _angles(here, q)
    dy = randn(here, *q.shape), randn(here, *k.shape)
    sides = {
        "eager": passes(eager_rotary, (q, k, *angles), dy),
        "fastft": passes(rotary.rotary, (q, k, *angles), dy),
        "liger-kernel": lambda: passes(
            peers.liger(here, "liger_rope"), (q, k, *angles), dy, fresh=True
        ),
        "torch.compile": passes(here.compile(eager_rotary), (q, k, *angles), dy),
    }
    floor = Floor(bytes=4 * (q.numel() + k.numel()) * q.element_size())
    return session.measure(sides, floor=floor).judge(BANDWIDTH)


def cross_entropy(session: Session, shape: Shape) -> Report:
    here, shape = session.here, shape.here(session.here)
    logits = randn(here, shape.tokens, shape.vocab, std=2.0, grad=True)
    labels = torch.randint(0, shape.vocab, (shape.tokens,), device=here.device)

    def eager(logits, labels):
        """transformers' loss."""
        return F.cross_entropy(logits.float(), labels)

    sides = {
        "eager": passes(eager, (logits, labels)),
        "fastft": passes(losses.cross_entropy, (logits, labels)),
        "liger-kernel": lambda: passes(
            peers.liger(here, "liger_cross_entropy"), (logits, labels), fresh=True
        ),
        "torch.compile": passes(here.compile(eager), (logits, labels)),
    }
    floor = Floor(bytes=3 * logits.numel() * logits.element_size())
    return session.measure(sides, floor=floor).judge(BANDWIDTH)


def attention(session: Session, shape: Shape, equal: bool) -> Report:
    """Causal, over packed sequences: ragged ones, or four of one length as one batch allows."""
    here, shape = session.here, shape.here(session.here)
    lengths = [shape.tokens // 4] * 4 if equal else packed(here)
    q, k, v = (
        randn(here, shape.tokens, heads, shape.head_dim, grad=True)
        for heads in (shape.heads, shape.kv_heads, shape.kv_heads)
    )
    dout = randn(here, *q.shape)
    ends = torch.tensor([0, *lengths]).cumsum(0)
    bounds = ends.to(here.device, torch.int32)

    def sdpa(*qkv):
        """(sequences, tokens, heads, head_dim) in and out."""
        qkv = (t.transpose(1, 2) for t in qkv)
        out = F.scaled_dot_product_attention(*qkv, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2)

    def eager(*qkv):
        if equal:
            return sdpa(*(t.unflatten(0, (4, -1)) for t in qkv)).flatten(0, 1)
        parts = zip(*(t.split(lengths) for t in qkv), strict=True)
        return torch.cat([sdpa(*(t[None] for t in part))[0] for part in parts])

    def varlen():
        function = peers.varlen_attention(here)
        return passes(lambda *qkv: function(*qkv, bounds, max(lengths)), (q, k, v), dout)

    sides = {
        "eager": passes(eager, (q, k, v), dout),
        "fastft": passes(lambda *qkv: fused_attention(*qkv, bounds, causal=True), (q, k, v), dout),
        "varlen_attn": varlen,
    }
    pairs = sum(n * (n + 1) // 2 for n in lengths)
    # 2 products forward and 5 backward, each of 2 operations per pair and column.
    floor = Floor(operations=14 * pairs * shape.heads * shape.head_dim, dtype=here.dtype)
    return session.measure(sides, floor=floor)


def kernels(session: Session, shape: Shape) -> Report:
    """Every kernel that moves bytes, alone, against copying as many bytes."""
    here, shape = session.here, shape.here(session.here)
    x, residual, dy = (randn(here, shape.tokens, shape.hidden) for _ in range(3))
    weight = randn(here, shape.hidden)
    gate, up, dh = (randn(here, shape.tokens, shape.intermediate) for _ in range(3))
    logits = randn(here, shape.tokens, shape.vocab, std=2.0)
    labels = torch.randint(0, shape.vocab, (shape.tokens,), device=here.device)
    q, k = _heads(here, shape, grad=False)
    angles = _angles(here, q)
    narrow, wide = randn(here, shape.tokens, 16).float(), randn(here, 16, shape.intermediate)
    numbers = losses.LossOptions().numbers()

    *_, rstd = norm._rms_norm(x, None, weight, 1e-6, 0.0)
    *_, mean, layer_rstd = norm._layer_norm(x, None, weight, weight, 1e-5)
    ones, stats = losses._cross_entropy(logits, labels, None, -100, numbers)
    # name -> (elements read and written, the raw operator, its arguments)
    work = {
        "rms_norm": (2 * x.numel(), norm._rms_norm, x, None, weight, 1e-6, 0.0),
        "rms_norm, residual": (4 * x.numel(), norm._rms_norm, x, residual, weight, 1e-6, 0.0),
        "rms_norm_backward": (
            3 * x.numel(), norm._rms_norm_backward, dy, None, x, weight, rstd, 0.0, True,
        ),
        "layer_norm": (2 * x.numel(), norm._layer_norm, x, None, weight, weight, 1e-5),
        "layer_norm_backward": (
            3 * x.numel(), norm._layer_norm_backward,
            dy, None, x, weight, mean, layer_rstd, True, True,
        ),
        "gated_mlp": (3 * gate.numel(), mlp._gated_mlp, gate, up, "silu"),
        "gated_mlp_backward": (
            5 * gate.numel(), mlp._gated_mlp_backward, dh, gate, up, "silu", False,
        ),
        "gated_mlp_backward, with h": (
            6 * gate.numel(), mlp._gated_mlp_backward, dh, gate, up, "silu", True,
        ),
        "rotary": (2 * (q.numel() + k.numel()), rotary._rotary, q, k, *angles, 1),
        "rotary_backward": (
            2 * (q.numel() + k.numel()), rotary._rotary_backward, q, k, *angles, 1, True,
        ),
        "cross_entropy": (
            logits.numel(), losses._cross_entropy, logits, labels, None, -100, numbers,
        ),
        "cross_entropy_backward": (
            2 * logits.numel(), losses._cross_entropy_backward,
            ones, logits, labels, None, stats, -100, numbers,
        ),
        "low_rank_dot": (gate.numel(), low_rank._low_rank_dot, gate, wide, None, 1.0, 1.0),
        "low_rank_sum": (gate.numel(), low_rank._low_rank_sum, gate, narrow, None, 1.0, 1.0),
        "low_rank_add_": (
            2 * gate.numel(), low_rank._low_rank_add_, gate, narrow, wide, None, 1.0, 1e-3,
        ),
        # A byte is written for each of two that are read.
        "round_rows": (3 * gate.numel() // 2, round_rows._round_rows, gate, None),
        "round_rows_fp8": (3 * gate.numel() // 2, round_rows._round_rows_fp8, gate, None),
    }  # fmt: skip
    size = x.element_size()
    sides, floors = {}, {}
    for name, (elements, *call) in work.items():
        sides[f"fastft {name}"] = Side(partial(*call), compare=False)
        floors[f"fastft {name}"] = Floor(bytes=elements * size)
    sides["fastft cross_entropy_in_place"] = Side(
        lambda own: losses._cross_entropy_in_place(own, labels, None, None, -100, numbers),
        lambda: (logits.clone(),),
        compare=False,
    )
    floors["fastft cross_entropy_in_place"] = Floor(bytes=2 * logits.numel() * size)
    chosen, table = set(sides), operators()
    served = {name: table[name[7:].split(",")[0]][here.device] for name in sides}
    # Beside those that serve the operators: whichever is faster should take their place.
    for name, (elements, _, *arguments) in work.items():
        other = getattr(torch.ops.fastft_cuda, name.split(",")[0], None)
        if other is not None and here.device == "cuda":
            sides[f"CUDA C++ {name}"] = Side(partial(other, *arguments), compare=False)
            floors[f"CUDA C++ {name}"] = Floor(bytes=elements * size)
    report = session.measure(sides, floor=floors)
    report.notes += [f"{name} is the {by}" for name, by in served.items() if "reference" in by]
    every = Goal(
        "each at 85% of copy bandwidth",
        lambda rows: chosen <= rows.keys() and all(rows[n].share >= 0.85 for n in chosen),
    )
    return report.judge(every)


SHAPES = (LLAMA_8B, LLAMA_1B, QWEN_05B)


def kernel_cases() -> list[Case]:
    return [Case.of(f"kernels {shape.name}", kernels, shape) for shape in SHAPES]


def cases() -> list[Case]:
    made = []
    for shape in SHAPES:
        made += [
            Case.of(f"attention packed {shape.name}", attention, shape, False),
            Case.of(f"attention 4 equal {shape.name}", attention, shape, True),
            Case.of(f"rms_norm {shape.name}", rms_norm, shape),
            Case.of(f"gated_mlp {shape.name}", gated_mlp, shape),
            Case.of(f"rotary {shape.name}", rotary_embedding, shape),
            Case.of(f"cross_entropy {shape.name}", cross_entropy, shape),
        ]
    return made
