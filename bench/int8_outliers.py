"""Ways to treat outliers of activations in front of an int8 base, and what each costs in quality.

Forward passes with inputs and weights rounded as the variant says, products in float32 of what the
numbers stand for: the sums of integers are exact, so this is what integer products give. Calibrated
on other text than is measured.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.workflows import MINILM, SMOLLM, table
from fastft.ops.quantized_linear import dequantize, quantize
from fastft.ops.round_rows import _round_rows
from fastft.patch import patch

TOKENS, LENGTH = 4096, 256
POWER = 0.5


@dataclass(frozen=True)
class Variant:
    """How rows of x are rounded before the product."""

    name: str
    rounds: bool = True
    clip: float = 1.0  # of a row's largest size
    channels: int = 0  # input channels that stay in float32, the worst of other text
    found: int = 0  # the same, the worst of the batch itself
    smooth: bool = False  # scales of input channels moved into the weight, where a norm gives x


VARIANTS = (
    Variant("none: weights alone in int8", rounds=False),
    Variant("scales per token"),
    Variant("clipped at 0.9 of the largest", clip=0.9),
    Variant("smoothing folded into the norms", smooth=True),
    Variant("4 calibrated input channels in float32, and smoothing", channels=4, smooth=True),
    Variant("16 calibrated input channels in float32", channels=16),
    Variant("8 channels in float32, found in each batch", found=8),
    Variant("16 channels in float32, found in each batch", found=16),
    Variant("32 channels in float32, found in each batch", found=32),
)


def _round(x: Tensor, clip: float) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    if clip < 1:
        most = rows.abs().amax(1, keepdim=True) * clip
        rows = rows.clamp(-most, most)
    values, scale = _round_rows(rows, None)
    return (values * scale[:, None]).view_as(x)


class Simulated(nn.Module):
    def __init__(self, layer: nn.Linear, variant: Variant, peak: Tensor, from_norm: bool):
        super().__init__()
        self.variant, self.bias = variant, layer.bias
        weight = layer.weight.detach()
        # Moved to and fro within the layer: the product is the one that folding would give.
        smooth = peak.clamp(min=1e-5) ** POWER / weight.abs().amax(0).clamp(min=1e-5) ** (1 - POWER)
        self.factors = smooth if variant.smooth and from_norm else None
        weight = weight if self.factors is None else weight * self.factors
        self.kept = peak.topk(variant.channels).indices
        self.exact = weight[:, self.kept]
        weight = weight.index_fill(1, self.kept, 0)
        self.rounded = dequantize(quantize(weight))

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.factors is None else x / self.factors
        rest = x.index_fill(-1, self.kept, 0)
        if self.variant.rounds:
            found = rest.abs().flatten(0, -2).amax(0).topk(self.variant.found).indices
            exact = rest[..., found]
            rest = _round(rest.index_fill(-1, found, 0), self.variant.clip)
            rest[..., found] = exact
        y = F.linear(rest, self.rounded)
        y = y + F.linear(x[..., self.kept], self.exact)
        return y if self.bias is None else y + self.bias


def _layers(model: nn.Module) -> dict[str, nn.Linear]:
    return {n: m for n, m in model.named_modules()
            if type(m) is nn.Linear and "head" not in n and "pooler" not in n}  # fmt: skip


def peaks(model: nn.Module, run: Callable) -> dict[str, Tensor]:
    """Largest size of each input channel of each layer."""
    found: dict[str, Tensor] = {}

    def note(name):
        def hook(module, args):
            most = args[0].detach().abs().flatten(0, -2).amax(0)
            found[name] = torch.maximum(found[name], most) if name in found else most

        return hook

    hooks = [m.register_forward_pre_hook(note(n)) for n, m in _layers(model).items()]
    run(model)
    for hook in hooks:
        hook.remove()
    return found


def simulated(model: nn.Module, variant: Variant, found: dict, from_norm: tuple) -> nn.Module:
    model = copy.deepcopy(model)
    for name, layer in _layers(model).items():
        owner, _, own = name.rpartition(".")
        other = Simulated(layer, variant, found[name], own in from_norm)
        setattr(model.get_submodule(owner), own, other)
    return model


def alpaca_rows() -> Tensor:
    """Token ids, rows of LENGTH: four to calibrate, TOKENS to measure."""
    from fastft.finetune import assets, data
    from fastft.finetune.loading import load_tokenizer

    tokenizer = load_tokenizer(SMOLLM)
    records = data.read_alpaca(assets.dataset("alpaca"))
    order = data.shuffled(len(records), 0)
    texts = (f"{data.question(records[i])}\n{records[i]['output']}\n" for i in order)
    ids: list[int] = []
    while len(ids) < TOKENS + 4 * LENGTH:
        ids += tokenizer(next(texts))["input_ids"]
    return torch.tensor(ids[: TOKENS + 4 * LENGTH]).view(-1, LENGTH)


def perplexity(model: nn.Module, rows: Tensor) -> float:
    losses = [model(input_ids=row[None], labels=row[None]).loss for row in rows]
    return math.exp(float(torch.stack(losses).mean()))


@torch.no_grad()
def language() -> list[tuple]:
    from transformers import AutoModelForCausalLM

    from fastft.finetune.loading import locate

    calibration, rows = alpaca_rows().split((4, TOKENS // LENGTH))
    model = AutoModelForCausalLM.from_pretrained(locate(SMOLLM), dtype=torch.float32).eval()

    found = peaks(model, lambda m: m(input_ids=calibration))
    before = perplexity(model, rows)
    told = [("float32", f"{before:.4f}", "")]
    for variant in VARIANTS:
        norm = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
        now = perplexity(simulated(model, variant, found, norm), rows)
        told.append((variant.name, f"{now:.4f}", f"{100 * (now / before - 1):+.2f} %"))
        print(told[-1], flush=True)
    patch(model.requires_grad_(False), base_weights="int8")
    now = perplexity(model, rows)
    told.append(('`fastft.patch(model, base_weights="int8")` itself', f"{now:.4f}",
                 f"{100 * (now / before - 1):+.2f} %"))  # fmt: skip
    return told


@torch.no_grad()
def encoder() -> list[tuple]:
    """A logistic regression on float32 embeddings of reviews, asked with each variant's."""
    from transformers import AutoModel

    from fastft.finetune import assets, labelled
    from fastft.finetune.loading import load_tokenizer, locate

    parts = labelled.read_reviews(assets.dataset("reviews"), "rotten_tomatoes", 1000)
    tokenizer, model = load_tokenizer(MINILM), AutoModel.from_pretrained(locate(MINILM)).eval()

    def embed(model, pairs) -> Tensor:
        out = []
        for begin in range(0, len(pairs), 50):
            texts = [text for text, _ in pairs[begin : begin + 50]]
            batch = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
            mask = batch["attention_mask"][..., None].float()
            states = model(**batch).last_hidden_state
            out.append(F.normalize((states * mask).sum(1) / mask.sum(1)))
        return torch.cat(out)

    train, test = parts[0][:1000], parts[1][:1000]
    labels = torch.tensor([label for _, label in train])
    x = embed(model, train)
    with torch.enable_grad():
        probe = nn.Linear(x.shape[1], 2)
        optimizer = torch.optim.Adam(probe.parameters(), lr=0.05, weight_decay=1e-4)
        for _ in range(400):
            optimizer.zero_grad()
            F.cross_entropy(probe(x), labels).backward()
            optimizer.step()
    truth = torch.tensor([label for _, label in test])

    def score(model) -> tuple[float, float, Tensor]:
        x = embed(model, test)
        logits = probe(x)
        return (
            float(F.cross_entropy(logits, truth)),
            float((logits.argmax(1) == truth).float().mean()),
            x,
        )

    found = peaks(model, lambda m: embed(m, train[:100]))
    loss, accuracy, exact = score(model)
    told = [("float32", f"{loss:.4f}", "", f"{accuracy:.3f}", "")]
    for variant in VARIANTS:
        # Post-norm: what follows a norm is attention's input and the MLP's first layer.
        norm = ("query", "key", "value", "dense")
        now, right, x = score(simulated(model, variant, found, norm))
        told.append((variant.name, f"{now:.4f}", f"{100 * (now / loss - 1):+.2f} %",
                     f"{right:.3f}", f"{float((x * exact).sum(1).mean()):.5f}"))  # fmt: skip
        print(told[-1], flush=True)
    return told


def section(work: Path) -> str:
    torch.manual_seed(0)
    rows = [("rounding of inputs", "perplexity", "change"), *language()]
    others = [("rounding of inputs", "loss", "change", "accuracy", "cosine of embeddings")]
    return (
        f"{SMOLLM}, {TOKENS} tokens of alpaca in rows of {LENGTH}; {4 * LENGTH} other tokens "
        f"calibrate channels and smoothing (power {POWER}). Weights are int8 with a scale per "
        "output channel in every line but the first. fastft finds 16 channels in each batch: of "
        f"what needs no other text, the cheapest within 0.5 %.\n\n{table(rows)}\n\n"
        f"{MINILM}, a logistic regression on the float32 embeddings of "
        "1000 reviews, asked with the embeddings of 1000 others.\n\n" + table([*others, *encoder()])
    )
