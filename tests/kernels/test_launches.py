"""Launches beyond 2^31 elements: grids and arguments on the meta device, addresses interpreted.

Memory that nobody touches costs nothing, so tensors of 4 GB and more are only ever a few pages.
"""

import builtins
from importlib import import_module

import pytest
import torch
from triton.runtime import interpreter

FAR = 1 << 28  # elements from row to row: a few rows reach beyond 2^31


@pytest.fixture(autouse=True)
def _untouched_memory():
    torch.utils.deterministic.fill_uninitialized_memory = False


@pytest.fixture
def last_program_only(monkeypatch):
    """Of a long axis of the grid, the interpreter runs the last program alone."""

    def few(*bounds):
        last = len(bounds) == 1 and bounds[0] > 10_000
        return builtins.range(bounds[0] - 1, bounds[0]) if last else builtins.range(*bounds)

    monkeypatch.setattr(interpreter, "range", few, raising=False)


def kernels(name):
    return import_module(f"fastft.kernels.{name}")


def far(x, distance=FAR):
    """The same values, each step along the first axis `distance` elements long."""
    assert x.shape[0] * distance > 1 << 31
    room = torch.empty((x.shape[0] - 1) * distance + x[0].numel(), dtype=x.dtype)
    view = room.as_strided(x.shape, (distance, *x.stride()[1:]))
    return view.copy_(x)


def huge(rows, columns, last=None):
    """A dense half-precision matrix of which only the last row is written, and may be read."""
    x = torch.empty(rows, columns, dtype=torch.float16)
    assert x.numel() > 1 << 31
    if last is not None:
        x[-1] = last
    return x


def flat(results):
    results = results if isinstance(results, tuple | list) else (results,)
    return [t for r in results for t in (r if isinstance(r, tuple | list) else (r,))]


def same(got, wanted):
    for g, w in zip(flat(got), flat(wanted), strict=True):
        assert torch.equal(g, w)


def vectors(*shapes):
    return [torch.randn(*shape).half() for shape in shapes]


@pytest.mark.parametrize("longest", [0, 8192])
def test_norm_reads_rows_that_lie_far_apart(monkeypatch, longest):
    norm = kernels("norm")
    monkeypatch.setattr(norm, "LONGEST", longest)
    x, dy, weight = vectors((12, 24), (12, 24), (24,))
    same(norm.rms_norm(far(x), far(dy), weight, 1e-6, 0.0), norm.rms_norm(x, dy, weight, 1e-6, 0.0))
    *_, mean, rstd = norm.layer_norm(x, None, weight, weight, 1e-5)
    rest = weight, mean, rstd, True, True
    same(
        norm.layer_norm_backward(far(dy), far(x), far(x), *rest),
        norm.layer_norm_backward(dy, x, x, *rest),
    )


@pytest.mark.parametrize("longest", [0, 8192])
def test_norm_writes_beyond_2_to_the_31(monkeypatch, last_program_only, longest):
    norm = kernels("norm")
    monkeypatch.setattr(norm, "LONGEST", longest)
    rows, hidden = (1 << 31) // 4096 + 7, 4096
    x, dy = vectors((1, hidden), (1, hidden))
    y, total, rstd = norm.rms_norm(x.expand(rows, -1), dy.expand(rows, -1), None, 1e-6, 0.0)
    wanted = norm.rms_norm(x, dy, None, 1e-6, 0.0)
    same((y[-1:], total[-1:], rstd[-1:]), wanted)
    # As many groups of rows as rows.
    monkeypatch.setattr(norm, "processors", lambda _: rows)
    dx, _ = norm.rms_norm_backward(
        dy.expand(rows, -1), None, x.expand(rows, -1), None, rstd, 0.0, False
    )
    same(dx[-1:], norm.rms_norm_backward(dy, None, x, None, rstd[-1:], 0.0, False)[0])


