"""LoRA steps over a frozen base in eight bits, beside the same step over the base as it is."""

import copy
from dataclasses import replace

import fastft
from bench.gpu.case import Case, Goal, Report
from bench.gpu.measure import Session
from bench.gpu.shapes import LLAMA_1B, LLAMA_8B, Shape
from bench.gpu.steps import causal_steps, patched

PLAIN = "fastft, base as it is"


def step(session: Session, shape: Shape) -> Report:
    here, shape = session.here, shape.here(session.here)
    work = causal_steps(here, shape, lora=True, ragged=False)
    # A copy of its own: the weights that it gives up are the other sides' otherwise.
    ours = copy.deepcopy(work.model)
    trained = [p for p in ours.parameters() if p.requires_grad]
    told = fastft.patch(ours, base_weights="int8")
    side = work.side(ours)

    def run():
        results = side.run()
        for parameter in trained:  # the optimizer is the other sides'
            parameter.grad = None
        return results

    sides = {
        "eager": work.side(work.model),
        PLAIN: work.side(patched(work.model)),
        "fastft": replace(side, run=run, compare=False),
    }
    report = work.measure(session, sides)
    report.notes.append(f"{told.count('int8_linear')} layers of int8; results not compared")
    goal = "1.3 times as fast as over the base as it is"
    return report.judge(Goal(goal, lambda rows: 1.3 * rows["fastft"].ms <= rows[PLAIN].ms))


def cases() -> list[Case]:
    return [
        Case.of(f"LoRA {shape.name}, 4 x 2048, int8 base", step, shape)
        for shape in (LLAMA_1B, LLAMA_8B)
    ]
