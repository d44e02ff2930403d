"""Reads a causal language model into `DecoderLayer`s: Llama-type models and GPT-2.

A model is recognised by the modules its layers are made of, and confirmed once by its own logits on
a few tokens. The weights stay where they are; what is read here are references, taken at each call
of `fastft.generate`, so training in place is seen by the next one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastft.decode.linears import Reading, Unfit, check_plain, plain_weight, read_linear
from fastft.foreign import ForeignModule, eps_of
from fastft.ops.decoder_layer import DecoderLayer, Linear, NormWeight
from fastft.ops.quantized_layer import QuantizedLinear, computing

_LAYER = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
_BLOCK = {"ln_1", "attn", "ln_2", "mlp"}
_ATTENTION = ({"q_proj", "k_proj", "v_proj", "o_proj"}, {"qkv_proj", "o_proj"})
_MLP = ({"gate_proj", "up_proj", "down_proj"}, {"gate_up_proj", "down_proj"})
_HEAD_NORMS = {"q_norm", "k_norm"}
_ACTIVATION_NAMES = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh",
}  # fmt: skip


@dataclass(frozen=True)
class FusedModel:
    """What a decode step reads."""

    layers: tuple[DecoderLayer, ...]
    embedding: Tensor  # (vocabulary, hidden)
    positions: Tensor | None  # (positions, hidden), learned
    rotary: nn.Module | None
    final_norm: NormWeight
    head: Linear
    dtype: torch.dtype  # of the cache

    @property
    def kv_heads(self) -> int:
        first = self.layers[0]
        rows = sum(linear.weight.shape[0] for linear in first.linears[: self.inputs])
        return (rows // self.head_dim - first.heads) // 2

    @property
    def inputs(self) -> int:
        """How many linears make query, key and value."""
        return 1 if len(self.layers[0].linears) == 4 else 3

    @property
    def head_dim(self) -> int:
        output = self.layers[0].linears[self.inputs]
        return output.weight.shape[1] // self.layers[0].heads


@dataclass(frozen=True)
class Kind:
    """Which norm a layer has; that it is what it looks like, the model's logits confirm."""

    eps: float
    center: bool


def _norm(module: nn.Module) -> tuple[Kind, NormWeight]:
    check_plain(module, "a norm")
    eps = eps_of(module)
    weight, bias = (module._parameters.get(name) for name in ("weight", "bias"))
    if eps is None or weight is None or weight.dim() != 1 or module._modules:
        raise Unfit(f"{type(module).__name__} is no norm that is known")
    center = isinstance(module, nn.LayerNorm)
    if bias is not None and not center:
        raise Unfit(f"{type(module).__name__} is no norm that is known")
    read = (None if t is None else plain_weight(t, "a norm") for t in (weight, bias))
    return Kind(eps, center), NormWeight(*read)


def _activation(module: nn.Module, what: str) -> str:
    from transformers.activations import ACT2FN

    for name, activation in _ACTIVATION_NAMES.items():
        if name in ACT2FN and type(ACT2FN[name]) is type(module):
            # One class serves GELU and its approximation.
            exact = getattr(module, "approximate", "none") == "none"
            return "gelu" if type(module) is nn.GELU and exact else activation
    raise Unfit(f"activation {type(module).__name__} of {what}")


def _child(module: nn.Module, name: str) -> ForeignModule:
    child = getattr(module, name)
    check_plain(child, name)
    return child


def _named(module: nn.Module) -> set[str]:
    """Names of the children that have parameters, numbers in their place, or children."""
    return {
        name
        for name, child in module._modules.items()
        if child is not None
        and (child._parameters or child._modules or isinstance(child, QuantizedLinear))
    }


def _window(attention: ForeignModule) -> int | None:
    """Keys that a query sees, of the layer itself or, as in Mistral, of the configuration."""
    config = attention.config
    # Not caught by confirm, whose few tokens fit into most windows, and start at position 0.
    if "llama_4_scaling_beta" in (getattr(config, "rope_parameters", None) or {}):
        raise Unfit("queries scaled by their position")
    types = getattr(config, "layer_types", None)
    if set(types or ()) - {"full_attention", "sliding_attention"}:
        raise Unfit(f"layers of types {sorted(set(types or ()))}")
    if hasattr(attention, "sliding_window"):
        out: int | None = attention.sliding_window
        return out
    if types and types[attention.layer_idx] == "full_attention":
        return None
    # A field that the configuration's class does not know is a leftover nobody reads.
    declared = hasattr(type(config), "sliding_window")
    return config.sliding_window if declared else None


