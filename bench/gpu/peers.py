"""The libraries fastft is measured against: which are here, and how each is called.

Whatever is not installed is a Skip that names it; nothing is imported before it is measured.
"""

import importlib
import importlib.metadata
import inspect
from collections.abc import Callable

import torch
from torch.nn import functional as F

from bench.gpu.case import Here, Skip

DISTRIBUTIONS = ("liger-kernel", "cut-cross-entropy", "trl", "unsloth", "bitsandbytes")


def installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def need(here: Here, distribution: str) -> None:
    """Raises Skip unless the distribution is installed and its kernels can run."""
    if not installed(distribution):
        raise Skip("not installed")
    here.need_gpu("it")


def liger(here: Here, function: str) -> Callable:
    """liger_rms_norm, liger_rope, liger_swiglu, liger_cross_entropy…"""
    need(here, "liger-kernel")
    return getattr(importlib.import_module("liger_kernel.transformers.functional"), function)


def cut_cross_entropy(here: Here) -> Callable:
    """(x, weight, labels, softcap=) -> mean loss."""
    need(here, "cut-cross-entropy")
    return importlib.import_module("cut_cross_entropy").linear_cross_entropy


def torch_linear_cross_entropy() -> Callable:
    """PyTorch's chunked head and loss, (x, weight, labels) -> mean loss."""
    if not hasattr(F, "linear_cross_entropy"):
        raise Skip(f"torch {torch.__version__} has none: it came with 2.13")
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda x, weight, labels: F.linear_cross_entropy(x, weight, labels, options=options)


def trl_loss(here: Here, softcap: float | None) -> Callable:
    """The loss of SFTTrainer, (x, weight, labels) -> mean loss."""
    need(here, "trl")
    try:
        function = importlib.import_module("trl.kernels").ChunkedLogProbFunction
        chunk = importlib.import_module("trl.trainer.utils")._CHUNKED_LOGPROB_CHUNK_SIZE
    except (ImportError, AttributeError) as missing:
        version = importlib.metadata.version("trl")
        raise Skip(f"trl {version} has no chunked loss: {missing}") from missing

    def loss(x, weight, labels):
        args = (x, weight, None, labels, 1.0, chunk, softcap, 1.0, ())
        return -function.apply(*args)[0].mean()

    return loss


def unsloth_lora(here: Here) -> tuple[Callable, Callable]:
    """(x, weight, a, b, scale) -> y, and (x, gate, up, down) -> y, each (weight, a, b, scale).

    Importing it changes transformers and trl for the whole process.
    """
    need(here, "unsloth")
    importlib.import_module("unsloth")
    fast = importlib.import_module("unsloth.kernels.fast_lora")

    def layer(x, weight, a, b, scale):
        return fast.LoRA_W.apply(x, weight, None, a, b, scale)

    def mlp(x, *layers):
        flat = [part for w, a, b, s in layers for part in (w, None, a, b, s)]
        return fast.LoRA_MLP.apply(x, *flat, fast.swiglu_fg_kernel, fast.swiglu_DWf_DW_dfg_kernel)

    return layer, mlp


def bitsandbytes(here: Here, four_bits: bool) -> Callable:
    """layer -> a frozen one of bitsandbytes with its weight, as QLoRA or transformers sets it."""
    need(here, "bitsandbytes")
    nn = importlib.import_module("bitsandbytes.nn")

    def stored(layer: torch.nn.Linear) -> torch.nn.Linear:
        sizes = layer.in_features, layer.out_features, layer.bias is not None
        weight = layer.weight.data.cpu()  # what it finds elsewhere is taken for stored already
        if four_bits:
            kind = {"quant_type": "nf4", "compress_statistics": True}
            new = nn.Linear4bit(*sizes, compute_dtype=weight.dtype, device="meta", **kind)
            made = nn.Params4bit(weight, requires_grad=False, module=new, **kind)
        else:
            kind = {"has_fp16_weights": False}
            new = nn.Linear8bitLt(*sizes, threshold=6.0, device="meta", **kind)
            made = nn.Int8Params(weight, requires_grad=False, **kind)
        new.weight, new.bias = made.to(layer.weight.device), layer.bias
        return new

    return stored


def varlen_attention(here: Here) -> Callable:
    """PyTorch's flash attention over packed sequences, causal: (q, k, v, bounds, longest)."""
    here.need_gpu("it")
    try:
        function = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    except ImportError as missing:
        raise Skip(f"torch {torch.__version__} has none") from missing
    known = inspect.signature(function).parameters
    options = {"is_causal": True} if "is_causal" in known else {"window_size": (-1, 0)}
    grouped = "enable_gqa" in known

    def run(q, k, v, bounds, longest):
        if grouped:
            options["enable_gqa"] = q.shape[1] != k.shape[1]
        elif q.shape[1] != k.shape[1]:
            k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        return function(q, k, v, bounds, bounds, longest, longest, **options)

    return run
