"""verify: the original and the patched computation side by side, on the user's own batch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastft.decode.evaluating import evaluating
from fastft.decode.linears import DECODE_WEIGHT, Unfit
from fastft.foreign import ForeignModule
from fastft.ops.quantized_layer import computing, kind_of
from fastft.patch.base_cost import BaseCost, base_cost
from fastft.patch.confirm import gap, size, undisturbed
from fastft.patch.model import patch, unpatch
from fastft.patch.swap import swap_of, switched_off

# Two orders of summation may differ by this much through a deep model, relative to the tensor.
# transformers' norms and losses compute in float32 even where the model is float64.
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass
class Verification:
    """What differs between original and patched on one batch; `print` shows it, `ok` judges it.

    loss is relative; logits and gradients are the largest relative norm of a difference: of the
    logits at real tokens, and of each trainable tensor's gradient.
    """

    loss: float
    logits: float
    gradients: dict[str, float] = field(default_factory=dict)
    without_gradient: list[str] = field(default_factory=list)  # trainable, got none when patched
    tolerance: float = 1e-3
    remarks: list[str] = field(default_factory=list)
    # With decode_weights: of the batch's tokens, by the weights and by their quantised copies.
    perplexity: tuple[float, float] | None = None
    # With base_weights: what they cost, where the original weights are kept, else a sentence.
    base: BaseCost | str | None = None

    @property
    def worst_gradient(self) -> tuple[str, float]:
        return max(self.gradients.items(), key=lambda item: item[1], default=("", 0.0))

    @property
    def ok(self) -> bool:
        worst = max(self.loss, self.logits, self.worst_gradient[1])
        return worst <= self.tolerance and not self.remarks

    def __str__(self) -> str:
        name, worst = self.worst_gradient
        lines = [
            f"loss        {self.loss:.2e}",
            f"logits      {self.logits:.2e}",
            f"gradients   {worst:.2e}  largest of {len(self.gradients)}" + f", {name}" * bool(name),
        ]
        lines += [f"no gradient: {name}{self._beside(name)}" for name in self.without_gradient]
        if self.perplexity is not None:
            before, stored = self.perplexity
            lines.append(f"perplexity  {before:.4g}, with decode_weights {stored:.4g}")
        lines += [str(self.base)] * (self.base is not None)
        lines += self.remarks
        lines.append(f"{'agrees' if self.ok else 'DIFFERS'} (relative, up to {self.tolerance:g})")
        return "\n".join(lines)

    __repr__ = __str__

    def _beside(self, name: str) -> str:
        only = any(remark.startswith(f"{name}: only") for remark in self.remarks)
        return "" if only else ", nor in the original"


def verify(model: nn.Module, batch: Mapping[str, Any]) -> Verification:
    """Runs model(**batch) as it was and as it is patched, and compares loss, logits, gradients.

    Dropout is off and the random state, `.grad` and training mode are left as they were; a model
    that is not patched is patched for the duration. The batch lies on the model's device; without
    labels, a weighted mean of the logits at real tokens stands for the loss. Over a base of eight
    bits both sides multiply by the weights its numbers stand for; what the eight bits cost against
    the original weights is told beside it, where patch was given a folder that keeps them.
    """
    if not isinstance(batch, Mapping):
        raise TypeError(f"batch: expected a mapping of the model's arguments, got {type(batch)}")
    was_patched = any(swap_of(module) is not None for module in model.modules())
    kept = {name: p.grad for name, p in model.named_parameters()}
    if not was_patched:
        patch(model)
    try:
        with undisturbed(), evaluating(model):
            with computing(model, "numbers"):
                with switched_off(model):
                    wanted = _run(model, batch)
                got = _run(model, batch)
            cost = base_cost(model, batch, _run)
    finally:
        if not was_patched:
            unpatch(model)
        for name, parameter in model.named_parameters():
            parameter.grad = kept[name]
    result = _compare(model, batch, wanted, got)
    kind = kind_of(model)
    if kind is not None:
        unknown = "its cost is not known: patch was given no originals"
        result.base = cost or f"{f'{kind} base':<12}{unknown}"
    try:
        result.perplexity = _perplexity(model, batch)
    except Unfit as unfit:
        result.remarks.append(f"decode_weights are not read: {unfit}")
    return result


def _perplexity(model: ForeignModule, batch: Mapping[str, Any]) -> tuple[float, float] | None:
    copies = any(DECODE_WEIGHT in vars(module) for module in model.modules())
    if not copies or "input_ids" not in batch:
        return None
    from fastft.decode.weights import perplexity

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    with evaluating(model):
        exact, stored = (perplexity(inner, ids, mask, each) for each in (False, True))
        return exact, stored


def _run(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    for parameter in model.parameters():
        parameter.grad = None
    output = model(**batch)
    loss = getattr(output, "loss", None)
    scores = output.logits if "logits" in output else output[0]
    if loss is None:
        weights = torch.linspace(-1, 1, scores[0].numel(), device=scores.device)
        weighted = scores.float() * weights.view_as(scores[0])
        # At padded places a patched model has zeros, where the original computes something.
        tokens = _token_mask(batch, scores)
        loss = (weighted if tokens is None else weighted[tokens]).mean()
    if loss.requires_grad:
        loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    with torch.no_grad():
        return loss.detach(), scores.detach(), grads


def _token_mask(batch: Mapping[str, Any], scores: Tensor) -> Tensor | None:
    """Where scores are a token's, (rows, length); None for scores that are not one per token."""
    mask = batch.get("attention_mask")
    return mask.bool() if isinstance(mask, Tensor) and mask.shape == scores.shape[:2] else None


def _compare(model: nn.Module, batch: Mapping[str, Any], wanted: Any, got: Any) -> Verification:
    logits, ours = wanted[1], got[1]
    tokens = _token_mask(batch, logits)
    if tokens is not None:
        logits, ours = logits[tokens], ours[tokens]
    dtypes = {p.dtype for p in model.parameters()}
    result = Verification(
        _relative(got[0], wanted[0]),
        _relative(ours, logits),
        tolerance=max(_TOLERANCE.get(dtype, 1e-1) for dtype in dtypes),
    )
    rounding = max(torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point)
    largest = max(map(size, wanted[2].values()), default=0.0)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        before, now = wanted[2].get(name), got[2].get(name)
        if now is None:
            result.without_gradient.append(name)
        if (before is None) != (now is None):
            which = "the original has" if now is None else "the patched model has"
            result.remarks.append(f"{name}: only {which} a gradient")
        elif before is not None:
            # A gradient that is zero but for rounding (a key's bias) has no relative error.
            scale = max(size(before), rounding / result.tolerance * largest)
            apart = gap(now, before)
            result.gradients[name] = apart / scale if scale else apart
    return result


def _relative(ours: Tensor, wanted: Tensor) -> float:
    """Of what is zero as it should be (a loss without labels), the difference itself."""
    return gap(ours, wanted) / (size(wanted) or 1.0)
