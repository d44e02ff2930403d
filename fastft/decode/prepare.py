"""Turns the arguments of `model.generate` into what the decode loop needs, by transformers itself.

`model.generate` with a `custom_generate` callable checks and prepares everything it takes, and
hands it to the callable: its documented extension point. What the loop does not do is told apart
here, with the reason.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    StopStringCriteria,
)

from fastft.decode.cache import KVCache
from fastft.decode.cache_name import NAMES, cache_in
from fastft.foreign import ForeignModule

# Arguments of a forward that the loop makes itself.
_KNOWN = {"attention_mask", "position_ids", "logits_to_keep", "use_cache", "cache_position", *NAMES}
_IDS = (torch.int64, torch.int32)


class HandOver(Exception):
    """This call is transformers' to serve; the message says why."""


@dataclass
class Prepared:
    """A call of generate, checked; rows are those of input_ids, return sequences expanded."""

    input_ids: Tensor  # (rows, length), padded as given
    prompts: list[list[int]]  # without padding
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList  # beyond eos and length
    eos: frozenset[int]
    max_length: int  # of input_ids' rows with the new tokens
    pad: int
    config: GenerationConfig
    cache: KVCache | None


def inner_model(model: ForeignModule) -> ForeignModule:
    """The transformers model in a PeftModel whose adapters are injected into it."""
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    if hasattr(model, "get_base_model"):
        if getattr(model, "active_peft_config", None) is not None:
            if model.active_peft_config.is_prompt_learning:
                raise HandOver("a prompt-learning adapter of PEFT")
        return model.get_base_model()
    return model


def own_generate(model: ForeignModule) -> Callable[..., Any]:
    """The generate of the class, whatever the instance has in its place."""
    model = getattr(model, "_orig_mod", model)
    out: Callable[..., Any] = type(model).generate.__get__(model)
    return out


def prepare(
    model: ForeignModule, inputs: Any, generation_config: Any, kwargs: dict[str, Any]
) -> Prepared:
    """Raises HandOver where transformers must serve the call, and what transformers raises."""
    kwargs = dict(kwargs)
    for name in ("assistant_model", "synced_gpus", "custom_generate", "inputs_embeds",
                 "position_ids", "token_type_ids", "negative_prompt_ids"):  # fmt: skip
        if kwargs.get(name) is not None:
            raise HandOver(f"the argument {name}")
    if model.config.is_encoder_decoder:
        raise HandOver("an encoder-decoder model")
    if model._is_stateful:
        raise HandOver(f"{type(model).__name__} keeps a state that cannot be rolled back")
    own = vars(model).get("prepare_inputs_for_generation")
    if own and getattr(own, "__func__", None) is not type(model).prepare_inputs_for_generation:
        # PEFT puts its virtual tokens in there while it calls the model's generate.
        raise HandOver("prepare_inputs_for_generation was replaced on this instance")
    generation_config, kwargs = _stop_strings(model, generation_config, kwargs)
    if "input_ids" in kwargs and inputs is None:
        inputs = kwargs.pop("input_ids")
    asked = kwargs.get("max_new_tokens", getattr(generation_config, "max_new_tokens", None))
    if inputs is not None:
        _check_ids(model, inputs)
        # Here, as transformers drops a mask of ones alone unseen.
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.dim() == 2 and mask.shape != inputs.shape:
            raise ValueError(
                f"attention_mask: expected the shape of inputs, {tuple(inputs.shape)}, got "
                f"{tuple(mask.shape)}"
            )
    if asked is not None and not isinstance(asked, int):
        raise TypeError(f"max_new_tokens: expected a whole number, got {asked!r}")
    if asked == 0 and inputs is not None:
        kwargs["max_new_tokens"] = 1  # transformers would refuse; the loop then stops at none
    captured = []

    def capture(
        model: nn.Module,
        input_ids: Any,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> None:
        captured.append(
            (input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs)
        )

    own_generate(model)(
        inputs, generation_config=generation_config, custom_generate=capture, **kwargs
    )
    ids, processors, criteria, config, model_kwargs = captured[0]
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise HandOver(f"the generation mode {mode.value}")
    if config.token_healing or config.output_attentions or config.output_hidden_states:
        raise HandOver("token healing, attentions or hidden states in the output")
    if not config.use_cache:
        raise HandOver("use_cache=False")
    if config.cache_implementation is not None:
        raise HandOver(f"the cache implementation {config.cache_implementation!r}")
    unknown = {k for k, v in model_kwargs.items() if v is not None} - _KNOWN
    if unknown:
        raise HandOver(f"the model's own arguments {sorted(unknown)}")
    cache = cache_in(model_kwargs)
    if cache is not None and not isinstance(cache, KVCache):
        if cache.get_seq_length() > 0 or getattr(cache, "_is_user_defined", False):
            raise HandOver(f"a cache of type {type(cache).__name__}")
        cache = None
    mask = model_kwargs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    if mask.dim() != 2:
        raise HandOver(f"an attention mask of {mask.dim()} dimensions")
    if cache is not None and any(cache.lengths) and cache.tokens is None and not mask.all():
        raise HandOver("a cache whose slots hold padding")
    prompts = [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)]
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"inputs: expected at least one token in each row, row {row} has none")
    max_length, eos, rest = config.max_length, set(), StoppingCriteriaList()
    for criterion in criteria:
        if type(criterion) is MaxLengthCriteria:
            max_length = min(max_length, criterion.max_length)
        elif type(criterion) is EosTokenCriteria:
            eos |= set(criterion.eos_token_id.tolist())
        else:
            rest.append(criterion)
    pad = config._pad_token_tensor
    pad = int(pad) if pad is not None else min(eos, default=0)
    return Prepared(
        ids, prompts, processors, rest, frozenset(eos),
        ids.shape[1] if asked == 0 else max_length, pad, config, cache,
    )  # fmt: skip


