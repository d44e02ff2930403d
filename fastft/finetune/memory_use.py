"""What a step of training holds in memory, counted."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def of_weights(model: nn.Module) -> dict[str, int]:
    """Bytes of the weights, of their gradients, and of AdamW's two moments of what is trained."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return {"weights": weights, "gradients": trained, "optimizer": 2 * trained}


@contextmanager
def kept_for_backward(model: nn.Module) -> Iterator[dict[int, int]]:
    """Inside, {address: bytes} fills with what the forward pass keeps, the weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept
