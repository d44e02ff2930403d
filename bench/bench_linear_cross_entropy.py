"""head and loss at SmolLM2-135M's sizes: eager, PyTorch's chunked operator, and fastft."""

import pytest
import torch
from torch.nn import functional as F

from bench.gpu.peers import torch_linear_cross_entropy
from fastft.ops.linear_cross_entropy import Head, linear_cross_entropy

TOKENS, VOCAB, HIDDEN = 2048, 49_152, 576


def _check(results):
    (loss, *grads), (our_loss, *our_grads) = results["eager"], results["fastft"]
    torch.testing.assert_close(our_loss, loss, rtol=1e-6, atol=0.0)
    for ours, theirs in zip(our_grads, grads, strict=True):
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm()


@pytest.mark.parametrize("case", ["frozen head", "trainable head", "frozen head, 3/4 ignored"])
def bench_linear_cross_entropy(versus, case):
    # As after a final norm; the logits' standard deviation is 2.
    x = (torch.randn(TOKENS, HIDDEN) * 2).requires_grad_()
    weight = torch.randn(VOCAB, HIDDEN) * 0.04
    weight.requires_grad_(case == "trainable head")
    labels = torch.randint(0, VOCAB, (TOKENS,))
    if "ignored" in case:
        labels[torch.rand(TOKENS) < 0.75] = -100
    needing = [t for t in (x, weight) if t.requires_grad]

    def step(loss):
        return loss.detach(), *torch.autograd.grad(loss, needing)

    def chunked():
        function = torch_linear_cross_entropy()
        return lambda: step(function(x, weight, labels))

    versus(
        f"head and loss {TOKENS}x{VOCAB} fp32, {case}",
        {
            "eager": lambda: step(F.cross_entropy(F.linear(x, weight), labels)),
            "fastft": lambda: step(linear_cross_entropy(x, Head(weight), labels)),
        },
        peers={"F.linear_cross_entropy": chunked},
        at_least=0.95,
        check=_check,
        memory=True,
        rounds=5,
    )
