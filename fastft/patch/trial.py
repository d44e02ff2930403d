"""The padded batches that a base model is tried on before its padding is left out."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastft.foreign import ForeignModule
from fastft.patch.confirm import relative
from fastft.patch.packing import Packing, kept
from fastft.patch.swap import switched_off

# What a query sees of a row that is longer than this; a few tokens would not reach it.
_WINDOWS = ("sliding_window", "attention_chunk_size")
_SHORT = 2


@dataclass(frozen=True)
class Trial:
    """Two padded batches that share their first row."""

    first: dict[str, Any]
    second: dict[str, Any]
    packing: Packing

    @staticmethod
    def of(module: ForeignModule, causal: bool) -> "Trial":
        weight = module.get_input_embeddings().weight
        generator = torch.Generator().manual_seed(0)
        # Rows ending in padding, full, with a gap; a causal model's also beginning with padding.
        rows = [[1, 1, 1, 1, 1, 0, 0], [1] * 7, [1, 1, 0, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1]]
        if getattr(module.config, "sliding_window", None):
            rows[2] = rows[1]  # a gap keeps the padding there
        mask = torch.tensor(rows if causal else rows[:3], device=weight.device)
        special = [v for k, v in module.config.to_dict().items() if k.endswith("_token_id")]
        special = [v for v in special if isinstance(v, int) and 0 <= v < weight.shape[0]]

        def tokens() -> Tensor:
            ids = torch.randint(0, weight.shape[0], mask.shape, generator=generator)
            ids[0, : len(special[:5])] = torch.tensor(special[:5], dtype=ids.dtype)
            return ids.to(weight.device)

        first, second = tokens(), tokens()
        second[0] = first[0]
        inputs = {"attention_mask": mask, "use_cache": False, "return_dict": True}
        packing = Packing.of(mask)
        assert packing is not None  # the mask has padding
        return Trial(inputs | {"input_ids": first}, inputs | {"input_ids": second}, packing)

    def differ(self, got: Any, wanted: Any) -> float:
        """By how much two outputs of the first batch do, at the real tokens."""
        return relative(*(self.packing.pack(o.last_hidden_state) for o in (got, wanted)))

    def differs_in_attention(
        self, module: ForeignModule, forward: Callable[..., Any]
    ) -> tuple[Any, float]:
        """The output as before patching, and by how much that of the patched `forward` differs with
        the padding computed; also without padding, where masks are left out."""
        full = self.first | {"attention_mask": torch.ones_like(self.first["attention_mask"])}
        config, ours = module.config, module.config._attn_implementation
        # Asked of the attention modules: a head above may share the configuration and came first.
        before = (vars(child).get("_fastft_attention") for child in module.modules())
        try:
            config._attn_implementation_internal = next(filter(None, before), ours)
            with switched_off(module):
                wanted = type(module).forward(module, **self.first)
                unpadded = type(module).forward(module, **full)
        finally:
            config._attn_implementation_internal = ours
        with kept():
            worst = self.differ(forward(module, **self.first), wanted)
        states = (forward(module, **full).last_hidden_state, unpadded.last_hidden_state)
        return wanted, max(worst, relative(*states))


@contextmanager
def windows_shortened(module: ForeignModule) -> Iterator[None]:
    """Inside, windows end within a few tokens, as the configuration and the modules name them: the
    two may count a window in different ways."""
    config, changed = module.config, []
    held = dict(vars(config))  # a window may be a property of other fields
    try:
        for name in _WINDOWS:
            wide = getattr(config, name, None)
            if type(wide) is not int or wide <= _SHORT:
                continue
            setattr(config, name, _SHORT)
            for child in module.modules():
                window = vars(child).get(name)
                # A module's may be one more or less than the configuration's, and stays so.
                if type(window) is int and abs(window - wide) < _SHORT:
                    changed.append((child, name, window))
                    setattr(child, name, _SHORT + window - wide)
        yield
    finally:
        vars(config).update(held)
        for owner, name, window in changed:
            setattr(owner, name, window)