def _llama_layer(layer: ForeignModule, how: Reading) -> DecoderLayer:
    attention, mlp = _child(layer, "self_attn"), _child(layer, "mlp")
    if _named(attention) - _HEAD_NORMS not in _ATTENTION or _named(mlp) not in _MLP:
        raise Unfit(f"{type(layer).__name__} has other parts than a Llama layer")
    separate = hasattr(attention, "q_proj")
    attending = ("q_proj", "k_proj", "v_proj") if separate else ("qkv_proj",)
    gating = ("gate_proj", "up_proj") if hasattr(mlp, "gate_proj") else ("gate_up_proj",)
    if len(attending) == 3 and len(gating) == 1 or len(attending) == 1 and len(gating) == 2:
        raise Unfit("projections joined in one half of the layer only")
    linears = [
        *(read_linear(getattr(attention, name), name, how) for name in attending),
        read_linear(attention.o_proj, "o_proj", how),
        *(read_linear(getattr(mlp, name), name, how) for name in gating),
        read_linear(mlp.down_proj, "down_proj", how),
    ]
    kind, attention_norm = _norm(layer.input_layernorm)
    other, mlp_norm = _norm(layer.post_attention_layernorm)
    heads: dict[str, Any] = {}  # NormWeight
    for name, role in (("q_norm", "query_norm"), ("k_norm", "key_norm")):
        module = getattr(attention, name, None)
        if module is not None:
            own, heads[role] = _norm(module)
            other = own if own != kind else other
    if other != kind:
        raise Unfit("norms of several kinds in one layer")
    head_dim = attention.head_dim
    if any(weight.weight.shape != (head_dim,) for weight in heads.values()):
        raise Unfit("norms over all heads at once")
    window = _window(attention)
    return DecoderLayer(
        linears=tuple(linears), attention_norm=attention_norm, mlp_norm=mlp_norm,
        heads=linears[len(attending)].weight.shape[1] // head_dim,
        activation=_activation(getattr(mlp, "act_fn", None) or mlp.activation_fn, "the MLP"),
        gated=True, center=kind.center, eps=kind.eps, scale=attention.scaling,
        window=-1 if window is None else window, **heads,
    )  # fmt: skip


def _gpt2_layer(block: ForeignModule, how: Reading) -> DecoderLayer:
    attention, mlp = _child(block, "attn"), _child(block, "mlp")
    if _named(attention) != {"c_attn", "c_proj"} or _named(mlp) != {"c_fc", "c_proj"}:
        raise Unfit(f"{type(block).__name__} has other parts than a GPT-2 block")
    kind, attention_norm = _norm(block.ln_1)
    other, mlp_norm = _norm(block.ln_2)
    if other != kind:
        raise Unfit("norms of several kinds in one layer")
    scale = attention.head_dim**-0.5 if attention.scale_attn_weights else 1.0
    if getattr(attention, "scale_attn_by_inverse_layer_idx", False):
        scale /= attention.layer_idx + 1
    parts = ((attention, "c_attn"), (attention, "c_proj"), (mlp, "c_fc"), (mlp, "c_proj"))
    return DecoderLayer(
        linears=tuple(read_linear(getattr(owner, name), name, how) for owner, name in parts),
        attention_norm=attention_norm, mlp_norm=mlp_norm, heads=attention.num_heads,
        activation=_activation(mlp.act, "the MLP"), gated=False, center=kind.center,
        eps=kind.eps, scale=scale,
    )  # fmt: skip


def draws_dropout(model: nn.Module) -> bool:
    for module in model.modules():
        if module.training:
            rates = [v for name, v in vars(module).items() if "dropout" in name]
            rates += [module.p] if isinstance(module, nn.Dropout) else []
            if any(isinstance(rate, float) and rate > 0 for rate in rates):
                return True
    return False


