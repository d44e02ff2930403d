"""cross_entropy alone, forward and backward, at SmolLM2-135M's vocabulary, against eager."""

import torch
from torch.nn import functional as F

from fastft.ops.cross_entropy import cross_entropy

ROWS, VOCAB = 512, 49_152


def bench_cross_entropy(versus):
    logits = (torch.randn(ROWS, VOCAB) * 2).requires_grad_()
    labels = torch.randint(0, VOCAB, (ROWS,))

    def step(loss):
        return loss.detach(), torch.autograd.grad(loss, logits)[0]

    def check(results):
        (loss, grad), (our_loss, our_grad) = results["eager"], results["fastft"]
        torch.testing.assert_close(our_loss, loss, rtol=1e-6, atol=0.0)
        assert (our_grad - grad).norm() <= 1e-5 * grad.norm()

    versus(
        f"cross entropy {ROWS}x{VOCAB} fp32 fwd+bwd",
        {
            "eager": lambda: step(F.cross_entropy(logits, labels)),
            "fastft": lambda: step(cross_entropy(logits, labels)),
        },
        at_least=1.0,
        check=check,
        memory=True,
        rounds=15,
    )
