"""Virtual tokens of PEFT where it knows the cache by the name before transformers 5.24 alone.

PEFT 0.21 finds no cache then: it would put the tokens before every new one while generating, and
not give a prefix to encoders. Only the instance changes.
"""

from functools import partial
from types import MethodType

from torch import nn

from fastft.decode.cache_name import own_name, renamed

_OLD = "past_key_values"


def name_cache(model: nn.Module) -> nn.Module:
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


def _by_old_name(prepare, *args, **kwargs) -> dict:
    return renamed(prepare(*args, **kwargs), _OLD)


def _prefix_tuning_forward(self, input_ids=None, inputs_embeds=None, **kwargs):
    """PEFT's for a head that takes the cache, or hands it on with all else it is given."""
    rows = len(inputs_embeds if input_ids is None else input_ids)
    return self.base_model(
        input_ids=input_ids,
        inputs_embeds=inputs_embeds,
        **kwargs,
        **{own_name(): self.get_prompt(rows)},
    )
