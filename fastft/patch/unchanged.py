"""Whether tensors still hold what they held, asked without keeping copies of them.

A tensor's version does not move under fused optimizers or writes to `.data`, so a sample of its
values is kept beside it: an optimizer moves all of a weight, if anything of it.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

_PER_DIMENSION = 16


class Unchanged:
    """Called later: whether nothing is known to have changed. Sharded tensors are not watched."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        watched = [x for x in tensors if type(x) in (Tensor, nn.Parameter) and not x.is_meta]
        self._held = [(x, _version(x), _sample(x)) for x in watched]

    def __call__(self) -> bool:
        return all(
            version == _version(x) and torch.equal(sample, _sample(x))
            for x, version, sample in self._held
            if x.untyped_storage().size() or not x.numel()  # FSDP has freed it
        )


def _version(x: Tensor) -> int | None:
    return None if x.is_inference() else x._version


def _sample(x: Tensor) -> Tensor:
    """Bytes of values at even distances along every dimension."""
    steps = (slice(None, None, max(1, n // _PER_DIMENSION)) for n in x.shape)
    # Bytes, because NaN is not equal to itself.
    return x.detach()[tuple(steps)].flatten().clone().view(torch.uint8)