def read(model: ForeignModule, how: Reading | None = None, dropout: bool = False) -> FusedModel:
    """The model as the fused step takes it; with `dropout`, as if it were in evaluation mode.

    Raises: Unfit that says why this model takes another path.
    """
    try:
        return _read(model, how or Reading(), dropout)
    except AttributeError as error:  # a class that has the parts under other names
        raise Unfit(f"{type(model).__name__} is made otherwise: {error}") from error


def _read(model: ForeignModule, how: Reading, dropout: bool) -> FusedModel:
    base = getattr(model, "model", None) or getattr(model, "transformer", None)
    head = model.get_output_embeddings()
    if base is None or head is None:
        raise Unfit(f"{type(model).__name__} is no causal language model that is known")
    if not dropout and draws_dropout(model):
        raise Unfit("the model is in training mode with dropout: call model.eval()")
    for module in (model, base):
        if module._forward_hooks or module._forward_pre_hooks:
            raise Unfit(f"hooks on {type(module).__name__}")
    if hasattr(base, "layers") and hasattr(base, "rotary_emb"):
        read_layer: Callable[[ForeignModule, Reading], DecoderLayer] = _llama_layer
        parts, made_of = base.layers, _LAYER
        final, embedding, positions = base.norm, base.embed_tokens, None
        rotary = _child(base, "rotary_emb")
        if rotary.rope_type in ("dynamic", "longrope"):
            raise Unfit(f"rotary angles of type {rotary.rope_type} depend on the length")
    elif hasattr(base, "h") and hasattr(base, "wpe"):
        parts, read_layer, made_of = base.h, _gpt2_layer, _BLOCK
        final, embedding, rotary = base.ln_f, base.wte, None
        positions = plain_weight(_child(base, "wpe").weight, "positions")
    else:
        raise Unfit(f"{type(base).__name__} has neither Llama's nor GPT-2's parts")
    layers = []
    for layer in parts:
        check_plain(layer, "a layer")
        if _named(layer) != made_of:
            raise Unfit(f"{type(layer).__name__} has other parts than {sorted(made_of)}")
        layers.append(read_layer(layer, how))
    if not layers:
        raise Unfit("no layers")
    kind, final_norm = _norm(final)
    first = layers[0]
    if kind != Kind(first.eps, first.center):
        raise Unfit("a final norm of another kind than the layers'")
    if type(embedding) is not nn.Embedding:
        raise Unfit(f"an embedding of type {type(embedding).__name__}")
    check_plain(embedding, "the embedding")
    table = plain_weight(embedding.weight, "the embedding")
    top = read_linear(head, "the head", how)
    if how.names is not None and any(adapter is not None for adapter in top.adapters):
        raise Unfit("adapter_names with an adapter on the head")
    return FusedModel(tuple(layers), table, positions, rotary, final_norm, top, table.dtype)


_confirmed: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


def confirmed(model: nn.Module) -> bool:
    """Whether `confirm` has passed for a model of these modules."""
    return _confirmed.get(model) == tuple(type(m) for m in model.modules())


def confirm(model: nn.Module, fused: FusedModel, logits_of: Callable[[Tensor], Tensor]) -> None:
    """Raises Unfit unless the model's own logits agree on a few tokens; asked once per model.

    logits_of(ids) gives ours for the last position of each row. What a model stores in
    eight bits or less for decoding differs by design and is confirmed without; an int8 base by the
    weights that its numbers stand for.
    """
    if confirmed(model):
        return
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, len(fused.embedding), (2, 7), generator=generator)
    ids = ids.to(fused.embedding.device)
    with torch.no_grad(), computing(model, "numbers"):
        theirs = model(input_ids=ids, use_cache=False).logits[:, -1].float()
        ours = logits_of(ids).float()
    gap = float((ours - theirs).norm() / theirs.norm())
    limit = 1e-3 if fused.dtype is torch.float32 else 0.1
    if not gap <= limit:
        raise Unfit(f"its logits differ (by {gap:.2g}): it computes something else")
    _confirmed[model] = tuple(type(m) for m in model.modules())
