"""Runs a base model on the real tokens of a padded batch only, and gives back the padded shapes.

Either the whole model sees packed tokens, their positions those they had in their rows; or, where
embeddings or a pooler need the rows as they were, its encoder alone, between the two. Outputs at
padded places are zero. Encoders whose rows start with padding keep it: their heads read the first
place, whatever stands there.
"""

import copy
import inspect
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastft.decode.cache_name import NAMES, cache_in, cache_name, renamed
from fastft.decode.evaluating import evaluating
from fastft.foreign import ForeignModule
from fastft.ops.quantized_layer import computing
from fastft.patch.attention import NAME
from fastft.patch.confirm import Unlike, relative, undisturbed
from fastft.patch.packing import (
    Call,
    Packing,
    during,
    in_force,
    keeps_padding,
    take_selection,
)
from fastft.patch.recomputation import held
from fastft.patch.swap import original_forward, swap, swap_of, undo
from fastft.patch.trial import Trial, windows_shortened

_FIELDS = {"last_hidden_state", *NAMES, "hidden_states", "attentions", "cross_attentions"}
_POOLED = _FIELDS | {"pooler_output"}
_PER_TOKEN = {"input_ids", "inputs_embeds", "attention_mask", "position_ids", "token_type_ids"}


@dataclass(frozen=True)
class Padding:
    """How a base model's padding is left out."""

    causal: bool  # else the tokens of a row all see each other, and no cache is kept
    encoder: str | None = None  # the child that alone sees packed tokens


