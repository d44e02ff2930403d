"""A head and its loss: eager, by linear_cross_entropy, and inputs for both."""

import torch
from torch.nn import functional as F

from fastft.ops.linear_cross_entropy import Head, linear_cross_entropy

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LORA_SCALE = 0.5


def eager(x, weight, bias, a, b, class_weight, labels, options):
    options = dict(options)
    softcap, scale = options.pop("softcap", None), options.pop("logit_scale", 1.0)
    logits = F.linear(x, weight, bias)
    if a is not None:
        logits = logits + F.linear(F.linear(x.to(a.dtype), a), b) * LORA_SCALE
    logits = logits * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if class_weight is not None:
        class_weight = class_weight.to(logits.dtype)
    loss = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), class_weight, **options)
    loss = loss.view(labels.shape) if options.get("reduction") == "none" else loss
    return loss.to(x.dtype)


def fused(x, weight, bias, a, b, class_weight, labels, options):
    options = dict(options)
    lora = None if a is None else (a, b, LORA_SCALE)
    head = Head(weight, bias, lora, options.pop("logit_scale", 1.0))
    loss = linear_cross_entropy(x, head, labels, weight=class_weight, **options)
    assert loss.dtype is torch.promote_types(x.dtype, torch.float32)
    # Logits are rounded to x's dtype, so the rule allows the loss that dtype's last places.
    return loss.to(x.dtype)


def inputs(dtype, rows, vocab, hidden=24, lora_dtype=None, bias=True, weighted=False):
    def make(*shape, std=1.0, dtype=dtype):
        return (torch.randn(*shape) * std).to(dtype).requires_grad_()

    lora_dtype = lora_dtype or dtype
    labels = torch.randint(0, vocab, (rows,))
    labels[torch.rand(rows) < 0.4] = -100
    if rows:
        labels[-1] = 0  # one label at least, where eager would give NaN
    return [
        make(rows, hidden),
        make(vocab, hidden, std=2 * hidden**-0.5),
        make(vocab) if bias else None,
        make(3, hidden, std=hidden**-0.5, dtype=lora_dtype),
        make(vocab, 3, dtype=lora_dtype),
        torch.rand(vocab).to(dtype) + 0.1 if weighted else None,
        labels,
    ]
