"""KVCache: keys and values of all layers in memory taken once, each row of its own length.

Appending writes one slot and rolling back changes a length: nothing is copied, where transformers'
default cache copies all it holds for each token. It is a transformers `Cache`, so `model.generate`
takes it as its `cache`; there all rows are as long as each other, and padding lies in slots.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from fastft.decode.cache_name import own_name

SPARE = 64  # slots that growing adds at least


class KVLayer(CacheLayerMixin):
    """Keys and values of one layer: (batch, kv_heads, capacity, head_dim), values perhaps narrower
    as in multi-head latent attention."""

    is_sliding = False
    is_croppable = True
    keys: Tensor
    values: Tensor

    def __init__(self, owner: "KVCache") -> None:
        super().__init__()
        self.owner = owner
        self.used = 0  # slots that `update` has filled

    def allocate(
        self,
        batch: int,
        heads: int,
        dim: int,
        dtype: torch.dtype,
        device: torch.device,
        values: int = 0,
    ) -> None:
        """values: their head dimension, if it is another than that of the keys."""
        shape = (batch, heads, self.owner.capacity)
        self.keys = torch.empty(*shape, dim, dtype=dtype, device=device)
        self.values = torch.empty(*shape, values or dim, dtype=dtype, device=device)
        self.dtype, self.device, self.is_initialized = dtype, device, True

    def grow(self) -> None:
        if not self.is_initialized or self.keys.shape[2] >= self.owner.capacity:
            return
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_empty(*old.shape[:2], self.owner.capacity, old.shape[3])
            new[:, :, : old.shape[2]] = old
            setattr(self, name, new)

    # ---- what transformers asks of a layer: rows of the same length --------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch, heads, _, dim = key_states.shape
        values = value_states.shape[-1]
        self.allocate(batch, heads, dim, key_states.dtype, key_states.device, values)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.owner.need_even_rows()
        self.owner.tokens = None
        end = self.used + key_states.shape[2]
        self.owner.reserve(end)
        self.keys[:, :, self.used : end] = key_states
        self.values[:, :, self.used : end] = value_states
        self.used = end
        # Not set_lengths: the layers above have not been given theirs yet.
        self.owner.lengths = [end] * len(key_states)
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.used + query_length, 0

    def get_seq_length(self) -> int:
        return self.used

    def get_max_length(self) -> int:
        return -1

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.is_initialized:
            self.keys, self.values = self.keys[indices], self.values[indices]


class KVCache(Cache):
    """`lengths[row]` slots of each row are in use; room for `capacity`, which grows on demand.

    `tokens[row]` begins with the tokens in those slots, where `fastft.generate` has put them there:
    a later call finds by them what it need not compute again. None where a model's forward did.
    """

    layers: list[KVLayer]  # type: ignore[assignment]

    def __init__(self, layers: int, capacity: int = 0) -> None:
        self.capacity = capacity
        self.lengths: list[int] = []
        self.tokens: list[list[int]] | None = None
        super().__init__(layers=[KVLayer(self) for _ in range(layers)])

    def allocate(
        self, batch: int, heads: int, dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Takes the memory of all layers; rows start empty."""
        for layer in self.layers:
            layer.allocate(batch, heads, dim, dtype, device)
        self.tokens = [[] for _ in range(batch)]
        self.set_lengths([0] * batch)

    def reserve(self, capacity: int) -> None:
        """Makes room for so many slots a row, keeping what is there."""
        if capacity > self.capacity:
            # By half more, so that a cache that grows slot by slot is seldom copied.
            self.capacity = max(capacity, self.capacity + self.capacity // 2, SPARE)
            for layer in self.layers:
                layer.grow()

    def set_lengths(self, lengths: Sequence[int]) -> None:
        self.lengths = list(lengths)
        self._sync_used()

    def roll_back(self, row: int, length: int) -> None:
        """Forgets what the row holds beyond `length`."""
        if not 0 <= length <= self.lengths[row]:
            raise ValueError(
                f"length: expected 0 to the row's {self.lengths[row]} slots, got {length}"
            )
        self.lengths[row] = length
        self._sync_used()

    def keep_common(self, prompts: list[list[int]]) -> None:
        """Keeps of each row what its prompt begins with, and leaves at least its last token out.

        Raises: ValueError where it is not known which tokens the slots hold, and they cannot be the
        beginning of the prompt.
        """
        for row, prompt in enumerate(prompts):
            most = min(self.lengths[row], len(prompt) - 1)
            if self.tokens is None and most < self.lengths[row] - 1:
                raise ValueError(
                    f"{own_name()}: row {row} holds {self.lengths[row]} tokens, its input, "
                    f"which should begin with them, has {len(prompt)}"
                )
            if self.tokens is not None:
                held = self.tokens[row]
                most = next((i for i in range(most) if held[i] != prompt[i]), most)
            self.lengths[row] = most
        self.tokens = [p[:n] for p, n in zip(prompts, self.lengths, strict=True)]
        self._sync_used()

    def keep_rows(self, rows: list[int]) -> None:
        """Keeps these rows, in this order; a row may be repeated."""
        self.batch_select_indices(torch.tensor(rows, dtype=torch.long))

    # transformers' ways to choose rows, which its own caches carry out layer by layer.

    def batch_select_indices(self, indices: Tensor) -> None:
        for layer in self.layers:
            if layer.is_initialized:
                layer.batch_select_indices(indices.to(layer.device))
        if self.lengths:
            rows = torch.arange(len(self.lengths))[indices.cpu()].tolist()
            self.lengths = [self.lengths[row] for row in rows]
            if self.tokens is not None:
                self.tokens = [list(self.tokens[row]) for row in rows]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.keep_rows([row for row in range(len(self.lengths)) for _ in range(repeats)])

    def need_even_rows(self) -> None:
        if len(set(self.lengths)) > 1:
            raise ValueError(
                f"{own_name()}: rows of different lengths ({min(self.lengths)} to "
                f"{max(self.lengths)}) need fastft.generate: a model's forward expects them even"
            )

    def crop(self, max_length: int) -> None:
        """As transformers has it: by -max_length slots, or where positive to that many."""
        longest = max(self.lengths, default=0)
        keep = max_length if max_length > 0 else max(longest + max_length, 0)
        self.set_lengths([min(length, keep) for length in self.lengths])

    def reset(self) -> None:
        self.set_lengths([0] * len(self.lengths))

    def _sync_used(self) -> None:
        # A ragged cache refuses `update`, so one number does for all rows.
        used = max(self.lengths, default=0)
        for layer in self.layers:
            layer.used = used
