"""The methods that PEFT implements: its config from our settings, and what it leaves unchecked."""

import inspect
from pathlib import Path
from typing import Any

from torch import nn

from fastft.decode.cache_name import cache_name
from fastft.finetune import UserError, need
from fastft.finetune.methods import layers
from fastft.finetune.methods.cache_for_peft import name_cache
from fastft.foreign import ForeignModule, is_conv1d

TASK_TYPES = {"classify": "SEQ_CLS", "ner": "TOKEN_CLS", "lm": "CAUSAL_LM", "sft": "CAUSAL_LM"}
# Queries, keys and values in one: PEFT scales all three.
_TOGETHER = (("c_attn",), ("Wqkv",), ("qkv_proj",), ("query_key_value",))


def wrap(model: nn.Module, config: Any, task: str) -> ForeignModule:
    """The model inside PEFT's, with a new adapter."""
    peft = need("peft", f"method {config.method}")
    common = {"task_type": TASK_TYPES[task], "modules_to_save": layers.head(model, task) or None}
    if config.method in ("prompt", "prefix"):
        return name_cache(peft.get_peft_model(model, _virtual(peft, model, config, common)))
    if config.method == "ia3":
        return peft.get_peft_model(model, _ia3(peft, model, config, common))
    quantised = getattr(model, "is_loaded_in_4bit", False)
    if config.method == "qlora" and not quantised:
        raise UserError(
            "method qlora trains a model that was loaded in 4 bits, and this one was not"
        )
    if quantised:
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    targets = config.target_modules or ["all-linear"]
    if targets == ["all-linear"]:
        targets = "all-linear"
    else:
        layers.named(model, targets)
    lora = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets,
        use_dora=config.method == "dora",
        fan_in_fan_out=any(map(is_conv1d, model.modules())),
        **common,
    )
    return peft.get_peft_model(model, lora)


def _ia3(peft: Any, model: nn.Module, config: Any, common: dict[str, Any]) -> Any:
    """Scales of keys, values and what enters the MLP's last projection (arXiv 2205.05638)."""
    ends = layers.projections(model)[1]
    if config.target_modules:
        targets = layers.named(model, config.target_modules)
    else:
        targets = [*_keys_and_values(model), *ends]
    return peft.IA3Config(
        target_modules=targets,
        # These are scaled at their input, the others at their output.
        feedforward_modules=[name for name in targets if name in ends],
        fan_in_fan_out=any(map(is_conv1d, model.modules())),
        **common,
    )


def _keys_and_values(model: nn.Module) -> list[str]:
    within = layers.layers(model)[0] + "."
    for names in (("k_proj", "v_proj"), ("key", "value"), ("k_lin", "v_lin"), *_TOGETHER):
        found = [
            name
            for name, _ in model.named_modules()
            if name.startswith(within) and name.rpartition(".")[2] in names
        ]
        if found:
            return found
    raise UserError(
        f"ia3: which layers of {type(model).__name__} give keys and values is not known; name them "
        "by target_modules"
    )


def _virtual(peft: Any, model: ForeignModule, config: Any, common: dict[str, Any]) -> Any:
    """Virtual tokens (arXiv 2104.08691), or their keys and values (arXiv 2101.00190)."""
    count = config.virtual_tokens
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and count >= longest:
        raise UserError(f"virtual_tokens: expected fewer than the model's {longest} positions")
    if config.method == "prefix":
        if not _takes_prefix(model):
            raise UserError(
                f"method prefix does not fit {type(model).__name__}, which takes no cache"
            )
        return peft.PrefixTuningConfig(num_virtual_tokens=count, **common)
    if common["task_type"] == "SEQ_CLS" and _reads_last_token(model):
        raise UserError(
            f"method prompt does not fit {type(model).__name__}: PEFT gives it no token ids, and it"
            " would take padding for the last token; method prefix does"
        )
    return peft.PromptTuningConfig(
        num_virtual_tokens=count,
        # PEFT's default draws them far larger than the embeddings of any token.
        prompt_tuning_init="SAMPLE_VOCAB",
        # PEFT would take the hidden width, and some models embed tokens in another.
        token_dim=model.get_input_embeddings().weight.shape[1],
        num_layers=model.config.num_hidden_layers,
        num_attention_heads=model.config.num_attention_heads,
        **common,
    )


def _takes_prefix(model: ForeignModule) -> bool:
    base: ForeignModule = getattr(model, model.base_model_prefix, model)
    return any(cache_name(inspect.signature(m.forward).parameters) for m in (model, base))


def _reads_last_token(model: nn.Module) -> bool:
    """A decoder's classification head: pooled where input_ids has its last token."""
    causal = [m.is_causal for m in model.modules() if hasattr(m, "is_causal")]
    return any(causal)


def load(model: nn.Module, folder: str | Path, *, trainable: bool) -> nn.Module:
    """PEFT's model around this one, with the adapter of a folder.

    Raises: UserError where they do not fit, also where PEFT would load a part and warn.
    """
    import peft
    from safetensors import SafetensorError, safe_open

    try:
        wrapped = peft.PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)
        with safe_open(Path(folder) / "adapter_model.safetensors", "pt") as file:
            held = set(file.keys())
    except (RuntimeError, ValueError, KeyError, TypeError, OSError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()
        raise UserError(f"{folder}: not an adapter of this model: {' '.join(reason[:2])}") from None
    expected = peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False).keys()
    known = wrapped.state_dict().keys()  # embeddings may be saved beside an adapter
    wrong = sorted(name for name in expected ^ held if name not in known)
    if wrong:
        raise UserError(
            f"{folder}: not an adapter of this model: {wrong[0]} is in one of them only"
        )
    if not trainable:
        wrapped.requires_grad_(False)  # PEFT leaves virtual tokens trainable
    return name_cache(wrapped) if wrapped.active_peft_config.is_prompt_learning else wrapped