def _stop_strings(
    model: ForeignModule, config: Any, kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """generate gives a callable no tokenizer, so the criterion for stop strings is made here."""
    tokenizer = kwargs.pop("tokenizer", None)
    strings = kwargs.pop("stop_strings", None)
    of_call = getattr(config, "stop_strings", None)
    of_model = model.generation_config.stop_strings
    if strings is None:
        strings = of_model if of_call is None else of_call
    if strings is None:
        return config, kwargs
    if tokenizer is None:
        raise ValueError("tokenizer: expected the model's tokenizer, which stop_strings need")
    criteria = StoppingCriteriaList(kwargs.pop("stopping_criteria", None) or [])
    criteria.append(StopStringCriteria(tokenizer, strings))
    if of_call is not None:
        config = copy.copy(config)
        config.stop_strings = None
    # The model's own would come back into a configuration without any, but not past a keyword.
    cleared = {} if of_model is None else {"stop_strings": None}
    return config, kwargs | cleared | {"stopping_criteria": criteria}


def _check_ids(model: ForeignModule, inputs: Any) -> None:
    if not isinstance(inputs, Tensor) or inputs.dim() != 2 or inputs.dtype not in _IDS:
        got = f"{inputs.dtype} {tuple(inputs.shape)}" if isinstance(inputs, Tensor) else inputs
        got = got if isinstance(inputs, Tensor) else type(inputs).__name__
        raise TypeError(f"inputs: expected token ids (rows, length), got {got}")
    if inputs.shape[1] == 0 or inputs.shape[0] == 0:
        raise ValueError(f"inputs: expected at least one token, got shape {tuple(inputs.shape)}")
    size = model.get_input_embeddings().weight.shape[0]
    low, high = int(inputs.min()), int(inputs.max())
    if low < 0 or high >= size:
        wrong = low if low < 0 else high
        raise ValueError(f"inputs: expected token ids below {size}, got {wrong}")