def bind(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a forward by name, with those of its own **kwargs among them."""
    signature = inspect.signature(type(module).forward)
    own = cache_name(signature.parameters)
    if own is not None and own not in kwargs:
        kwargs = renamed(kwargs, own)  # as transformers does around the forward
    named = dict(list(signature.bind(module, *args, **kwargs).arguments.items())[1:])
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            named.update(named.pop(name, {}))
    return named


def packing_for(
    module: ForeignModule, arguments: dict[str, Any], keeps_cache: bool
) -> Packing | None:
    """How to leave the padding out of this call; None if it must run as it is.

    keeps_cache: whether a call that does not say wants a key-value cache back.
    """
    mask = arguments.get("attention_mask")
    tokens = arguments.get("input_ids")
    tokens = arguments.get("inputs_embeds") if tokens is None else tokens
    config = module.config
    use_cache = arguments.get("use_cache")
    if (
        # Chosen anew since: it would let the rows see each other.
        config._attn_implementation != NAME
        or _changes_embeddings(module)
        or not isinstance(mask, Tensor)
        or not isinstance(tokens, Tensor)
        or mask.dim() != 2
        or mask.shape != tokens.shape[:2]
        or cache_in(arguments) is not None
        or (keeps_cache if use_cache is None else use_cache)
        or arguments.get("cu_seq_lens_q") is not None
        or asks(arguments, config, "output_attentions")
        or asks(arguments, config, "output_hidden_states")
        or asks(arguments, config, "output_router_logits")  # every place's, and a loss of them
        or any(
            isinstance(value, Tensor) and not _is_per_token(name, value, mask)
            for name, value in arguments.items()
        )
    ):
        return None
    packing = Packing.of(mask)
    if packing is not None and getattr(config, "sliding_window", None) and packing.has_gaps():
        return None
    return packing


def _changes_embeddings(module: ForeignModule) -> bool:
    """A hook on the embeddings may look at how long the rows are, as NEFTune's noise does."""
    hooks = module.get_input_embeddings()._forward_hooks.values()
    return any("make_inputs_require_grad" not in getattr(h, "__qualname__", "") for h in hooks)


def asks(arguments: dict[str, Any], config: Any, name: str) -> bool:
    asked = arguments.get(name)
    asked = getattr(config, name, None) if asked is None else asked
    return asked is not None and asked is not False  # the number 0 asks for a layer's states


def _is_per_token(name: str, value: Tensor, mask: Tensor) -> bool:
    if name == "position_ids" and value.dim() == 2 and value.shape[0] == 1:
        return value.shape[1] == mask.shape[1]
    # By name: an encoder's states may happen to have the shape of the tokens.
    return value.dim() == 0 or (name in _PER_TOKEN and value.shape[:2] == mask.shape)


def pack_arguments(packing: Packing, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a base model for the real tokens alone; as mask, the packing itself."""
    packed = {}
    for name, value in arguments.items():
        if name == "position_ids" and value is not None:
            value = value.expand(packing.batch, -1)
        is_token = isinstance(value, Tensor) and value.dim() >= 2
        packed[name] = packing.pack(value) if is_token else value
    packed["attention_mask"] = packing
    packed["use_cache"] = False
    if packed.get("position_ids") is None:
        packed["position_ids"] = packing.columns()
    return packed | packing.attention_arguments()


def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    if torch.compiler.is_compiling():  # the number of real tokens is not known then
        kwargs = {k: None if isinstance(v, Packing) else v for k, v in kwargs.items()}
        return original_forward(module)(*args, **kwargs)
    arguments = bind(module, args, kwargs)
    given = arguments.get("attention_mask")
    if isinstance(given, Packing):  # the head has packed the rows, and wants them so
        return _run(Call(module, given), (), arguments | {"attention_mask": None})
    selected = take_selection(module)
    if selected is None:
        return _forward(module, arguments, args, kwargs)
    if selected.output is not None:
        return copy.copy(selected.output)
    return selected.of(_forward(module, arguments, args, kwargs))


def _run(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    with during(call=call):
        output = original_forward(call.owner)(*args, **kwargs)
    return held(call.owner, output) if call.recomputes else output


def _forward(
    module: ForeignModule, arguments: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    options, packing = module._fastft_swap.options, None
    returns_dict = arguments.get("return_dict", getattr(module.config, "return_dict", True))
    if not keeps_padding() and returns_dict is not False:
        keeps_cache = options.causal and not module.training
        packing = packing_for(module, arguments, keeps_cache)
        if packing is not None and not options.causal and packing.starts_late():
            packing = None
    if packing is None:
        weights = asks(arguments, module.config, "output_attentions")
        return _run(Call(module, weights=weights), args, kwargs)
    if options.encoder is not None:
        return _run(Call(module, packing, encoder_packs=True), args, kwargs)
    call, packed = Call(module, packing), pack_arguments(packing, arguments)
    output = _run(call, (), packed | {"attention_mask": None})
    output.last_hidden_state = packing.unpack(output.last_hidden_state)
    return output


def encode(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The forward of an encoder inside a base model: padded states in and out, packed between."""
    arguments = bind(module, args, kwargs)
    packing = next((v for v in arguments.values() if isinstance(v, Packing)), None)
    if packing is None:
        call = in_force(getattr(module, "config", None))
        if call is not None and call.encoder_packs:
            raise RuntimeError("the encoder was not handed the mask that its base model made")
        return original_forward(module)(*args, **kwargs)
    for name, value in arguments.items():
        if value is packing:
            arguments[name] = None
        elif isinstance(value, Tensor):
            arguments[name] = packing.pack(value.expand(packing.batch, *value.shape[1:]))
    output = original_forward(module)(**arguments, **packing.attention_arguments())
    output.last_hidden_state = packing.unpack(output.last_hidden_state)
    return output


def _encoder_of(module: nn.Module) -> str | None:
    """The child that maps hidden states to hidden states through all layers of attention."""
    attending = {m for m in module.modules() if hasattr(m, "_fastft_attention")}
    for name, child in module.named_children():
        parameters = list(inspect.signature(type(child).forward).parameters)
        if parameters[1:2] == ["hidden_states"] and attending & set(child.modules()):
            return name
    return None


class OtherAttention(Unlike):
    """The fused attention, or what it falls back to, is not what the model ran before."""


def install(module: nn.Module) -> None:
    """Swaps the forward of a base model, in the first way that is confirmed; Unlike if none is."""
    causal = any(getattr(m, "is_causal", False) for m in module.modules())
    swap(module, "padding", forward, Padding(causal))
    try:
        _confirm(module, _FIELDS)
        return
    except OtherAttention:
        undo(module)
        raise
    except Unlike as unlike:
        undo(module)
        encoder = _encoder_of(module)
        if encoder is None or swap_of(getattr(module, encoder)) is not None:
            raise
        why = unlike
    swap(module, "padding", forward, Padding(causal, encoder))
    swap(getattr(module, encoder), "padding", encode)
    try:
        _confirm(module, _POOLED)
    except Unlike:
        undo(module)
        undo(getattr(module, encoder))
        raise why from None


def _confirm(module: ForeignModule, fields: set[str]) -> None:
    """Raises Unlike unless the base model gives packed rows what it gave padded ones before.

    Runs the module itself, on a few tokens, without gradients. That no row sees another: one row's
    output must not move when the other rows' tokens change, but for the rounding of products whose
    size they decide, as with experts.
    """
    told = undisturbed(), torch.no_grad(), evaluating(module), computing(module, "numbers")
    with ExitStack() as stack:
        for each in (*told, windows_shortened(module)):
            stack.enter_context(each)
        try:
            trial = Trial.of(module, module._fastft_swap.options.causal)
            wanted, worst = trial.differs_in_attention(module, forward)
        except Exception as error:  # an architecture may need arguments we do not know
            raise OtherAttention(f"attention not tried: {type(error).__name__}: {error}") from error
        limit = 1e-4 if wanted.last_hidden_state.dtype == torch.float32 else 5e-2
        if not worst <= limit:
            raise OtherAttention(f"attention kept: it computes something else ({worst:.2g})")
        try:
            got, other = (forward(module, **inputs) for inputs in (trial.first, trial.second))
        except Exception as error:
            raise Unlike(f"padding kept: {type(error).__name__}: {error}") from error
    if extra := set(got) - fields:
        raise Unlike(f"padding kept: {min(extra)} may read particular tokens of a row")
    rounding = 1e-6 if wanted.last_hidden_state.dtype == torch.float32 else 0.0
    if not relative(other.last_hidden_state[0], got.last_hidden_state[0]) <= rounding:
        raise Unlike("padding kept: rows laid end to end would see each other")
    worst = trial.differ(got, wanted)
    if (pooled := wanted.get("pooler_output")) is not None:
        worst = max(worst, relative(got.pooler_output, pooled))
    if not worst <= limit:
        raise Unlike(f"padding kept: leaving it out changes the result ({worst:.2g})")
