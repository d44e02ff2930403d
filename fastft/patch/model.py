"""patch, unpatch and patched: one model, in place, and back."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from fastft.ops.fp8_linear import fits
from fastft.ops.quantized_layer import quantized_layers
from fastft.patch import attention, generate
from fastft.patch import base_weights as stored_base
from fastft.patch.report import Report
from fastft.patch.swap import swap_of, undo


def patch(
    model: nn.Module,
    *,
    decode_weights: str | None = None,
    base_weights: str | None = None,
    originals: str | Path | None = None,
) -> Report:
    """Swaps fused operators into this model's modules, in place; returns what was done.

    Covers norms, gated MLPs, rotary embeddings, attention, PEFT's LoRA layers, and head and loss of
    causal language models; padded training batches are computed without their padding. Only this
    instance changes, `unpatch` gives it back exactly, and what is not recognised is left alone and
    reported. May be called again, after adding an adapter for instance: it adds what is missing.

    Under padding, states come back zero at padded places, layers and their hooks see (1, tokens,
    hidden), and the logits of a training step are computed when first read: RuntimeError if the
    head has changed by then. RuntimeError also in a backward with create_graph=True, and in one
    after `unpatch` that would compute checkpointed layers again.

    Args:
        decode_weights: "int8", "int4" or "int4_g64" gives linear layers quantised copies that
            `generate` reads instead, on the CPU with inputs rounded to eight bits for them
            ("int8_weight_only" and "int4_weight_only" do not round); training does not see them.
            `verify` tells what they cost in perplexity, `unpatch` drops them.
        base_weights: "int8" makes frozen linear layers hold int8 numbers instead of their weights
            and multiply integers, forward and backward: a quarter of float32's memory, for training
            adapters. `generate` decodes from the same numbers; with decode_weights="int8" the head
            gets a copy too. The head and the embeddings stay. Merging and whatever else reads a
            weight needs `unpatch` first. `verify` tells what it costs. "fp8" does the same with
            e4m3 numbers, on CUDA devices that multiply them, where the model must lie already;
            `generate` is transformers' own then, and decode_weights refused.
        originals: a folder for the weights that base_weights takes away: a checkpoint that has
            them, to be read again, or a place to write them. `unpatch` gives them back; without,
            it gives back what the numbers of eight bits stand for, and says so.
    Raises: TypeError or ValueError that names the argument, and where the device has no fp8, what
        it lacks.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    from fastft.patch.patcher import Patcher  # with every operator: importing fastft does without

    parameter = next(model.parameters(), None)
    report = Report(parameter.device.type if parameter is not None else "cpu")
    # Trials make their tensors on the CPU, or name a device, whatever default the caller has set.
    was_patched = any(swap_of(module) is not None for module in model.modules())
    try:
        with torch.device("cpu"):
            patcher = Patcher(report)
            replaced = []
            if base_weights is not None:
                replaced = stored_base.store(model, base_weights, originals)
            for layer in quantized_layers(model):
                odd = layer.kind == "fp8" and not fits(layer.in_features, layer.out_features)
                told = "by the reference: sizes are no multiples of 16" if odd else ""
                report.add(layer, f"{layer.kind}_linear", f"{layer.kind}_product", told)
            if base_weights is not None and not quantized_layers(model):
                why = stored_base.why_none(model)
                report.leave(model, f"base_weights={base_weights!r}: {why}")
            patcher.run(model)
        patcher.swap_generate(model, decode_weights)
    except BaseException:
        if not was_patched:  # half a patch is worse than none
            unpatch(model)
        raise
    for layer in replaced:
        layer.release()
    return report


def unpatch(model: nn.Module) -> list[str]:
    """Undoes `patch` on this instance; returns remarks on what could only be switched off."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    remarks = set(stored_base.restore(model))
    for module in model.modules():
        remark = undo(module)
        if remark is not None:
            remarks.add(f"{type(module).__name__}: {remark}")
        if "_fastft_attention_before" in vars(module):
            attention.undo(module)
        module.__dict__.pop("_fastft_attention", None)
        generate.undo(module)
    return sorted(remarks)


@contextmanager
def patched(model: nn.Module) -> Iterator[Report]:
    """`with fastft.patched(model) as report:` patches for the block's duration."""
    report = patch(model)
    try:
        yield report
    finally:
        unpatch(model)
