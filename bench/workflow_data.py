"""Real texts as files of the command line, and a small model of their own: what workflows train."""

import json
from collections.abc import Iterable
from pathlib import Path

from fastft.finetune import assets, labelled


def write(path: Path, rows: Iterable[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def reviews(folder: Path, train: int, test: int) -> Path:
    """Rotten Tomatoes as a folder of train and test files, no text in both."""
    parts = labelled.read_reviews(assets.dataset("reviews"), "rotten_tomatoes", test)
    for name, pairs, count in zip(("train", "test"), parts, (train, test), strict=True):
        rows = [{"text": t, "label": labelled.SENTIMENTS[label]} for t, label in pairs[:count]]
        write(folder / f"{name}.jsonl", rows)
    return folder


def texts(folder: Path, count: int = 3000) -> Path:
    """Rotten Tomatoes as text files, a review a line."""
    pairs = labelled.read_reviews(assets.dataset("reviews"), "rotten_tomatoes", 500)
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in zip(("train", "test"), (pairs[0][:count], pairs[1]), strict=True):
        (folder / f"{name}.txt").write_text("".join(f"{text}\n" for text, _ in part))
    return folder


def small_gpt2(folder: Path, text: Path) -> Path:
    """A GPT-2 of two layers with random weights, and a tokenizer learned from text."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    learned = ByteLevelBPETokenizer()
    learned.train([str(text)], vocab_size=4096, special_tokens=["<end>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=learned._tokenizer, bos_token="<end>", eos_token="<end>"
    )
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=4096, n_positions=256, n_embd=128, n_layer=2, n_head=4,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def news(folder: Path) -> Path:
    """CoNLL-2003's sentences as text files."""
    source = Path(assets.dataset("conll2003"))
    folder.mkdir(parents=True, exist_ok=True)
    for part, count in (("train", 3000), ("test", 800)):
        sentences = labelled.read_conll(source / f"{part}.txt")[:count]
        lines = (" ".join(words) + "\n" for words, _ in sentences)
        (folder / f"{part}.txt").write_text("".join(lines))
    return folder
