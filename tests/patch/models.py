"""Tiny models of the architectures the tests patch, with random weights and batches."""

import torch
import transformers
from peft import LoraConfig, get_peft_model

VOCABULARY = 97
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attention_dropout": 0.0,
}
# name -> (class prefix, settings that differ)
ARCHITECTURES = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": 5}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {}),
    "gemma": ("Gemma", {"hidden_act": "gelu_pytorch_tanh"}),
    "gemma2": ("Gemma2", {"sliding_window": 5, "query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3", {"sliding_window": 5, "query_pre_attn_scalar": 8}),
    "phi3": ("Phi3", {"partial_rotary_factor": 0.5, "sliding_window": None}),
    "olmo2": ("Olmo2", {}),
    "smollm3": ("SmolLM3", {}),
    "granite": ("Granite", {"logits_scaling": 4.0}),
    "cohere": ("Cohere", {"logit_scale": 0.25}),
    "gpt2": ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
}


def causal_lm(name: str, dtype=torch.float32, seed: int = 0, **settings):
    """A causal language model in evaluation mode; weights large enough for attention to matter."""
    prefix, own = ARCHITECTURES[name]
    config_class = getattr(
        transformers, f"{prefix}TextConfig" if name == "gemma3" else f"{prefix}Config"
    )
    if name == "gpt2":
        common = {k: _COMMON[k] for k in ("vocab_size", "bos_token_id", "eos_token_id")}
        common |= {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    else:
        common = dict(_COMMON)
    config = config_class(**{**common, **own, **settings})
    torch.manual_seed(seed)
    suffix = "LMHeadModel" if name == "gpt2" else "ForCausalLM"
    model = getattr(transformers, prefix + suffix)(config)
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, std=0.15)
    return model.to(dtype).eval()


def with_lora(model, dropout: float = 0.0, **settings):
    """PEFT's LoRA on all linear layers, B nonzero."""
    config = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "lora_dropout": dropout}
    model = get_peft_model(model, LoraConfig(**{**config, "task_type": "CAUSAL_LM", **settings}))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def batch(padding: str = "right", rows: int = 3, length: int = 11, seed: int = 0) -> dict:
    """Token ids, mask and labels (-100 on padding and on the first two tokens of each row)."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    if padding != "none":
        for row in range(rows):
            pad = (row * 4) % (length - 3)
            if pad and padding == "right":
                mask[row, -pad:] = 0
            elif pad:
                mask[row, :pad] = 0
    ids = ids * mask
    labels = ids.masked_fill(mask == 0, -100)
    first = mask.cumsum(1) <= 2
    return {"input_ids": ids, "attention_mask": mask, "labels": labels.masked_fill(first, -100)}
