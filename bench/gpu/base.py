"""LoRA steps over a frozen base of fewer bits, beside the same step over the base as it is.

Every side has a model, an optimizer and a base of its own, all on the device at once; the bytes of
each base are told.
"""

import copy
import gc
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

import fastft
from bench.gpu import peers
from bench.gpu.case import Case, Goal, Here, Report, Row, Skip
from bench.gpu.measure import Session, Side
from bench.gpu.shapes import LLAMA_1B, LLAMA_8B, Shape
from bench.gpu.steps import Steps, causal_lm, causal_steps, patched, with_lora
from fastft.ops import fp8_linear

PLAIN = "fastft, base as it is"
NAMES = {"int8": "fastft", "fp8": "fastft fp8"}
FASTER, SMALLER = 1.3, 2.0


def base_bytes(model: nn.Module) -> int:
    """What the linear layers under the adapters hold, scales and all."""
    total = 0
    for name, module in model.named_modules():
        if not name.endswith(".base_layer"):
            continue
        held = [*module._parameters.values(), *module.buffers()]
        for parameter in module._parameters.values():  # of bitsandbytes: scales, scales of scales
            held.append(getattr(parameter, "SCB", None))
            state = getattr(parameter, "quant_state", None)
            held += [getattr(state, "absmax", None)]
            held += [getattr(getattr(state, "state2", None), "absmax", None)]
        total += sum(t.numel() * t.element_size() for t in held if t is not None)
    return total


def _own_side(work: Steps, model: nn.Module) -> Side:
    side = Steps(model, work.batch, work.floor).side(model)
    return replace(side, compare=False)  # eight bits are not what the others compute


def _over(work: Steps, kind: str, held: dict[str, int], notes: list[str]) -> Side:
    """fastft over its base of this kind. Raises: Skip where the card has no such products."""
    device = next(work.model.parameters()).device
    lacking = fp8_linear.why_not(device) if kind == "fp8" else None
    if lacking is not None:
        raise Skip(lacking)
    # A copy of its own: the weights that it gives up are the other sides' otherwise.
    model = copy.deepcopy(work.model)
    told = fastft.patch(model, base_weights=kind)
    gc.collect()
    held[NAMES[kind]] = base_bytes(model)
    notes.append(f"{told.count(f'{kind}_linear')} layers of {kind}")
    return _own_side(work, model)


def _over_bitsandbytes(
    here: Here, shape: Shape, work: Steps, name: str, held: dict[str, int]
) -> Side:
    """PEFT's own adapters over bitsandbytes' layers."""
    four_bits = name.endswith("NF4")
    stored = peers.bitsandbytes(here, four_bits)
    torch.manual_seed(0)
    model = causal_lm(here, shape).requires_grad_(False)
    head = model.get_output_embeddings()
    for parent in list(model.modules()):
        for own, layer in list(parent.named_children()):
            if type(layer) is nn.Linear and layer is not head:
                setattr(parent, own, stored(layer))
    setattr(model, "is_loaded_in_4bit" if four_bits else "is_loaded_in_8bit", True)  # asks PEFT
    model = with_lora(model)
    for parameter in model.parameters():
        if parameter.requires_grad:  # float32, where PEFT finds no base's type to take
            parameter.data = parameter.data.to(here.dtype)
    gc.collect()
    held[name] = base_bytes(model)
    return _own_side(work, model)


def _goal(kind: str, held: dict[str, int]) -> Goal:
    name = NAMES[kind]

    def reached(rows: dict[str, Row]) -> bool:
        faster = FASTER * rows[name].ms <= rows[PLAIN].ms
        # Scales are two thousandths of a weight and less.
        return faster and held[PLAIN] >= 0.99 * SMALLER * held[name]

    return Goal(f"{kind}: {FASTER} times as fast as over the base as it is, in half of it", reached)


def _measured(
    session: Session, work: Steps, sides: dict[str, Side | Callable], held: dict[str, int]
) -> Report:
    held[PLAIN] = base_bytes(work.model)
    report = work.measure(session, sides)
    told = [f"{row.side} {held.get(row.side, held[PLAIN]) / 2**20:,.1f}" for row in report.rows]
    report.notes.append(f"MiB that the frozen linear layers hold: {'; '.join(told)}")
    report.notes.append("results over fewer bits are not compared")
    return report


def step(session: Session, shape: Shape) -> Report:
    """int8, and fp8 where the card has it, beside the base's own type."""
    here, shape = session.here, shape.here(session.here)
    work = causal_steps(here, shape, lora=True, ragged=False)
    held: dict[str, int] = {}
    notes: list[str] = []
    sides = {
        "eager": work.side(work.model),
        PLAIN: work.side(patched(work.model)),
        **{NAMES[k]: lambda k=k: _over(work, k, held, notes) for k in NAMES},
    }
    report = _measured(session, work, sides, held)
    report.notes += notes
    return report.judge(*(_goal(kind, held) for kind in NAMES))


def step_beside_bitsandbytes(session: Session, shape: Shape) -> Report:
    here, shape = session.here, shape.here(session.here)
    peers.need(here, "bitsandbytes")
    work = causal_steps(here, shape, lora=True, ragged=False)
    held: dict[str, int] = {}
    names = ("bitsandbytes 8-bit", "bitsandbytes NF4")
    sides = {
        PLAIN: work.side(patched(work.model)),
        NAMES["int8"]: lambda: _over(work, "int8", held, []),
        **{n: lambda n=n: _over_bitsandbytes(here, shape, work, n, held) for n in names},
    }
    report = _measured(session, work, sides, held)
    goal = "int8: ahead of bitsandbytes"
    ahead = [lambda rows, n=n: rows["fastft"].ms <= rows[n].ms for n in names]
    return report.judge(*(Goal(f"{goal}, {n[13:]}", a) for n, a in zip(names, ahead, strict=True)))


def cases() -> list[Case]:
    made = []
    for shape in (LLAMA_1B, LLAMA_8B):
        name = f"LoRA {shape.name}, 4 x 2048, base of"
        made.append(Case.of(f"{name} eight bits", step, shape, limit=240.0))
        made.append(Case.of(f"{name} bitsandbytes", step_beside_bitsandbytes, shape, limit=240.0))
    return made
