"""Tiny models of every architecture of transformers, made from the defaults of its configuration.

A field is known by its name, whatever the class: `hidden_size` is 32 everywhere. What a class needs
beside that stands in OWN; what cannot be built or run tiny stands in SKIPPED, with its reason.
"""

from dataclasses import dataclass

import torch
import transformers
from torch import nn
from transformers.models.auto import configuration_auto, modeling_auto

VOCABULARY, CLASSES, LAYERS = 97, 5, 4
HEADS = {
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "sequence": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "token": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
}
_NAMES = (
    (VOCABULARY, "vocab_size decoder_vocab_size entity_vocab_size pronunciation_vocab_size"
     " shape_vocab_size num_hash_buckets vocab_size_per_layer_input"),
    (64, "max_position_embeddings n_positions n_ctx max_target_positions context_length"
     " max_seq_len"),
    (48, "intermediate_size d_ff ffn_dim encoder_ffn_dim decoder_ffn_dim hidden_dim dim_ff dff"
     " feed_forward_size moe_intermediate_size shared_expert_intermediate_size ffn_hidden_size"
     " expert_ffn_hidden_size intermediate_size_mlp dense_intermediate_size n_inner"
     " shared_experts_intermediate_size shared_intermediate_size"
     " moe_shared_expert_intermediate_size"),
    (32, "hidden_size d_model n_embd dim embedding_dim word_embed_proj_dim dim_model"
     " embedding_size input_embedding_size output_embedding_size lru_width prediction_head_size"
     " d_latents emb_dim entity_emb_size"),
    (LAYERS, "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers"
     " num_decoder_layers num_encoder_layers"),
    (16, "kv_lora_rank q_lora_rank"),
    (8, "head_dim d_kv dim_head attention_head_size linear_key_head_dim linear_value_head_dim"
     " qk_nope_head_dim qk_rope_head_dim v_head_dim index_head_dim query_pre_attn_scalar"
     " sliding_window chunk_size rotary_dim"),
    (4, "num_attention_heads n_head n_heads encoder_attention_heads decoder_attention_heads"
     " num_heads attention_heads num_encoder_attention_heads num_decoder_attention_heads"
     " linear_num_key_heads linear_num_value_heads num_experts n_routed_experts num_local_experts"
     " moe_num_experts index_n_heads"),
    (2, "num_key_value_heads num_kv_heads num_experts_per_tok moe_topk moe_k top_k_experts"
     " type_vocab_size"),
    (1, "n_group topk_group first_k_dense_replace"),
)  # fmt: skip
_FIELDS = {name: size for size, names in _NAMES for name in names.split()}
_LISTS = ("layer_types", "mlp_layer_types", "layers_block_type", "block_types")
# model type -> fields, those of nested configurations as dictionaries
OWN: dict[str, dict] = {
    "bailing_hybrid": {
        "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "num_local_experts": 4,
    },
    "bamba": {
        "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8,
        "attn_layer_indices": [1, 3],
    },
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
            for kind in ("full_attention", "sliding_attention")
        }
    },
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "deepseek_v2": {"n_routed_experts": 4, "num_experts_per_tok": 2},
    "dory": {"n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1},
    "dots1": {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1,
        "layer_types": ["full_attention", "sliding_attention"] * 2,
    },
    "esm": {"vocab_size": VOCABULARY},
    "esmc": {"num_key_value_heads": 4},
    "falcon_h1": {
        "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8,
        "mamba_chunk_size": 8,
    },
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 8},
    "granitemoehybrid": {
        "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8,
        "layer_types": ["linear_attention", "full_attention"] * 2,
    },
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"num_experts_per_token": 2},
    "layoutlmv3": {"coordinate_size": 5, "shape_size": 6},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm3": {"layer_types": ["conv", "full_attention"] * 2},
    "lilt": {"hidden_size": 48},
    "longformer": {"attention_window": 8},
    "mamba2": {"head_dim": 16, "state_size": 8, "n_groups": 1},
    "ministral": {"head_dim": 8},
    "mistral4": {"head_dim": 16},
    "mobilebert": {"normalization_type": "layer_norm"},  # without norms such weights overflow
    "nemotron": {"num_key_value_heads": 2, "head_dim": 8},
    "qwen4_exp_text": {
        "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "t5": {"decoder_start_token_id": 0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention"] * 2 + ["hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
OWN["qwen4_exp"] = {"text_config": OWN["qwen4_exp_text"]}
# model type, or model type and head -> reason
SKIPPED: dict[str, str] = {
    "blt": "its own forward fails: the configuration lacks what its cache reads",
    "bros": "needs bounding boxes",
    "dots3_note": "some layers have sizes of their own: cannot be built tiny",
    "dots3_note_text": "some layers have sizes of their own: cannot be built tiny",
    "gemma3n": "needs the package timm",
    "gemma4_assistant": "drafts from the states of another model",
    "gemma4_unified_assistant": "drafts from the states of another model",
    "git": "needs images",
    "kimi_linear": "its journey takes more than two minutes",
    "layoutlmv2": "needs the package detectron2",
    "musicgen": "decodes audio codebooks, not tokens",
    "musicgen_melody": "decodes audio codebooks, not tokens",
    "reformer": "has gradients in training mode alone, which verify leaves",
    "rwkv": "its own backward fails: it writes into what autograd has saved",
    "xlstm": "its own forward fails at small sizes",
}


@dataclass(frozen=True)
class Case:
    """One class of one architecture."""

    model_type: str
    head: str  # of HEADS
    class_name: str

    @property
    def name(self) -> str:
        return f"{self.model_type}-{self.head}"

    @property
    def skipped(self) -> str | None:
        return SKIPPED.get(self.name, SKIPPED.get(self.model_type))

    def build(self, seed: int = 0) -> nn.Module:
        """The model in evaluation mode, without dropout."""
        config = tiny_config(configuration_auto.CONFIG_MAPPING[self.model_type], self.model_type)
        cls = getattr(transformers, self.class_name)
        if cls.config_class is not type(config):  # as the auto classes do
            config = config.get_text_config(decoder=True)
        if (
            self.head == "causal"
            and not config.is_encoder_decoder
            and hasattr(config, "is_decoder")
        ):
            config.is_decoder = True
        config.num_labels = CLASSES
        torch.manual_seed(seed)
        model = cls(config)
        fill(model)
        return model.float().eval()

    def batch(self, padding: str = "right", seed: int = 0) -> dict:
        """Rows of several lengths with labels, -100 at padded places and at some others."""
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.tensor([12, 5, 9] if padding != "none" else [12, 12, 12])
        mask = torch.arange(12) < lengths[:, None]
        mask = (mask.flip(1) if padding == "left" else mask).long()
        ids = torch.randint(5, VOCABULARY - 1, mask.shape, generator=generator)
        ids = torch.where(mask.cumsum(1) == lengths[:, None], 2, ids)  # the heads of some read it
        inputs = {"input_ids": torch.where(mask.bool(), ids, 1), "attention_mask": mask}
        if self.head == "sequence":
            return inputs | {"labels": torch.randint(0, CLASSES, (3,), generator=generator)}
        labels = ids if self.head == "causal" else ids % CLASSES
        counts = mask.bool() & (torch.rand(mask.shape, generator=generator) > 0.2)
        return inputs | {"labels": torch.where(counts, labels, -100)}


def cases() -> list[Case]:
    return [
        Case(model_type, head, names[model_type])
        for model_type in sorted({t for names in HEADS.values() for t in names})
        for head, names in HEADS.items()
        if model_type in names
    ]


def tiny_config(cls: type, own: dict | str):
    """A configuration of this class with few of everything."""
    own = dict(OWN.get(own, {})) if isinstance(own, str) else dict(own)
    default, fields = cls(), {}
    for name, value in vars(default).items():
        if name in own and not hasattr(value, "to_dict"):
            continue
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            fields[name] = tiny_config(type(value), own.pop(name, {}))
        elif name in _FIELDS and value is not None and not isinstance(value, list | dict):
            fields[name] = _FIELDS[name]
        elif name in _LISTS and value:
            fields[name] = _few(value)
        elif "drop" in name and isinstance(value, float):
            fields[name] = 0.0
        elif name.endswith(("_token_id", "_token_index")) and isinstance(value, int) and value > 9:
            fields[name] = VOCABULARY - 1
    if "kv_lora_rank" in vars(default) and "num_key_value_heads" in fields:
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    for name, token in (("pad_token_id", 1), ("eos_token_id", 2), ("bos_token_id", 3)):
        if hasattr(default, name):
            fields[name] = token
    return cls(**fields | own)


_WEIGHTED = (nn.Linear, nn.Embedding, nn.Conv1d, transformers.pytorch_utils.Conv1D)


def _few(kinds: list[str]) -> list[str]:
    """LAYERS of them, in their order, one of every kind if that is possible."""
    few = kinds[:LAYERS]
    for i, kind in enumerate(sorted(set(kinds) - set(few))):
        few[-1 - i] = kind
    return few


def fill(model: nn.Module) -> None:
    """Weights large enough for attention to matter, norms and biases that are not one and zero."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 1 and name in ("weight", "bias"):
                parameter.data.add_(0.1 * torch.randn_like(parameter))
            elif parameter.dim() >= 2 and (isinstance(module, _WEIGHTED) or name.endswith("_proj")):
                parameter.data.normal_(0, 0.15)
