"""Operators made of matrix products: layers of LoRA and of eight bits, and a head with its loss."""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.gpu import peers
from bench.gpu.case import Case, Floor, Goal, Here, Report, Skip, ahead_of_all, at_most, randn
from bench.gpu.measure import Session, Side, passes
from bench.gpu.shapes import GEMMA_2B, LLAMA_1B, LLAMA_8B, QWEN_05B, RANK, Shape
from fastft.ops import fp8_linear
from fastft.ops import linear_cross_entropy as heads
from fastft.ops.lora import LoraLinear, lora
from fastft.ops.lora_mlp import lora_mlp
from fastft.ops.quantized_layer import KINDS

SCALE = 2.0
FROZEN, PRODUCTS = "frozen layer alone", "its products alone"
# What a tile's gradient must reach in bfloat16 to be computed by the blockwise forms.
SKIPPED_BELOW = 2.0**-12


def _layer(here: Here, inputs: int, outputs: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, A and B, B nonzero."""
    return (
        randn(here, outputs, inputs, std=inputs**-0.5),
        randn(here, RANK, inputs, std=inputs**-0.5, grad=True),
        randn(here, outputs, RANK, std=0.1, grad=True),
    )


def _eager_lora(x, weight, a, b):
    """peft.tuners.lora.Linear.forward."""
    return F.linear(x, weight) + F.linear(F.linear(x, a), b) * SCALE


def _operations(tokens: int, *layers) -> int:
    """Base products forward and to the input's gradient; the adapters' three each way."""
    return sum(4 * tokens * w.numel() + 6 * tokens * RANK * sum(w.shape) for w, *_ in layers)


def lora_layer(session: Session, shape: Shape, with_unsloth: bool) -> Report:
    here, shape = session.here, shape.here(session.here)
    # unsloth wants a batch of sequences.
    x = randn(here, 4, shape.tokens // 4, shape.hidden, grad=True)
    weight, a, b = _layer(here, shape.hidden, shape.intermediate)
    dy = randn(here, 4, shape.tokens // 4, shape.intermediate)

    def fused(x, a, b):
        return lora(x, LoraLinear(weight, None, a, b, SCALE))

    def eager(x, a, b):
        return _eager_lora(x, weight, a, b)

    def frozen():
        plain = passes(lambda x: F.linear(x, weight), (x,), dy)
        return Side(plain.run, plain.prepare, compare=False)

    sides = {
        "eager": passes(eager, (x, a, b), dy),
        "fastft": passes(fused, (x, a, b), dy),
        FROZEN: frozen,
    }
    if with_unsloth:
        layer, _ = peers.unsloth_lora(here)
        sides["unsloth"] = passes(
            lambda x, a, b: layer(x, weight, a, b, SCALE), (x, a, b), dy, fresh=True
        )
    else:
        sides["torch.compile"] = passes(here.compile(eager), (x, a, b), dy)
    floor = Floor(operations=_operations(shape.tokens, (weight,)), dtype=here.dtype)
    goal = at_most(FROZEN, 1.1, "at most 1.1x of the frozen layer's own two products")
    return session.measure(sides, floor=floor).judge(goal, ahead_of_all(FROZEN))


def frozen_layer(session: Session, shape: Shape) -> Report:
    """Both products of a layer, and the rounding before each, over a weight of each kind."""
    here, shape = session.here, shape.here(session.here)
    x = randn(here, shape.tokens, shape.hidden, grad=True)
    weight, *_ = _layer(here, shape.hidden, shape.intermediate)
    dy = randn(here, shape.tokens, shape.intermediate)

    def over(kind):
        lacking = fp8_linear.why_not(x.device) if kind == "fp8" else None
        if lacking is not None:
            raise Skip(lacking)
        store, multiply = KINDS[kind]
        stored = store(weight)
        return replace(passes(lambda x: multiply(x, stored), (x,), dy), compare=False)

    sides = {
        "eager": passes(lambda x: F.linear(x, weight), (x,), dy),
        "fastft": lambda: over("int8"),
        "fastft fp8": lambda: over("fp8"),
    }
    floor = {"eager": Floor(operations=4 * shape.tokens * weight.numel(), dtype=here.dtype)}
    report = session.measure(sides, floor=floor)
    report.notes.append('"fastft" is int8; the floor is of the weight as it is')
    goals = (("int8", "fastft"), ("fp8", "fastft fp8"))
    return report.judge(
        *(Goal(f"{kind}: 1.3 times as fast as eager",
               lambda rows, side=side: 1.3 * rows[side].ms <= rows["eager"].ms)
          for kind, side in goals)
    )  # fmt: skip


def lora_gated_mlp(session: Session, shape: Shape, with_unsloth: bool) -> Report:
    here, shape = session.here, shape.here(session.here)
    x = randn(here, 4, shape.tokens // 4, shape.hidden, grad=True)
    dy = randn(here, *x.shape)
    layers = (
        _layer(here, shape.hidden, shape.intermediate),
        _layer(here, shape.hidden, shape.intermediate),
        _layer(here, shape.intermediate, shape.hidden),
    )
    weights = [weight for weight, *_ in layers]
    leaves = (x, *(t for _, a, b in layers for t in (a, b)))

    def split(adapters):
        return zip(weights, adapters[0::2], adapters[1::2], strict=True)

    def eager(x, *adapters):
        gate, up, down = split(adapters)
        return _eager_lora(F.silu(_eager_lora(x, *gate)) * _eager_lora(x, *up), *down)

    def fused(x, *adapters):
        return lora_mlp(x, *(LoraLinear(w, None, a, b, SCALE) for w, a, b in split(adapters)))

    sides = {"eager": passes(eager, leaves, dy), "fastft": passes(fused, leaves, dy)}
    if with_unsloth:
        _, mlp = peers.unsloth_lora(here)
        sides["unsloth"] = passes(
            lambda x, *adapters: mlp(x, *((w, a, b, SCALE) for w, a, b in split(adapters))),
            leaves, dy, fresh=True,
        )  # fmt: skip
    else:
        sides["torch.compile"] = passes(here.compile(eager), leaves, dy)
    floor = Floor(operations=_operations(shape.tokens, *layers), dtype=here.dtype)
    return session.measure(sides, floor=floor).judge(ahead_of_all())


def trained(here: Here, shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, head and labels whose loss is a trained model's: 2 nats in the mean.

    Tokens are as frequent as in text (one coordinate carries the logarithm of Zipf's law), the rest
    of the logits is noise of deviation 1.5, and a multiple of the label's row of W is added to x so
    that the losses are distributed exponentially: a few rows are lost, most are nearly certain.
    """
    rows, vocab, hidden, noise = shape.tokens, shape.vocab, shape.hidden, 1.5
    popularity = -torch.log(torch.arange(vocab, device=here.device) + 10.0)
    labels = torch.multinomial(popularity.exp(), rows, replacement=True)
    weight = torch.randn(vocab, hidden, device=here.device) * hidden**-0.5
    # The coordinate that carries the popularity is spread as the others are.
    carried = popularity.std() * hidden**0.5
    weight[:, 0] = popularity / carried
    weight = weight.to(here.dtype)
    x = torch.randn(rows, hidden, device=here.device) * noise
    x[:, 0] = carried
    rest = popularity.exp().sum().log() + noise**2 / 2
    losses = torch.empty(rows, device=here.device).exponential_(0.5).clamp(0.01, 12.0)
    own = weight[labels].float()
    lift = rest - torch.log(torch.expm1(losses)) - (x * own).sum(1)
    x += (lift / own.square().sum(1))[:, None] * own
    return x.to(here.dtype), weight, labels


def told(x: Tensor, weight: Tensor, labels: Tensor, softcap: float | None) -> str:
    """What the loss is, and how many tiles a blockwise backward must compute, on some rows."""
    logits = _logits(x[:512], weight, softcap).float()
    gradient = logits.softmax(-1)
    loss = F.cross_entropy(logits, labels[:512])
    gradient[torch.arange(len(gradient), device=x.device), labels[:512]] -= 1
    tall = len(gradient) // 64 * 64
    wide = weight.shape[0] // 64 * 64
    tiles = gradient[:tall, :wide].abs().unflatten(1, (-1, 64)).unflatten(0, (-1, 64))
    kept = (tiles.amax((1, 3)) >= SKIPPED_BELOW).float().mean()
    return f"loss {loss:.2f}; {kept:.0%} of the tiles of 64 x 64 logits count in bfloat16"


def _logits(x, weight, softcap):
    logits = F.linear(x, weight)
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def linear_cross_entropy(session: Session, shape: Shape, train: bool, softcap) -> Report:
    here, shape = session.here, shape.here(session.here)
    x, weight, labels = trained(here, shape)
    note = told(x, weight, labels, softcap)
    x.requires_grad_()
    weight.requires_grad_(train)
    tensors = (x, weight, labels)

    def eager(x, weight, labels):
        return F.cross_entropy(_logits(x, weight, softcap).float(), labels)

    def fused(x, weight, labels, **form):
        head = heads.Head(weight)
        return heads.linear_cross_entropy(x, head, labels, softcap=softcap, **form)

    def form(name):
        if name == "blockwise":
            here.need_gpu("a Triton kernel")
        return passes(partial(fused, form=name), tensors)

    def products():
        logits = torch.randn(shape.tokens, shape.vocab, device=here.device).to(here.dtype)

        def run():
            torch.mm(x, weight.t(), out=logits)
            return torch.mm(logits, weight), *((torch.mm(logits.t(), x),) if train else ())

        return Side(torch.no_grad()(run), compare=False)

    def without_softcap(make):
        if softcap is not None:
            raise Skip("has no softcap")
        return passes(make(), tensors)

    def cut():
        function = peers.cut_cross_entropy(here)
        return passes(lambda *args: function(*args, softcap=softcap), tensors)

    def liger():
        function = peers.liger(here, "liger_fused_linear_cross_entropy")
        return passes(lambda *args: function(*args, softcap=softcap), tensors)

    sides = {
        "eager": passes(eager, tensors),
        "fastft": passes(fused, tensors),
        "fastft chunked": lambda: form("chunked"),
        "fastft blockwise": lambda: form("blockwise"),
        PRODUCTS: products,
        "cut-cross-entropy": cut,
        "liger-kernel": liger,
        "F.linear_cross_entropy": lambda: without_softcap(peers.torch_linear_cross_entropy),
        "TRL": lambda: passes(peers.trl_loss(here, softcap), tensors),
        "torch.compile": lambda: passes(here.compile(eager), tensors),
    }
    count = 3 if train else 2
    floor = Floor(
        operations=2 * count * shape.tokens * shape.hidden * shape.vocab, dtype=here.dtype
    )
    # Logits are rounded to bfloat16 in some forms and not in others.
    report = session.measure(sides, floor=floor, tolerance=0.1)
    report.notes.append(note)
    return report.judge(*_goals(count))


def _goals(count: int) -> tuple[Goal, ...]:
    def beside_cut(rows):
        theirs, forms = rows["cut-cross-entropy"], ("fastft", "fastft chunked", "fastft blockwise")
        mine = [rows[name] for name in forms if name in rows]
        return any(r.ms <= theirs.ms and r.memory <= 1.05 * theirs.memory for r in mine)

    return (
        Goal(
            f"chunked: within 1.3x of its own {count} products",
            lambda rows: rows["fastft chunked"].ms <= 1.3 * rows[PRODUCTS].ms,
        ),
        Goal("as fast as cut-cross-entropy at its memory", beside_cut),
        ahead_of_all(PRODUCTS),
    )


def cases() -> list[Case]:
    made = []
    for shape in (GEMMA_2B, LLAMA_8B, QWEN_05B, LLAMA_1B):
        for train in (False, True):
            name = f"linear_cross_entropy {shape.name}, {'trained' if train else 'frozen'} head"
            made.append(Case.of(name, linear_cross_entropy, shape, train, None))
    for shape in (LLAMA_8B, LLAMA_1B, QWEN_05B):
        made += [
            Case.of(f"lora layer {shape.name}", lora_layer, shape, False),
            Case.of(f"lora_mlp {shape.name}", lora_gated_mlp, shape, False),
            Case.of(f"layer in eight bits {shape.name}", frozen_layer, shape),
        ]
    name = f"linear_cross_entropy {GEMMA_2B.name}, frozen head, softcap 30"
    made.append(Case.of(name, linear_cross_entropy, GEMMA_2B, False, 30.0))
    for shape in (LLAMA_8B, LLAMA_1B):
        made += [
            Case.of(f"lora layer {shape.name}, unsloth", lora_layer, shape, True, alone="unsloth"),
            Case.of(
                f"lora_mlp {shape.name}, unsloth", lora_gated_mlp, shape, True, alone="unsloth"
            ),
        ]
    return made
