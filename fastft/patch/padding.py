"""Runs a base model on the real tokens of a padded batch only, and gives back the padded shapes.

The tokens of all rows are laid end to end as one row, (1, tokens); attention is kept apart by
`cu_seqlens`, positions are those the tokens had in their rows. Outputs at padded places are zero.
"""

import inspect
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastft.patch.confirm import Unlike, relative, undisturbed
from fastft.patch.swap import original_forward, switched_off

_FIELDS = {
    "last_hidden_state", "past_key_values", "hidden_states", "attentions", "cross_attentions",
}  # fmt: skip
_PER_TOKEN = {"input_ids", "inputs_embeds", "attention_mask", "position_ids", "token_type_ids"}
_state = threading.local()


def is_packed() -> bool:
    """Whether a packed forward is running in this thread: then no mask is wanted."""
    return not torch.compiler.is_compiling() and getattr(_state, "packed", False)


def wants_weights() -> bool:
    """Whether the forward running in this thread was asked for attention weights."""
    return not torch.compiler.is_compiling() and getattr(_state, "weights", False)


@contextmanager
def _during(**flags: bool) -> Iterator[None]:
    before = dict(vars(_state))
    vars(_state).update(flags)
    try:
        yield
    finally:
        vars(_state).clear()
        vars(_state).update(before)


def kept() -> AbstractContextManager[None]:
    """Inside, base models compute padded places as well."""
    return _during(kept=True)


@dataclass(frozen=True)
class Packing:
    """Where the real tokens of a (batch, length) batch lie."""

    batch: int
    length: int
    places: Tensor  # (tokens,) into the flattened batch
    cu_seqlens: Tensor  # (batch + 1,) int32
    longest: int

    @staticmethod
    def of(attention_mask: Tensor) -> "Packing | None":
        """None if there is nothing to leave out, or nothing left."""
        real = attention_mask.bool()
        places = real.flatten().nonzero().flatten()
        if places.numel() in (0, real.numel()):
            return None
        lengths = real.sum(1, dtype=torch.int32)
        cu_seqlens = nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        return Packing(*real.shape, places, cu_seqlens, int(lengths.max()))

    def pack(self, x: Tensor) -> Tensor:
        """(batch, length, …) -> (1, tokens, …)"""
        return x.flatten(0, 1)[self.places.to(x.device)][None]

    def unpack(self, x: Tensor) -> Tensor:
        """(1, tokens, …) -> (batch, length, …), zero where there was padding."""
        out = x.new_zeros(self.batch * self.length, *x.shape[2:])
        return out.index_copy(0, self.places, x[0]).view(self.batch, self.length, *x.shape[2:])

    def has_gaps(self) -> bool:
        """Padding between the tokens of a row, which would shorten distances when left out."""
        row = self.places // self.length
        return bool(((row[1:] == row[:-1]) & (self.places.diff() != 1)).any())

    def columns(self) -> Tensor:
        """(1, tokens): the position each token had in its row."""
        return (self.places % self.length)[None]


def bind(module: nn.Module, args: tuple, kwargs: dict) -> dict:
    """The arguments of a forward by name, with those of its own **kwargs among them."""
    bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
    named = dict(list(bound.items())[1:])
    for name, parameter in inspect.signature(type(module).forward).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            named.update(named.pop(name, {}))
    return named


