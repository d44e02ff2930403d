"""GraphStep: a decode step on CUDA, launched at once as a CUDA graph instead of kernel by kernel.

A step is tens of kernels a layer, each of them short where few tokens are decoded, so launching
them one by one can take the host longer than the device computes. A graph records the kernels of
one step with the addresses they read and write, and launches them again as they are: what differs
from step to step (token ids, positions, cu_seqlens, lengths) lies in a buffer that is filled before
(https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs).
"""

import itertools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastft.decode.cache import KVCache
from fastft.decode.step import FusedStep, last
from fastft.ops.decode_attention import MAX_QUERIES


class CudaGraphs:
    """Graphs that share their memory: each result is read before the next graph runs."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def warm_up(self, function: Callable[[], Tensor]) -> Tensor:
        """Runs it where it will be captured: kernels are compiled and libraries made ready."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            result = function()
        current.wait_stream(self.stream)
        return result

    def capture(self, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """A function that computes it again, into the same tensor each time."""
        graph = torch.cuda.CUDAGraph()
        # thread_local: what other threads do meanwhile, such as a data loader's, is theirs.
        with (
            torch.cuda.device(self.device),
            torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"),
        ):
            result = function()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay


@dataclass
class _Shape:
    """Steps of one number of rows and of tokens."""

    inputs: Tensor  # (2 tokens + 2 rows + 1,) int32: ids, positions, cu_seqlens, lengths
    replay: Callable[[], Tensor] | None = None  # (tokens, vocabulary)


class GraphStep(FusedStep):
    """A FusedStep whose steps of up to 16 tokens a row are replayed from their third time on.

    That holds where all rows that get tokens get the same number; rows that are finished get none
    and may be any. The first step of a shape runs as it is, the second is captured. Prompts and
    ragged steps run kernel by kernel, and so does an early exit (`ExitStep`). All begins anew where
    the cache has grown or anything else that a graph reads has moved. Where capturing fails a
    RuntimeWarning says why, and every step runs kernel by kernel; `report` tells it too.
    """

    def __init__(
        self,
        model: nn.Module,
        adapter_names: Sequence[str] | None = None,
        make_graphs: Callable[[torch.device], CudaGraphs] = CudaGraphs,
    ) -> None:
        """Raises: linears.Unfit."""
        self.make_graphs = make_graphs
        self.graphs: Any = None  # what make_graphs made, from the first step on
        self.shapes: dict[tuple[int, int, int], _Shape] = {}
        self.addresses: tuple[int, ...] = ()
        self.replayed = 0
        self.reason: str | None = None
        super().__init__(model, adapter_names)

    @property
    def report(self) -> str:
        told = f"{self.replayed} steps replayed"
        return told if self.reason is None else f"{told}, then none: {self.reason}"

    def __call__(self, cache: KVCache, new: Sequence[Sequence[int]], keep: int = 1) -> Tensor:
        widths = {len(row) for row in new if len(row)}
        if self.reason is not None or len(widths) != 1 or max(widths) > MAX_QUERIES:
            return super().__call__(cache, new, keep)
        (width,) = widths
        placed, lengths = self._place(cache, new)
        logits = self._all_logits(cache, placed, width)
        cache.set_lengths(lengths)
        # A copy: the next step writes over what a graph gives.
        out: Tensor = logits.unflatten(0, (-1, width))[:, -keep:].clone().flatten(0, 1)
        return out

    def _all_logits(self, cache: KVCache, placed: tuple[list[int], ...], width: int) -> Tensor:
        """Of every new token: (tokens, vocabulary)."""
        self._renew(cache)
        sizes = [len(numbers) for numbers in placed]
        key = sizes[3], sizes[0], width
        known = self.shapes.get(key)
        shape = known or _Shape(torch.empty(sum(sizes), dtype=torch.int32, device=self.device))
        self.shapes[key] = shape
        shape.inputs.copy_(torch.tensor([*itertools.chain(*placed)], dtype=torch.int32))

        def compute() -> Tensor:
            ids, positions, cu_seqlens, slots = shape.inputs.split(sizes)
            return self._head(last(self._states(cache, ids, positions, cu_seqlens, slots, width)))

        if known is None:
            out: Tensor = self.graphs.warm_up(compute)
            return out
        if shape.replay is None:
            try:
                shape.replay = self.graphs.capture(compute)
            except RuntimeError as error:
                self.reason = f"capturing raised {type(error).__name__}: {error}"
                told = f"CUDA graphs of decode steps: {self.report}"
                warnings.warn(told, RuntimeWarning, stacklevel=2)
                return compute()
        self.replayed += 1
        return shape.replay()

    def _renew(self, cache: KVCache) -> None:
        """Forgets the graphs if anything they read or write lies elsewhere now."""
        layers = self.fused.layers
        held = [t for c in cache.layers[: len(layers)] for t in (c.keys, c.values)]
        read = [*self._weights(), *(self.angles or ()), *held]
        addresses = (cache.capacity, *(t.data_ptr() for t in read))
        if addresses != self.addresses:
            self.shapes.clear()
            self.graphs, self.addresses = self.make_graphs(self.device), addresses

    def _weights(self) -> list[Tensor]:
        """Every tensor of the model that a step reads, by the references it was read with."""
        fused = self.fused
        tensors = [fused.embedding, fused.positions, self.adapter_of]
        tensors += [fused.final_norm.weight, fused.final_norm.bias]
        tensors += [fused.head.weight.values, fused.head.weight.scale, fused.head.bias]
        tensors += [t for a in fused.head.adapters if a is not None for t in (a.a, a.b)]
        for layer in fused.layers:
            norms, linears, adapters, *_ = layer.arguments
            tensors += [*norms, *linears, *adapters]
        return [t for t in tensors if t is not None]


def fused_step(model: nn.Module, adapter_names: Sequence[str] | None = None) -> FusedStep:
    """The fused step of the model's device: a GraphStep on CUDA.

    adapter_names: one per row, "__base__" for none; None: the active adapter for all.
    Raises: linears.Unfit.
    """
    kind = GraphStep if next(model.parameters()).is_cuda else FusedStep
    return kind(model, adapter_names)
