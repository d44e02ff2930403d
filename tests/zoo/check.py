"""The journey of one tiny model: as it is, patched, verified, decoding, and given back.

`journey(case)` raises Wrong where a patched model computes anything else than the model did, and
returns what was accelerated.
"""

import signal
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import fastft
from fastft.patch.swap import swap_of
from tests.zoo.tiny import Case

TOLERANCE = 1e-3  # of fastft.verify in float32
PADDINGS = ("none", "right", "left")
NEW_TOKENS = 7


class Wrong(AssertionError):
    """The patched model computes something else; the message says what, and by how much."""


@dataclass
class Journey:
    """What was accelerated, and which way the tokens came."""

    operators: Counter = field(default_factory=Counter)
    left: list[str] = field(default_factory=list)
    decoding: str = ""


def journey(case: Case) -> Journey:
    model = case.build()
    trains = not _draws(model, case.batch())

    def steps():
        return {padding: step(model, case.batch(padding), trains) for padding in PADDINGS}

    wanted = steps()
    configuration = model.config.to_dict()  # some heads write it themselves
    tokens = _generated(case, model)
    report = fastft.patch(model)
    found = Journey(Counter(), [e.reason for e in report.left])
    for entry in report.swapped:
        found.operators[entry.operator] += entry.count
    for padding, got in steps().items():
        _compare(padding, got, wanted[padding])
        result = fastft.verify(model, case.batch(padding))
        if not result.ok:
            raise Wrong(f"{padding} padding, verify:\n{result}")
    if tokens is not None:
        found.decoding = _decode(case, model, tokens)
    fastft.unpatch(model)
    _assert_as_before(model, configuration)
    for padding, again in steps().items():
        if not all(map(torch.equal, again[:2], wanted[padding][:2])):
            raise Wrong(f"{padding} padding, after unpatch: other bits than before")
    return found


def _draws(model: nn.Module, batch: dict) -> bool:
    """Whether a step depends on random numbers though dropout is 0: how many are drawn changes
    with the padding, so it is compared in evaluation mode."""
    return not torch.equal(*(step(model, batch, True, seed)[0] for seed in (0, 1)))


def step(model: nn.Module, batch: dict, trains: bool, seed: int = 0) -> tuple:
    """Loss, logits at real tokens and gradients of one training step."""
    model.train(trains)
    model.zero_grad()
    torch.manual_seed(seed)
    output = model(**batch)
    logits, mask = output.logits.detach() + 0, batch["attention_mask"].bool()
    output.loss.backward()
    if logits.shape[:2] == mask.shape and logits.dim() == 3:
        logits = logits[mask]
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return output.loss.detach(), logits, grads


def _compare(padding: str, got: tuple, wanted: tuple) -> None:
    for name, ours, theirs in zip(("loss", "logits"), got, wanted, strict=False):
        _assert_close(f"{padding} padding, {name}", ours, theirs, theirs.norm())
    if got[2].keys() != wanted[2].keys():
        raise Wrong(f"{padding} padding, gradients: {sorted(got[2].keys() ^ wanted[2].keys())}")
    largest = max(grad.norm() for grad in wanted[2].values())
    for name, theirs in wanted[2].items():
        # As verify has it: a gradient that is zero but for rounding has no relative error.
        scale = max(theirs.norm(), torch.finfo(torch.float32).eps / TOLERANCE * largest)
        _assert_close(f"{padding} padding, gradient of {name}", got[2][name], theirs, scale)


def _assert_close(what: str, ours: Tensor, theirs: Tensor, scale: Tensor) -> None:
    if ours.shape != theirs.shape:
        raise Wrong(f"{what}: shape {tuple(ours.shape)}, expected {tuple(theirs.shape)}")
    gap = float((ours.double() - theirs.double()).norm() / scale.clamp(min=1e-30))
    if not gap <= TOLERANCE:
        raise Wrong(f"{what}: differs by {gap:.2g}")


def _prompts(case: Case) -> dict:
    """Rows of several lengths that repeat themselves, so that prompt lookup has drafts."""
    batch = case.batch("left", seed=1)
    batch["input_ids"][:, -1] = batch["input_ids"][:, -4]
    batch["input_ids"][:, -2] = batch["input_ids"][:, -5]
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def _greedy() -> dict:
    return {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None}


@torch.no_grad()
def _generated(case: Case, model: nn.Module):
    """The model's own greedy tokens; None where it does not generate."""
    if case.head != "causal" or not model.can_generate():
        return None
    model.eval()
    try:
        return type(model).generate(model, **_prompts(case), **_greedy())
    except Exception:  # left padding or a cache that the model itself does not take
        return None


@torch.no_grad()
def _decode(case: Case, model: nn.Module, wanted: Tensor) -> str:
    model.eval()
    paths = []
    for speculation in (None, "prompt_lookup"):
        out = fastft.generate(model, **_prompts(case), **_greedy(), speculation=speculation)
        if not torch.equal(out.sequences, wanted):
            raise Wrong(
                f"generate, speculation {speculation}, {out.stats.path}: other tokens\n"
                f"{out.sequences[:, -NEW_TOKENS:]}\n{wanted[:, -NEW_TOKENS:]}"
            )
        paths.append(out.stats.path)
    own = model.generate(**_prompts(case), **_greedy())
    if not torch.equal(own, wanted):
        raise Wrong("the patched model's own generate: other tokens")
    return " / ".join(dict.fromkeys(paths))


def _assert_as_before(model: nn.Module, configuration: dict) -> None:
    now = model.config.to_dict()
    if now != configuration:
        names = {*now, *configuration}
        other = [n for n in names if now.get(n, "none") != configuration.get(n, "none")]
        raise Wrong(f"unpatch left another configuration: {sorted(other)}")
    for name, module in model.named_modules():
        left = [key for key in vars(module) if "fastft" in key]
        if left or swap_of(module) is not None or "forward" in vars(module):
            raise Wrong(f"unpatch left {left or 'a forward'} on {name}")


@contextmanager
def time_limit(seconds: int):
    """TimeoutError after so many seconds of this process's own time: others may have the cores."""

    def stop(*_):
        raise TimeoutError(f"took longer than {seconds} s")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
