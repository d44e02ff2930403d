"""A launcher against the operator's reference: the same shapes, types and values."""

import torch
from torch import Tensor


def widened(args, dtype):
    return [
        widened(a, dtype)
        if isinstance(a, list)
        else a.to(dtype)
        if isinstance(a, Tensor) and a.is_floating_point()
        else a
        for a in args
    ]


def flat(results) -> list[Tensor]:
    results = results if isinstance(results, tuple) else (results,)
    return [t for r in results for t in (r if isinstance(r, (list, tuple)) else [r])]


def assert_same(launch, op, args, factor: float = 1.5) -> None:
    """launch(*args) is at most `factor` times as far from float64 as the reference, plus 4 ulp."""
    truth = flat(op.reference(*widened(args, torch.float64)))
    wanted, got = flat(op.reference(*args)), flat(launch(*args))
    assert len(got) == len(wanted)
    for index, (t, w, g) in enumerate(zip(truth, wanted, got, strict=True)):
        assert g.shape == w.shape and g.dtype == w.dtype, (index, g.shape, w.shape, g.dtype)
        if not g.numel():
            continue
        ulp = torch.finfo(g.dtype).eps * t.abs().max() * t.numel() ** 0.5
        error, allowed = (g.double() - t).norm(), (w.double() - t).norm()
        assert error <= factor * allowed + 4 * ulp, f"output {index}: {error:.3g}, {allowed:.3g}"
