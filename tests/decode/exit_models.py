"""Models that draft from their own first layers, and heads to draft through."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import fastft
from fastft.decode.exit_head import ExitHead
from fastft.decode.generate import generate

VOCABULARY, HIDDEN, LAYERS = 96, 32, 4


def llama(**settings):
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=64, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        initializer_range=0.1, bos_token_id=0, eos_token_id=1, pad_token_id=2, **settings,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def gpt2(dropout=0.0):
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=HIDDEN, n_layer=LAYERS, n_head=4, n_positions=128,
        initializer_range=0.1, bos_token_id=0, eos_token_id=1, pad_token_id=2,
        resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def lora(model, targets=("q_proj", "down_proj")):
    model = get_peft_model(model, LoraConfig(r=4, target_modules=list(targets)))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    return model.eval()


MODELS = {
    "llama": llama,
    "gpt2": gpt2,
    "lora": lambda: lora(llama()),
    "lora_head": lambda: lora(llama(), ("q_proj", "lm_head")),
    "patched": lambda: patched(lora(llama())),
}


def patched(model, **settings):
    fastft.patch(model, **settings)
    return model


def exit_head(exit_layer=3, vocabulary=None, seed=0):
    """One that corrects something, so that its drafts are now right, now wrong."""
    generator = torch.Generator().manual_seed(seed)
    head = ExitHead(HIDDEN, exit_layer, 4, vocabulary, generator)
    head.b.data.normal_(std=0.02, generator=generator)
    return head


def texts(model, rows=24, length=40):
    """What the model itself says: there a head can be right."""
    start = torch.randint(3, VOCABULARY, (rows, 2), generator=torch.Generator().manual_seed(5))
    out = generate(model, start, max_new_tokens=length, do_sample=True, seed=0, eos_token_id=None)
    return out.sequences.tolist()
