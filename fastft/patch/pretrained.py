"""What is asked of a model of transformers before any of it is tried."""

import sys

from torch import nn

from fastft.foreign import ForeignModule


def is_pretrained(module: nn.Module) -> bool:
    """Whether it is a model of transformers, which need not be installed to ask."""
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(module, transformers.PreTrainedModel)


def base_of(module: ForeignModule) -> ForeignModule:
    """The model below the head, or the module itself where it is none's head."""
    return getattr(module, module.base_model_prefix, module)
