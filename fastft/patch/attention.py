"""Swaps attention (through transformers' own two registries) and rotary embeddings (per instance).

The name "fastft" stands for an attention function and, always with it, a mask function: a function
registered without its mask would silently get no mask at all.
"""

import inspect
from types import CellType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from fastft.foreign import ForeignModule
from fastft.ops.attention import attention
from fastft.ops.rotary import rotary
from fastft.patch.confirm import Unlike, confirm
from fastft.patch.packing import Packing, in_force

NAME = "fastft"
_ROTARY = "apply_rotary_pos_emb"


def register() -> None:
    """Adds the name to transformers' registries, once; whoever does not ask for it sees nothing."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, attention_forward)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, mask)


def undo(module: ForeignModule) -> None:
    """Gives a base model the attention that it ran before."""
    before = module.__dict__.pop("_fastft_attention_before", None)
    for child in module.modules():
        if getattr(child, "config", None) is module.config:
            before = child.__dict__.pop("_fastft_attention", before)
    if before is not None and module.config._attn_implementation == NAME:
        module.config._attn_implementation_internal = before


def mask(*args: Any, config: Any = None, **kwargs: Any) -> Tensor | Packing | None:
    """sdpa's mask; none for packed rows, which `cu_seqlens` keeps apart.

    To the encoder that will pack its rows, the packing: the call's arguments are what a
    checkpoint around it keeps.
    """
    from transformers.masking_utils import sdpa_mask

    call = in_force(config)
    if call is not None and call.packing is not None:
        return call.packing if call.encoder_packs else None
    return sdpa_mask(*args, config=config, **kwargs)


def attention_forward(
    module: nn.Module,
    query: Tensor,  # (batch, heads, tokens, head_dim)
    key: Tensor,  # (batch, kv_heads, tokens, head_dim)
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What transformers' attention modules call: gives (batch, tokens, heads, head_dim), None."""
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    cu_seqlens = kwargs.get("cu_seq_lens_q")
    ours = getattr(module, "_fastft_attention", None)  # what the module ran before
    extras = any(kwargs.get(name) is not None for name in ("position_bias", "s_aux", "cache"))
    # Only eager attention has weights to give; not every model says here that they are wanted.
    call = in_force(getattr(module, "config", None))
    if call is not None:
        call.note_checkpoint()
    asked = kwargs.get("output_attentions") or (call is not None and call.weights)
    weights = asked and ours == "eager"
    batch, heads, length, head_dim = query.shape
    same = key.shape[2] == length and value.shape[3] <= head_dim
    if ours and not extras and not weights and same and length > 1:
        if cu_seqlens is None and attention_mask is None:
            cu_seqlens = torch.arange(
                0, (batch + 1) * length, length, dtype=torch.int32, device=query.device
            )
        elif batch != 1:
            cu_seqlens = None
        if cu_seqlens is not None:
            window = kwargs.get("sliding_window")
            if window is not None and not causal:
                window -= 1  # modules speak flash attention's language: distances below the window
            narrower = head_dim - value.shape[3]  # as in multi-head latent attention
            out = attention(
                _rows(query), _rows(key), _rows(nn.functional.pad(value, (0, narrower))),
                cu_seqlens, causal=causal, scale=scaling, dropout=dropout,
                window=window, softcap=kwargs.get("softcap"),
            )  # fmt: skip
            return out.view(batch, length, heads, head_dim)[..., : value.shape[3]], None
    if kwargs.get("softcap") is not None or weights:
        return _dense(query, key, value, attention_mask, causal, dropout, scaling, kwargs)
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(
        module, query, key, value, attention_mask,
        dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs,
    )  # fmt: skip


def _rows(x: Tensor) -> Tensor:
    """(batch, heads, tokens, head_dim) -> (batch tokens, heads, head_dim)"""
    return x.transpose(1, 2).flatten(0, 1)


def _dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    causal: bool,
    dropout: float,
    scaling: float | None,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """All scores at once: for soft-capping under a mask, and for callers who want the weights."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = query @ key.transpose(2, 3) * scale
    if (cap := kwargs.get("softcap")) is not None:
        scores = cap * torch.tanh(scores / cap)
    if attention_mask is None and causal and query.shape[2] > 1:
        attention_mask = torch.ones(scores.shape[2:], dtype=torch.bool, device=query.device).tril(
            scores.shape[3] - scores.shape[2]
        )
    if attention_mask is not None:
        if attention_mask.dtype == torch.bool:
            # Added as in eager attention: a query that sees no key has gradients there, not zeros.
            lowest = torch.finfo(scores.dtype).min
            attention_mask = torch.where(attention_mask, scores.new_zeros(()), lowest)
        scores = scores + attention_mask
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    dropped = nn.functional.dropout(weights, dropout)
    return (dropped @ value).transpose(1, 2).contiguous(), weights


def forward(module: ForeignModule, *args: Any, **kwargs: Any) -> Any:
    """The class's own forward with the fused rotary embedding in place of the module's function."""
    return module._fastft_swap.options(module, *args, **kwargs)


def is_candidate(module: nn.Module) -> bool:
    """Its forward calls the rotary function that its file defines."""
    function = inspect.unwrap(type(module).forward)
    code = getattr(function, "__code__", None)
    return code is not None and _ROTARY in code.co_names and _ROTARY in function.__globals__


def recognise(module: nn.Module) -> FunctionType:
    """The class's forward with the rotary embedding swapped; Unlike if that is another formula."""
    decorated = type(module).forward
    function = inspect.unwrap(decorated)
    original = function.__globals__[_ROTARY]
    parameters = inspect.signature(original).parameters
    if list(parameters)[:4] != ["q", "k", "cos", "sin"]:
        raise Unlike(f"rotary embedding kept: it takes {', '.join(parameters)}")
    if parameters["k"].default is not inspect.Parameter.empty:
        raise Unlike("rotary embedding kept: it may be called without k")
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, heads, 5, 8, generator=generator) for heads in (4, 2))
    cos, sin = (torch.randn(2, 5, 8, generator=generator) for _ in range(2))
    try:
        confirm(lambda q, k: original(q, k, cos, sin), lambda q, k: rotary(q, k, cos, sin), [q, k])
    except Unlike as unlike:
        raise Unlike(f"rotary embedding kept: it {unlike}") from unlike
    # A copy of the globals without their __name__: torch.compile would look the module up by it.
    names = {name: value for name, value in function.__globals__.items() if name != "__name__"}
    names[_ROTARY] = rotary
    swapped = FunctionType(
        function.__code__, names, function.__name__, function.__defaults__, function.__closure__
    )
    swapped.__kwdefaults__ = function.__kwdefaults__
    return _decorated_alike(decorated, swapped)


def _decorated_alike(function: Any, swapped: FunctionType) -> FunctionType:
    """A copy of the decorators around a function, as transformers' own for renamed arguments, with
    swapped in its place."""
    inner = getattr(function, "__wrapped__", None)
    if inner is None:
        return swapped
    cells = getattr(function, "__closure__", None) or ()
    if not any(cell.cell_contents is inner for cell in cells):
        raise Unlike("rotary embedding kept: its forward is decorated in a way that is not known")
    around = CellType(_decorated_alike(inner, swapped))
    closure = tuple(around if cell.cell_contents is inner else cell for cell in cells)
    copy = FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, closure
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
