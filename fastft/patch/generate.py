"""Swaps `generate`: the model's own method decodes through `fastft.generate`.

Only the instance changes. What `fastft.generate` hands over runs in transformers' own, so a call
gives what it gave; what comes back is transformers' type, a tensor or an output.
"""

import inspect
from types import MethodType
from typing import Any

from torch import nn

from fastft.decode.linears import DECODE_WEIGHT
from fastft.foreign import ForeignModule


def is_candidate(module: ForeignModule) -> bool:
    """A causal language model of transformers; a PeftModel calls the one inside it."""
    return (
        hasattr(type(module), "generate")
        and hasattr(module, "prepare_inputs_for_generation")
        and not hasattr(module, "peft_config_class")
        and not hasattr(module, "get_base_model")
        and getattr(module, "can_generate", bool)()
        and not module.config.is_encoder_decoder
    )


def _generate(self: ForeignModule, *args: Any, **kwargs: Any) -> Any:
    from fastft.decode.generate import generate

    own = type(self).generate
    bound = inspect.signature(own).bind(self, *args, **kwargs).arguments
    bound.pop("self")
    extra = bound.pop("kwargs", {})
    asked = extra.get("return_dict_in_generate")
    if asked is None:
        config = bound.get("generation_config") or self.generation_config
        asked = config.return_dict_in_generate
    # transformers' assisted decoding asks its assistant for what only its own loop gives.
    assisting = getattr(bound.get("generation_config"), "is_assistant", False)
    if assisting:
        return own(self, *args, **kwargs)
    out: Any = generate(self, **bound, **extra)
    return out if asked else out.sequences


vars(_generate)["is_fastft"] = True


def is_ours(module: nn.Module) -> bool:
    function = getattr(vars(module).get("generate"), "__func__", None)
    return getattr(function, "is_fastft", False)


def install(module: ForeignModule) -> str | None:
    """Why not, if not."""
    from fastft.decode.layers import read
    from fastft.decode.linears import Unfit

    if is_ours(module):
        return None
    if "generate" in vars(module):
        return "generate was replaced on this instance: kept"
    try:
        read(module, dropout=True)
    except Unfit as unfit:
        return f"generate stays transformers' own: {unfit}"
    module.generate = MethodType(_generate, module)
    return None


def undo(module: nn.Module) -> None:
    """Gives generate back, and drops the copies of weights it read."""
    if is_ours(module):
        del module.generate
    vars(module).pop(DECODE_WEIGHT, None)
