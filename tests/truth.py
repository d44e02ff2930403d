"""The relative rule every operator is held to.

Against a float64 truth, our error (relative norm per tensor) is at most 1.5 times that of PyTorch
eager in the same dtype, plus 2 ulp of the tensor's largest magnitude for another summation order.
"""

from collections.abc import Callable

import torch
from torch import Tensor

NAMES = ("output", "gradient")


def leaves(args, dtype=None) -> list:
    """Fresh copies of the tensors that require grad state as given; floats cast to dtype."""
    copies = []
    for arg in args:
        if isinstance(arg, Tensor) and arg.is_floating_point():
            copy = arg.detach().clone() if dtype is None else arg.detach().to(dtype)
            # A clone of a strided view is dense, and the layout may be what is tested.
            if dtype is None:
                copy = torch.empty_strided(arg.shape, arg.stride(), dtype=arg.dtype).copy_(arg)
            copies.append(copy.requires_grad_(arg.requires_grad))
        else:
            copies.append(arg)
    return copies


def run(function, args, grads=None) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs of function(*args), and the gradients of every argument that requires one."""
    out = function(*args)
    outs = [o for o in (out if isinstance(out, tuple) else (out,)) if o is not None]
    needing = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
    if grads is None:
        grads = [torch.ones_like(o) for o in outs]
    if not needing:
        return [o.detach() for o in outs], []
    pairs = [(o, g.to(o.dtype)) for g, o in zip(grads, outs, strict=True) if o.requires_grad]
    got = torch.autograd.grad([o for o, _ in pairs], needing, [g for _, g in pairs])
    return [o.detach() for o in outs], list(got)


def assert_as_exact(ours, eager, args) -> None:
    """Runs both on the same arguments, and eager on float64 ones, and applies the rule to all."""
    truth_args = leaves(args, torch.float64)
    probe = eager(*leaves(args, torch.float64))
    probe = probe if isinstance(probe, tuple) else (probe,)
    grads = [torch.randn(o.shape, dtype=torch.float64) for o in probe if o is not None]
    # The truth must see the upstream gradients the others see: rounded to the working dtype.
    dtype = next(a.dtype for a in args if isinstance(a, Tensor) and a.is_floating_point())
    grads = [g.to(dtype).double() for g in grads]
    truth = run(eager, truth_args, grads)
    reference = run(eager, leaves(args), grads)
    got = run(ours, leaves(args), grads)
    for kind, t_list, r_list, g_list in zip(NAMES, truth, reference, got, strict=True):
        assert len(t_list) == len(g_list)
        for index, (t, r, g) in enumerate(zip(t_list, r_list, g_list, strict=True)):
            assert g.shape == t.shape and g.dtype == r.dtype, f"{kind} {index}: {g.shape} {g.dtype}"
            assert_close(g, r, t, f"{kind} {index}")


def assert_close(ours: Tensor, eager: Tensor, truth: Tensor, what: str):
    assert bool(torch.isfinite(ours).all()), f"{what}: not finite"
    if truth.numel() == 0:
        return
    scale = truth.norm()
    ulp = torch.finfo(ours.dtype).eps * truth.abs().max()
    slack = 2 * ulp * truth.numel() ** 0.5
    error, allowed = (ours.double() - truth).norm(), (eager.double() - truth).norm()
    if not bool(torch.isfinite(eager).all()):
        allowed = allowed.new_zeros(())  # where eager overflows, only the last places are left
    assert error <= 1.5 * allowed + slack, (
        f"{what}: relative error {error / scale:.3g}, eager has {allowed / scale:.3g}"
    )


def beside_logits(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The loss plus a number as large as the logits it is a difference of.

    A single small loss is exact in eager by luck at times; the rule is to measure it against the
    rounding of its logits.
    """
    return lambda *args: function(*args) + 10.0


def same_bits(x: Tensor, y: Tensor) -> bool:
    """0 and -0 differ, and NaN is NaN."""
    assert x.shape == y.shape and x.dtype == y.dtype
    return torch.equal(*(t.contiguous().flatten().view(torch.uint8) for t in (x, y)))


def assert_same_bits_for_any_threads(compute: Callable[[], tuple[Tensor, ...] | Tensor]):
    """compute() gives the same bits on 1, 2, 3 and 16 threads."""
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 16):
            torch.set_num_threads(count)
            out = compute()
            results.append((out,) if isinstance(out, Tensor) else out)
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))
