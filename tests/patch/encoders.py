"""Tiny encoders with every head, random weights, and padded batches for them."""

import torch
import transformers

VOCABULARY, CLASSES = 97, 5
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
    "num_labels": CLASSES,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
_TOKENS = {"bos_token_id": 0, "eos_token_id": 2, "cls_token_id": 0, "sep_token_id": 2}
_DISTIL = {
    "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48,
    "dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0, "qa_dropout": 0.0,
}  # fmt: skip
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "resid_pdrop": 0.0}
_GPT2 |= {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 2}
# name -> (class prefix, settings that differ)
ENCODERS = {
    "bert": ("Bert", {}),
    "roberta": ("Roberta", {}),
    "xlm-roberta": ("XLMRoberta", {}),
    "distilbert": ("DistilBert", _DISTIL),
    "electra": ("Electra", {"embedding_size": 16, "summary_last_dropout": 0.0}),
    "albert": ("Albert", {"embedding_size": 16, "classifier_dropout_prob": 0.0}),
    "modernbert": ("ModernBert", {**_TOKENS, "local_attention": 6}),
}
DECODERS = {"gpt2": ("GPT2", _GPT2), "llama": ("Llama", {"num_key_value_heads": 2})}
HEADS = (
    "SequenceClassification", "TokenClassification", "MultipleChoice", "QuestionAnswering",
    "MaskedLM",
)  # fmt: skip


def encoder(name: str, head: str, seed: int = 0, **settings):
    """A model in evaluation mode; weights large enough for attention to matter."""
    prefix, own = {**ENCODERS, **DECODERS}[name]
    common = dict(_COMMON)
    if name in ("distilbert", "gpt2"):
        common = {k: _COMMON[k] for k in ("vocab_size", "pad_token_id", "num_labels")}
    config = getattr(transformers, f"{prefix}Config")(**{**common, **own, **settings})
    if head == "QuestionAnswering":
        config.num_labels = 2  # start and end
    torch.manual_seed(seed)
    model = getattr(transformers, f"{prefix}For{head}")(config)
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, std=0.15)
    return model.eval()


LENGTHS = {"right": (11, 1, 6, 8), "left": (11, 1, 6, 8), "none": (11, 11, 11), "empty": (4, 0, 9)}


def batch(head: str, padding: str = "right", seed: int = 0) -> dict:
    """Rows of the lengths named, with labels as the head takes them."""
    generator = torch.Generator().manual_seed(seed)

    def numbers(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator)

    lengths = torch.tensor(LENGTHS[padding])
    rows, longest = len(lengths), 11
    place = torch.arange(longest)
    mask = place < lengths[:, None]
    mask = (mask.flip(1) if padding == "left" else mask).long()
    ids = torch.where(mask.bool(), numbers(3, VOCABULARY, rows, longest), 1)
    inputs = {"input_ids": ids, "attention_mask": mask}
    if head == "MultipleChoice":  # the rows twice, as two choices of each question
        inputs = {k: torch.stack((v, v.flip(0)), 1) for k, v in inputs.items()}
        return inputs | {"labels": numbers(0, 2, rows)}
    if head == "QuestionAnswering":
        return inputs | {
            "start_positions": numbers(0, 3, rows),
            "end_positions": numbers(0, 4, rows),
        }
    if head == "SequenceClassification":
        return inputs | {"labels": numbers(0, CLASSES, rows)}
    wide = head == "MaskedLM"
    labels = numbers(0, VOCABULARY if wide else CLASSES, rows, longest)
    chosen = numbers(0, 4, rows, longest) == 0 if wide else numbers(0, 5, rows, longest) > 0
    return inputs | {"labels": torch.where(mask.bool() & chosen, labels, -100)}