def test_cross_entropy(last_program_only):
    loss = kernels("cross_entropy")
    logits, upstream = torch.randn(10, 40).half(), torch.randn(10)
    labels, numbers = torch.randint(0, 40, (10,)), [0.1, 0.0, 1.0]
    losses, stats = loss.cross_entropy(logits, labels, None, -100, numbers)
    same(loss.cross_entropy(far(logits), labels, None, -100, numbers), (losses, stats))
    apart, near = far(logits), logits.clone()
    for each in (apart, near):
        loss.cross_entropy_in_place(each, labels, None, upstream, -100, numbers)
    same(apart, near)
    rows, vocab = (1 << 31) // 8192 + 11, 8192
    last = torch.randn(1, vocab).half()
    label, one = torch.tensor([5]), torch.ones(1)
    _, stats = loss.cross_entropy(last, label, None, -100, numbers)
    args = label.expand(rows), None, stats.expand(rows, 2).contiguous(), -100, numbers
    dlogits = loss.cross_entropy_backward(one.expand(rows), huge(rows, vocab, last), *args)
    wanted = loss.cross_entropy_backward(one, last, label, None, stats, -100, numbers)
    half = vocab // 2  # the last program's piece
    same(dlogits[-1:, half:], wanted[:, half:])


def test_gated_mlp(last_program_only):
    mlp = kernels("gated_mlp")
    dh, gate, up = vectors((10, 40), (10, 40), (10, 40))
    apart = [far(x) for x in (dh, gate, up)]
    same(mlp.gated_mlp(*apart[1:], "silu"), mlp.gated_mlp(gate, up, "silu"))
    args = "silu", True
    same(mlp.gated_mlp_backward(*apart, *args), mlp.gated_mlp_backward(dh, gate, up, *args))
    rows, width = (1 << 31) // 4096 + 1, 4096
    last = vectors((1, width), (1, width))
    h = mlp.gated_mlp(*(huge(rows, width, x) for x in last), "silu")
    piece = slice(-(h.numel() % mlp.BLOCK or mlp.BLOCK), None)
    same(h.view(-1)[piece], mlp.gated_mlp(*last, "silu").view(-1)[piece])


def test_rotary():
    rotary = kernels("rotary")
    q, k = vectors((10, 2, 3, 8), (10, 1, 3, 8))
    cos, sin = torch.randn(2, 10, 3, 8).unbind()
    args = far(q), far(k), far(cos), far(sin), 1
    same(rotary.rotary(*args), rotary.rotary(q, k, cos, sin, 1))


def test_eight_bits():
    rounding, scaling = kernels("round_rows"), kernels("int8_linear")
    (x,) = vectors((10, 40))
    same(rounding.round_rows(far(x), None), rounding.round_rows(x, None))
    near, total = torch.randint(-99, 99, (10, 40), dtype=torch.int32), torch.randn(10, 40)
    apart, rest = near.clone(), (torch.rand(10), None, None)
    scaling.scale_sums_(apart, *rest, far(total))
    scaling.scale_sums_(near, *rest, total)
    same(apart, near)


def test_low_rank():
    thin = kernels("low_rank")
    (matrix,) = vectors((20, 40))
    wide, narrow, rest = torch.randn(4, 40), torch.randn(20, 4), (None, 1.0, 1.0)
    same(thin.low_rank_dot(far(matrix), wide, *rest), thin.low_rank_dot(matrix, wide, *rest))
    same(
        thin.low_rank_sum(far(matrix), far(narrow), *rest),
        thin.low_rank_sum(matrix, narrow, *rest),
    )
    apart = far(matrix)
    for each in (apart, matrix):
        thin.low_rank_add_(each, narrow, wide, *rest)
    same(apart, matrix)


def test_linear_cross_entropy():
    loss = kernels("linear_cross_entropy")
    x, weight = vectors((10, 8), (10, 8))
    labels, options = torch.randint(0, 10, (10,)), (-100, [0.0, 1.0])
    forward, backward = (
        loss.linear_cross_entropy_blockwise,
        loss.linear_cross_entropy_blockwise_backward,
    )
    losses, lse = forward(x, weight, labels, *options)
    same(forward(far(x), far(weight), labels, *options), (losses, lse))
    rest = labels, lse, *options, [True, True]
    same(backward(losses, far(x), far(weight), *rest), backward(losses, x, weight, *rest))


