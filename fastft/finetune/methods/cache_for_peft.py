"""Virtual tokens of PEFT where it knows the cache by the name before transformers 5.24 alone.

PEFT 0.21 finds no cache then: it would put the tokens before every new one while generating, and
not give a prefix to encoders. Only the instance changes.
"""

from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

from fastft.decode.cache_name import own_name, renamed
from fastft.foreign import ForeignModule

_OLD = "past_key_values"


def name_cache(model: ForeignModule) -> ForeignModule:
    """The PeftModel, whose virtual tokens go where its base model looks for them."""
    from packaging.version import Version
    from peft import __version__

    # A later one is taken to know: told the old name, it would be the one to find no cache.
    if own_name() == _OLD or Version(__version__) > Version("0.21.2"):
        return model
    if hasattr(model, "_prefix_tuning_forward"):
        model._prefix_tuning_forward = MethodType(_prefix_tuning_forward, model)
    prepare = getattr(model, "base_model_prepare_inputs_for_generation", None)
    if prepare is not None:
        # partial, which a deep copy of the model copies with the model in it.
        model.base_model_prepare_inputs_for_generation = partial(_by_old_name, prepare)
    return model


def _by_old_name(
    prepare: Callable[..., dict[str, Any]], *args: Any, **kwargs: Any
) -> dict[str, Any]:
    return renamed(prepare(*args, **kwargs), _OLD)


def _prefix_tuning_forward(
    self: ForeignModule, input_ids: Any = None, inputs_embeds: Any = None, **kwargs: Any
) -> Any:
    """PEFT's for a head that takes the cache, or hands it on with all else it is given."""
    rows = len(inputs_embeds if input_ids is None else input_ids)
    return self.base_model(
        input_ids=input_ids,
        inputs_embeds=inputs_embeds,
        **kwargs,
        **{own_name(): self.get_prompt(rows)},
    )
