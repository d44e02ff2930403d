"""ModuleStep: the decode step of a model that `decoder_layer` does not cover, by its own modules.

All rows share the slots of one cache; what a row does not use of them, padding and rejected drafts,
is masked. So a batch may be ragged, and a single row is rolled back without a trace.
"""

import inspect
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from fastft.decode.cache import KVCache
from fastft.decode.cache_name import cache_name
from fastft.decode.layers import draws_dropout
from fastft.decode.linears import Unfit
from fastft.foreign import ForeignModule


class ModuleCache:
    """A KVCache with even rows, and which of its slots count for each row."""

    def __init__(self, layers: int, rows: int, capacity: int, device: torch.device) -> None:
        self.slots = KVCache(layers, capacity)
        self.valid = torch.zeros(rows, 0, dtype=torch.long, device=device)  # (rows, slots)
        self.lengths = [0] * rows
        self.tokens: list[list[int]] = [[] for _ in range(rows)]  # as of a KVCache

    def roll_back(self, row: int, length: int) -> None:
        if not 0 <= length <= self.lengths[row]:
            raise ValueError(
                f"length: expected 0 to the row's {self.lengths[row]} slots, got {length}"
            )
        surplus = self.lengths[row] - length
        if surplus:
            self.valid[row, self.valid[row].nonzero()[-surplus:, 0]] = 0
        self.lengths[row] = length
        # Slots at the end that no row uses any more are given back.
        used = int(self.valid.any(0).nonzero().amax()) + 1 if any(self.lengths) else 0
        if used < self.valid.shape[1]:
            self.valid = self.valid[:, :used]
            self.slots.crop(used)


# Other names of what `sliding_window` is; too wide for the few tokens of a trial.
_WINDOWS = ("window_size", "attention_window_size", "attention_chunk_size")

_confirmed: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


class ModuleStep:
    """A row's tokens agree with the model's own up to ties: widths and masks change roundings."""

    bit_exact = False

    def __init__(self, model: ForeignModule) -> None:
        config = model.config.get_text_config(decoder=True)
        taken = inspect.signature(type(model).forward).parameters
        if config.is_encoder_decoder or model.config.is_encoder_decoder:
            raise Unfit(f"{type(model).__name__} is an encoder-decoder model")
        name = cache_name(taken)
        if model._is_stateful or name is None or "attention_mask" not in taken:
            raise Unfit(f"{type(model).__name__} keeps a state that cannot be rolled back")
        self.cache_name = name
        if getattr(config, "sliding_window", None) and set(
            getattr(config, "layer_types", None) or ["sliding_attention"]
        ) != {"full_attention"}:
            raise Unfit("a sliding window, in which masked slots would count")
        if any(getattr(config, name, None) for name in _WINDOWS):
            raise Unfit("attention to parts of a row, in which masked slots would count")
        self.model, self.device = model, model.device
        self.layers = config.num_hidden_layers
        self.takes_positions = "position_ids" in taken
        self.keeps_logits = "logits_to_keep" in taken
        self.vocabulary = model.get_output_embeddings().weight.shape[0]
        self.most_positions = None
        if draws_dropout(model):
            raise Unfit("the model is in training mode with dropout: call model.eval()")
        self._confirm()

    @torch.no_grad()
    def _confirm(self) -> None:
        """Raises Unfit unless a ragged batch that is rolled back goes on as each row would alone.

        Asked once per model. A state beside the cache shows here, and positions that do not follow
        the mask.
        """
        model = self.model
        parts = tuple(type(module) for module in model.modules())
        if _confirmed.get(model) == parts:
            return
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, self.vocabulary, (2, 9), generator=generator)
        first, second = ids.tolist()
        try:
            cache = self.new_cache(2, 9)
            self(cache, [first[:5], second[:2]])
            self(cache, [first[5:8], second[4:7]], keep=3)  # of which the second takes nothing
            cache.roll_back(0, 7)
            cache.roll_back(1, 2)
            ours = self(cache, [first[7:9], second[2:3]], keep=2)
            alone = (torch.tensor([row], device=self.device) for row in (first, second[:3]))
            states = [model(input_ids=row, use_cache=False).logits[0].float() for row in alone]
        except Exception as error:  # the forward of an unknown architecture
            raise Unfit(f"its modules cannot be tried: {type(error).__name__}: {error}") from error
        theirs = torch.cat((states[0][-2:], states[1][-1:]))
        gap = float((ours - theirs).norm() / theirs.norm())
        limit = 1e-3 if next(model.parameters()).dtype is torch.float32 else 0.1
        if not gap <= limit:
            raise Unfit(f"its rows, padded and rolled back, differ from each alone (by {gap:.2g})")
        _confirmed[model] = parts

    def new_cache(self, rows: int, capacity: int) -> ModuleCache:
        return ModuleCache(self.layers, rows, capacity, self.device)

    def __call__(self, cache: ModuleCache, new: Sequence[Sequence[int]], keep: int = 1) -> Tensor:
        width = max(map(len, new))
        ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in new])
        fresh = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in new])
        valid = torch.cat((cache.valid, fresh.to(self.device)), 1)
        kwargs: dict[str, Any] = {self.cache_name: cache.slots}
        if self.takes_positions:
            kwargs["position_ids"] = (valid.cumsum(1) - 1).clamp(min=0)[:, -width:]
        if self.keeps_logits:
            kwargs["logits_to_keep"] = keep
        logits = self.model(
            input_ids=ids.to(self.device),
            attention_mask=valid,
            use_cache=True,
            **kwargs,
        ).logits[:, -keep:]
        cache.valid = valid
        cache.lengths = [n + len(row) for n, row in zip(cache.lengths, new, strict=True)]
        kept = [own[len(own) - min(keep, len(row)) :] for own, row in zip(logits, new, strict=True)]
        return torch.cat(kept).float()