def test_attention():
    attention, backward = kernels("attention"), kernels("attention_backward")
    q, k, v, dout = vectors((140, 2, 16), (140, 1, 16), (140, 1, 16), (140, 2, 16))
    cu = torch.tensor([0, 135, 140], dtype=torch.int32)
    rest = cu, cu, None, 0.25, True, -1, 0.0, 0.0
    out, lse = attention.attention(q, k, v, *rest)
    # Within one tile, of up to 128 rows, attention counts in 32 bits.
    apart = [far(x, 1 << 24) for x in (q, k, v, dout)]
    same(attention.attention(*apart[:3], *rest), (out, lse))
    args = out, lse, *rest, True, True, True
    same(
        backward.attention_backward(apart[3], *apart[:3], *args),
        backward.attention_backward(dout, q, k, v, *args),
    )


class Recorder:
    """Takes a kernel's place: notes every launch's grid, and that its arguments fit the kernel."""

    def __init__(self, kernel, grids):
        self.names, self.grids = kernel.arg_names, grids

    def __getitem__(self, grid):
        def launch(*args, **options):
            options = {name: value for name, value in options.items() if name in self.names}
            assert len(args) + len(options) == len(self.names)
            self.grids.append(grid)

        return launch


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="meta")


def cases():
    rows, hidden, vocab = 1 << 20, 4096, 256_000
    x, floats = meta(rows, hidden), meta(rows, dtype=torch.float32)
    labels, cu = meta(rows, dtype=torch.int64), meta(9, dtype=torch.int32)
    logits, weight = meta(16_384, vocab), meta(vocab, hidden)
    heads = [meta(rows, n, 128) for n in (64, 8, 8)]
    wide, narrow = meta(16, hidden, dtype=torch.float32), meta(rows, 16, dtype=torch.float32)
    rest = cu, cu, None, 0.1, True, -1, 0.0, 0.0
    out, lse = meta(rows, 64, 128), meta(64, rows, dtype=torch.float32)
    angles = meta(8, rows // 8, 128)
    turned = [meta(8, rows // 8, n, 128).transpose(1, 2) for n in (64, 8)]
    stats, some = meta(16_384, 2, dtype=torch.float32), labels[:16_384]
    numbers, both = [0.0, 0.0, 1.0], [True, True]
    yield "norm", "rms_norm", (x, x, x[0], 1e-6, 0.0)
    yield "norm", "rms_norm_backward", (x, x, x, x[0], floats, 0.0, True)
    yield "cross_entropy", "cross_entropy", (logits, some, None, -100, numbers)
    args = floats[:16_384], logits, some, None, stats, -100, numbers
    yield "cross_entropy", "cross_entropy_backward", args
    yield "gated_mlp", "gated_mlp", (x, x, "silu")
    yield "gated_mlp", "gated_mlp_backward", (x, x, x, "silu", True)
    yield "rotary", "rotary", (*turned, angles, angles, 1)
    yield "round_rows", "round_rows_fp8", (x, None)
    sums = meta(rows, hidden, dtype=torch.int32)
    yield "int8_linear", "scale_sums_", (sums, floats, None, None, None)
    yield "low_rank", "low_rank_dot", (x, wide, None, 1.0, 1.0)
    yield "low_rank", "low_rank_sum", (x, narrow, None, 1.0, 1.0)
    yield "low_rank", "low_rank_add_", (x, narrow, wide, None, 1.0, 1.0)
    args = x, weight, labels, -100, [0.0, 1.0]
    yield "linear_cross_entropy", "linear_cross_entropy_blockwise", args
    args = floats, x, weight, labels, floats, -100, [0.0, 1.0], both
    yield "linear_cross_entropy", "linear_cross_entropy_blockwise_backward", args
    yield "attention", "attention", (*heads, *rest)
    args = heads[0], *heads, out, lse, *rest, True, True, True
    yield "attention_backward", "attention_backward", args


@pytest.mark.parametrize(("file", "launcher", "args"), [pytest.param(*c, id=c[1]) for c in cases()])
def test_grids_of_the_largest_problems(monkeypatch, file, launcher, args):
    module, grids = kernels(file), []
    for name, value in list(vars(module).items()):
        if hasattr(value, "arg_names") and hasattr(value, "run"):
            monkeypatch.setattr(module, name, Recorder(value, grids))
    getattr(module, launcher)(*args)
    assert grids
    for grid in grids:
        x, y, z = (*grid, 1, 1)[:3]
        assert 0 < x < 1 << 31 and 0 < y < 1 << 16 and 0 < z < 1 << 16
