"""Tiny causal language models with random weights, scaled so that their choices are clear."""

import torch
from torch import nn
from transformers import (
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

VOCABULARY = 97
PAD, BOS, EOS = 0, 1, 2

_COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 256, "pad_token_id": PAD, "bos_token_id": BOS,
    "eos_token_id": EOS, "tie_word_embeddings": False,
}  # fmt: skip
_GPT2 = {
    "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64,
    "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS,
}  # fmt: skip
CONFIGS = {
    "llama": (LlamaConfig, _COMMON | {"attention_bias": True, "mlp_bias": True}),
    "qwen3": (Qwen3Config, _COMMON),
    "mistral": (MistralConfig, _COMMON | {"sliding_window": 6}),
    "phi3": (Phi3Config, _COMMON),
    "gpt2": (GPT2Config, _GPT2),
    "gemma2": (Gemma2Config, _COMMON | {"sliding_window": 64, "query_pre_attn_scalar": 8}),
}
FUSED = ("llama", "qwen3", "mistral", "phi3", "gpt2")


def tiny(kind: str = "llama", seed: int = 0, **changes) -> PreTrainedModel:
    """A model in eval mode; changes are fields of its configuration."""
    config, fields = CONFIGS[kind]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config(**(fields | changes)), dtype=torch.float32)
    with torch.no_grad():
        for module in model.modules():
            for name, weight in module.named_parameters(recurse=False):
                if weight.dim() > 1 and not isinstance(module, nn.Embedding):
                    weight.normal_(0, 1.5 * module.weight.shape[-1] ** -0.5)
                elif isinstance(module, nn.Embedding):
                    weight.normal_(0, 1.0)
                elif name == "bias":
                    weight.normal_(0, 0.1)
    return model.eval()


def prompt(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """(rows, length) token ids, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (rows, length), generator=generator)


def padded(lengths, side: str = "left", seed: int = 0) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask (rows, longest) of rows of these lengths."""
    ids, width = prompt(len(lengths), max(lengths), seed), max(lengths)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, width - length :] = 1
        if side == "right":
            mask[row] = mask[row].flip(0)
    return {"input_ids": ids.masked_fill(mask == 0, PAD), "attention_mask": mask}


class EveryDraft:
    """In place of DraftLength, which follows measured times: always drafts as much as it can."""

    most = 5

    def choose(self, offers):
        return [min(available, self.most) for _, available, _ in offers]

    def observe(self, *args):
        pass

    observe_step = observe_draft = drop = observe