def packing_for(module: nn.Module, arguments: dict, keeps_cache: bool) -> Packing | None:
    """How to leave the padding out of this call; None if it must run as it is.

    keeps_cache: whether a call that does not say wants a key-value cache back.
    """
    mask = arguments.get("attention_mask")
    tokens = arguments.get("input_ids")
    tokens = arguments.get("inputs_embeds") if tokens is None else tokens
    config = module.config
    if (
        not isinstance(mask, Tensor)
        or not isinstance(tokens, Tensor)
        or mask.dim() != 2
        or mask.shape != tokens.shape[:2]
        or arguments.get("past_key_values") is not None
        or (arguments.get("use_cache") if "use_cache" in arguments else keeps_cache)
        or arguments.get("cu_seq_lens_q") is not None
        or asks(arguments, config, "output_attentions")
        or asks(arguments, config, "output_hidden_states")
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


def asks(arguments: dict, config, name: str) -> bool:
    asked = arguments.get(name)
    asked = getattr(config, name, None) if asked is None else asked
    return asked is not None and asked is not False  # the number 0 asks for a layer's states


def _is_per_token(name: str, value: Tensor, mask: Tensor) -> bool:
    if name == "position_ids" and value.dim() == 2 and value.shape[0] == 1:
        return value.shape[1] == mask.shape[1]
    # By name: an encoder's states may happen to have the shape of the tokens.
    return value.dim() == 0 or (name in _PER_TOKEN and value.shape[:2] == mask.shape)


def run_packed(base, packing: Packing, arguments: dict):
    """base(**arguments) on the real tokens: its output, packed, (1, tokens, hidden)."""
    packed = {}
    for name, value in arguments.items():
        if name == "position_ids" and value is not None:
            value = value.expand(packing.batch, -1)
        is_token = isinstance(value, Tensor) and value.dim() >= 2
        packed[name] = packing.pack(value) if is_token else value
    packed["attention_mask"] = None
    packed["use_cache"] = False
    if packed.get("position_ids") is None:
        packed["position_ids"] = packing.columns()
    packed["cu_seq_lens_q"] = packed["cu_seq_lens_k"] = packing.cu_seqlens
    packed["max_length_q"] = packed["max_length_k"] = packing.longest
    with _during(packed=True):
        return base(**packed)


def forward(module: nn.Module, *args, **kwargs):
    if torch.compiler.is_compiling():  # the number of real tokens is not known then
        return original_forward(module)(*args, **kwargs)
    arguments = bind(module, args, kwargs)
    packing = None
    returns_dict = arguments.get("return_dict", getattr(module.config, "return_dict", True))
    if not is_packed() and not getattr(_state, "kept", False) and returns_dict is not False:
        packing = packing_for(module, arguments, keeps_cache=not module.training)
    if packing is None:
        with _during(weights=asks(arguments, module.config, "output_attentions")):
            return original_forward(module)(*args, **kwargs)
    output = run_packed(original_forward(module), packing, arguments)
    output.last_hidden_state = packing.unpack(output.last_hidden_state)
    return output


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(m, m.training) for m in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode


class OtherAttention(Unlike):
    """The fused attention, or what it falls back to, is not what the model ran before."""


def confirm(module: nn.Module) -> None:
    """Raises Unlike unless the base model gives packed rows what it gave padded ones before.

    Runs the module itself, on a few tokens, without gradients. That no row sees another is held to
    the bit: one row's output must not move when the other row's tokens change.
    """
    try:
        with undisturbed(), torch.no_grad(), evaluating(module):
            results = _try(module)
    except Exception as error:  # an architecture may need arguments we do not know
        raise Unlike(f"padding kept: {type(error).__name__}: {error}") from error
    packing, wanted, padded, got, other = results
    limit = 1e-4 if wanted.last_hidden_state.dtype == torch.float32 else 5e-2
    worst = relative(*(packing.pack(o.last_hidden_state) for o in (padded, wanted)))
    if not worst <= limit:
        raise OtherAttention(f"attention kept: it computes something else ({worst:.2g})")
    if extra := set(got) - _FIELDS:
        raise Unlike(f"padding kept: {min(extra)} may read particular tokens of a row")
    if not torch.equal(got.last_hidden_state[0], other.last_hidden_state[0]):
        raise Unlike("padding kept: rows laid end to end would see each other")
    worst = relative(*(packing.pack(o.last_hidden_state) for o in (got, wanted)))
    if not worst <= limit:
        raise Unlike(f"padding kept: leaving it out changes the result ({worst:.2g})")


def _try(module: nn.Module) -> tuple:
    """A packing, and outputs: as before patching, patched, packed, packed with other tokens."""
    weight = module.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)

    def tokens():
        return torch.randint(0, weight.shape[0], (2, 7), generator=generator).to(weight.device)

    first, second = tokens(), tokens()
    second[0] = first[0]
    mask = torch.tensor([[1] * 5 + [0] * 2, [1] * 7], device=weight.device)
    inputs = {"attention_mask": mask, "use_cache": False}
    config, ours = module.config, module.config._attn_implementation
    # Asked of the attention modules: a head above may share the configuration and came first.
    before = (vars(child).get("_fastft_attention") for child in module.modules())
    try:
        config._attn_implementation_internal = next(filter(None, before), ours)
        with switched_off(module):
            wanted = type(module).forward(module, input_ids=first, **inputs)
    finally:
        config._attn_implementation_internal = ours
    with kept():
        padded = forward(module, input_ids=first, **inputs)
    return (
        Packing.of(mask), wanted, padded,
        forward(module, input_ids=first, **inputs), forward(module, input_ids=second, **inputs),
    )  # fmt: skip
