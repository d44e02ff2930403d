"""One forward pass over a KVCache for a few new tokens of each row: the step decoding is made of.

Two kinds with one interface: `FusedStep` computes whole layers per operator call and no padding;
`ModuleStep` runs any other causal language model through its own modules.
"""

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastft.decode.cache import KVCache
from fastft.decode.layers import FusedModel, confirm, confirmed, read
from fastft.decode.linears import Reading, is_stored
from fastft.library import extension
from fastft.ops.decoder_layer import Tokens, decoder_layer, decoder_layers
from fastft.ops.norm import _layer_norm, _rms_norm
from fastft.ops.quantized_linear import _quantized_linear

# Tokens of a row that one pass takes: prompts beyond are cut, at places that change no bit.
CHUNK = 128


def last(states: Iterator[Tensor]) -> Tensor:
    (state,) = deque(states, maxlen=1)
    return state


class FusedStep:
    """On the CPU every width gives the same bits: a token's logits depend on its row alone."""

    adapter_of: Tensor | None

    def __init__(
        self,
        model: nn.Module,
        adapter_names: Sequence[str] | None = None,
        stored: bool = True,
    ) -> None:
        """adapter_names: one per row, "__base__" for none; None: the active adapter for all.
        stored: read the quantised copies of weights where there are any.

        Raises: linears.Unfit.
        """
        names = tuple(n for n in dict.fromkeys(adapter_names or ()) if n != "__base__")
        chosen_from = None if adapter_names is None else names
        self._set(read(model, Reading(chosen_from, stored)))
        self.model = model
        if adapter_names is not None:
            chosen = [names.index(n) if n in names else -1 for n in adapter_names]
            self.adapter_of = torch.tensor(chosen, dtype=torch.int32, device=self.device)
        if adapter_names is not None or confirmed(model):
            return
        if stored and any(map(is_stored, model.modules())):
            # They differ from the model by design; what they are copies of must not.
            FusedStep(model, stored=False)
        else:
            confirm(model, self.fused, self._last_logits)

    def _set(self, fused: FusedModel) -> None:
        self.fused = fused
        self.device = fused.embedding.device
        self.bit_exact = self.device.type == "cpu" and extension is not None
        self.adapter_of = None
        self.angles: tuple[Tensor, Tensor] | None = None
        self.most_positions = None if fused.positions is None else len(fused.positions)
        self.vocabulary = fused.head.weight.shape[0]
        # Activations: the CPU kernels take float32, and widen every stored type.
        self.dtype = torch.float32 if self.device.type == "cpu" else fused.dtype

    def new_cache(self, rows: int, capacity: int) -> KVCache:
        cache = KVCache(len(self.fused.layers), capacity)
        cache.allocate(
            rows, self.fused.kv_heads, self.fused.head_dim, self.fused.dtype, self.device
        )
        return cache

    def reserve(self, cache: KVCache, length: int) -> None:
        """Room for so many slots a row, and the angles of all positions there is room for."""
        cache.reserve(length)
        module, most = self.fused.rotary, cache.capacity
        if module is not None and (self.angles is None or len(self.angles[0]) < most):
            x = torch.empty(0, dtype=torch.float32, device=self.device)
            cos, sin = module(x, torch.arange(max(most, 512), device=self.device)[None])
            self.angles = cos[0].to(self.dtype), sin[0].to(self.dtype)

    def __call__(self, cache: KVCache, new: Sequence[Sequence[int]], keep: int = 1) -> Tensor:
        """Appends each row's new tokens; the logits of its last `keep` ones, or all if fewer.

        Returns: (rows' kept tokens, vocabulary) float32, row after row.
        """
        longest = max(map(len, new), default=0)
        if longest <= CHUNK:
            return self.logits(self._hidden(cache, new), new, keep)
        kept: list[list[Tensor]] = [[] for _ in new]
        for begin in range(0, longest, CHUNK):
            part = [row[begin : begin + CHUNK] for row in new]
            hidden = self._hidden(cache, part)
            for row, own in enumerate(hidden.split([len(p) for p in part])):
                kept[row] = [torch.cat([*kept[row], own])[-keep:]]
        return self._head(torch.cat([rows[0] for rows in kept]))

    def logits(self, hidden: Tensor, new: Sequence[Sequence[int]], keep: int) -> Tensor:
        """From the hidden states of all new tokens (tokens, hidden), those of the last `keep`."""
        if keep < max(map(len, new), default=0):
            ends = list(itertools.accumulate(map(len, new)))
            wanted = [i for end, row in zip(ends, new, strict=True)
                      for i in range(max(end - keep, end - len(row)), end)]  # fmt: skip
            hidden = hidden.index_select(0, torch.tensor(wanted, device=self.device))
        return self._head(hidden)

    def _embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        x = torch.nn.functional.embedding(ids, self.fused.embedding).to(self.dtype)
        if self.fused.positions is not None:
            x = x + torch.nn.functional.embedding(positions, self.fused.positions).to(self.dtype)
        return x

    def _hidden(self, cache: KVCache, new: Sequence[Sequence[int]]) -> Tensor:
        """Appends each row's new tokens; (tokens, hidden) behind the last layer."""
        placed, lengths = self._tensors(cache, new)
        ids, positions, cu_seqlens, slots = placed
        queries = max(map(len, new), default=0)
        x, tokens = self._enter(ids, positions, cu_seqlens, slots, queries)
        # An early exit has fewer layers than the cache it shares.
        held = cache.layers[: len(self.fused.layers)]
        keys, values = [own.keys for own in held], [own.values for own in held]
        x = decoder_layers(x, self.fused.layers, keys, values, tokens)
        cache.set_lengths(lengths)
        return x

    def states(self, cache: KVCache, new: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        """Appends each row's new tokens; yields (tokens, hidden) behind each layer in turn."""
        placed, lengths = self._tensors(cache, new)
        ids, positions, cu_seqlens, slots = placed
        queries = max(map(len, new), default=0)
        yield from self._states(cache, ids, positions, cu_seqlens, slots, queries)
        cache.set_lengths(lengths)

    def _tensors(self, cache: KVCache, new: Sequence[Sequence[int]]) -> tuple[Any, list[int]]:
        """What _place gives, on the device in one transfer."""
        placed, lengths = self._place(cache, new)
        numbers = torch.tensor([*itertools.chain(*placed)], dtype=torch.int32, device=self.device)
        return numbers.split([len(part) for part in placed]), lengths

    def _place(
        self, cache: KVCache, new: Sequence[Sequence[int]]
    ) -> tuple[tuple[list[int], ...], list[int]]:
        """Token ids, their positions, cu_seqlens and lengths, as _states takes them; the cache has
        room for them then. And the lengths again, to set when it holds them."""
        before, counts = cache.lengths, [len(row) for row in new]
        lengths = [b + c for b, c in zip(before, counts, strict=True)]
        self.reserve(cache, max(lengths, default=0))
        ids = list(itertools.chain.from_iterable(new))
        positions = [p for b, n in zip(before, lengths, strict=True) for p in range(b, n)]
        return (ids, positions, [0, *itertools.accumulate(counts)], lengths), lengths

    def _states(
        self,
        cache: KVCache,
        ids: Tensor,  # (tokens,) int32
        positions: Tensor,  # (tokens,) int32
        cu_seqlens: Tensor,  # (rows + 1,) int32
        lengths: Tensor,  # (rows,) int32
        queries: int,
    ) -> Iterator[Tensor]:
        """Hidden states (tokens, hidden) behind each layer; the device reads what tokens say."""
        x, tokens = self._enter(ids, positions, cu_seqlens, lengths, queries)
        for layer, held in zip(self.fused.layers, cache.layers, strict=False):
            x = decoder_layer(x, layer, held.keys, held.values, tokens)
            yield x

    def _enter(
        self, ids: Tensor, positions: Tensor, cu_seqlens: Tensor, lengths: Tensor, queries: int
    ) -> tuple[Tensor, Tokens]:
        """What the first layer is given."""
        cos, sin = self.angles or (None, None)
        if cos is not None and sin is not None:
            cos, sin = cos.index_select(0, positions), sin.index_select(0, positions)
        tokens = Tokens(cu_seqlens, lengths, queries, cos, sin, self.adapter_of)
        return self._embed(ids, positions), tokens

    def _norm(self, hidden: Tensor) -> Tensor:
        first, norm = self.fused.layers[0], self.fused.final_norm
        if first.center:
            return _layer_norm(hidden, None, norm.weight, norm.bias, first.eps)[0]
        return _rms_norm(hidden, None, norm.weight, first.eps, first.offset)[0]

    def _head(self, hidden: Tensor) -> Tensor:
        head = self.fused.head
        adapter = head.adapters[0] if self.adapter_of is None and head.adapters else None
        a, b, scale = (
            (None, None, 0.0) if adapter is None else (adapter.a, adapter.b, adapter.scale)
        )
        held = head.weight
        y = _quantized_linear(
            self._norm(hidden), held.values, held.scale, head.bias, a, b, scale, held.round_inputs
        )
        return y.float()

    def _last_logits(self, ids: Tensor) -> Tensor:
        cache = self.new_cache(len(ids), ids.shape[1])
        return self(cache, ids.tolist())
