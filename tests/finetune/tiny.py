"""Random models of a few thousand weights with a word tokenizer, data, and the losses of a run."""

import json
from pathlib import Path

import torch

WORDS = [f"word{i}" for i in range(60)]
TEMPLATE = (
    "{% for m in messages %}<s> {{ m.role }} {{ m.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<s> assistant {% endif %}"
)


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", "user", "assistant", *WORDS]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="</s>")
    made.chat_template = TEMPLATE
    return made


def save_model(folder: Path) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=5 + len(WORDS),
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def save_encoder(folder: Path) -> Path:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        vocab_size=5 + len(WORDS),
    )
    BertModel(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def labelled(count: int = 24) -> list[dict]:
    """Texts whose first word tells the label."""
    return [
        {
            "text": " ".join(WORDS[(i % 2) * 30 + i % 7 : (i % 2) * 30 + i % 7 + 3 + i % 4]),
            "label": ("bad", "good")[i % 2],
        }
        for i in range(count)
    ]


def tagged(count: int = 24) -> list[dict]:
    """Words of which the later ones are names."""
    rows = []
    for i in range(count):
        places = [(7 * i + 11 * j) % len(WORDS) for j in range(4 + i % 3)]
        tags = ["B-PER" if place >= 30 else "O" for place in places]
        rows.append({"tokens": [WORDS[place] for place in places], "tags": tags})
    return rows


def texts(count: int = 24) -> list[dict]:
    return [{"text": " ".join(WORDS[i % 9 : i % 9 + 8])} for i in range(count)]


def save_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def save_data(path: Path, count: int = 12) -> Path:
    records = [
        {"instruction": " ".join(WORDS[i : i + 2 + i % 3]), "output": " ".join(WORDS[i : 3 * i])}
        for i in range(1, count + 1)
    ]
    path.write_text(json.dumps(records))
    return path


def losses(folder: Path, name: str = "loss") -> list[float]:
    """What a run's Trainer logged, in its order; name: "loss" of training, or "eval_loss"."""
    entries = json.loads((folder / "log.json").read_text())
    return [entry[name] for entry in entries if name in entry]
