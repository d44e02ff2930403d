"""Instruction data: alpaca records to chat messages, to ids and labels, to padded batches."""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastft.finetune import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100


@dataclass(frozen=True)
class Example:
    """One conversation: labels are ids where the model is to learn, IGNORED where it is not."""

    ids: list[int]
    labels: list[int]


def read_alpaca(path: Path) -> list[dict[str, str]]:
    """Records with instruction, output and an optional input, from a JSON array."""
    try:
        records = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from None
    if not isinstance(records, list) or not records:
        raise UserError(f"{path}: expected a JSON array of records that is not empty")
    for number, record in enumerate(records):
        for key in ("instruction", "output", "input"):
            held = record.get(key) if isinstance(record, dict) else None
            if not isinstance(held, str) and (key != "input" or held is not None):
                raise UserError(f"{path}: record {number}: expected a text under {key!r}")
    return records


def question(record: dict[str, str]) -> str:
    """What the user says: the instruction, and the input below it where there is one."""
    return "\n\n".join(part for part in (record["instruction"], record.get("input")) if part)


def prompt_of(record: dict[str, str], tokenizer: "PreTrainedTokenizerBase") -> str:
    """The text up to where the model answers, in its chat template or in alpaca's own form."""
    if tokenizer.chat_template is None:
        return f"### Instruction:\n{question(record)}\n\n### Response:\n"
    messages = [{"role": "user", "content": question(record)}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def answer_of(record: dict[str, str], tokenizer: "PreTrainedTokenizerBase", prompt: str) -> str:
    """The text the model is to produce, with whatever ends a turn."""
    if tokenizer.chat_template is not None:
        messages = [
            {"role": "user", "content": question(record)},
            {"role": "assistant", "content": record["output"]},
        ]
        whole = str(tokenizer.apply_chat_template(messages, tokenize=False))
        # Some templates rewrite the turns before the last: then the answer is not a suffix.
        if whole.startswith(prompt):
            return whole[len(prompt) :]
    return record["output"] + (tokenizer.eos_token or "")


def encode(record: dict[str, str], tokenizer: "PreTrainedTokenizerBase") -> Example:
    """ids and labels of one record; only the answer is labelled."""
    prompt = prompt_of(record, tokenizer)
    # Tokenized apart, so that the first token of the answer is the one seen in generation.
    before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    after = tokenizer(answer_of(record, tokenizer, prompt), add_special_tokens=False)["input_ids"]
    return Example(before + after, [IGNORED] * len(before) + after)


def collate(examples: Sequence[Example], pad_id: int) -> dict[str, Tensor]:
    """A batch padded on the right to its longest example."""
    longest = max(len(e.ids) for e in examples)

    def padded(rows: list[list[int]], fill: int) -> Tensor:
        return torch.tensor([row + [fill] * (longest - len(row)) for row in rows])

    return {
        "input_ids": padded([e.ids for e in examples], pad_id),
        "attention_mask": padded([[1] * len(e.ids) for e in examples], 0),
        "labels": padded([e.labels for e in examples], IGNORED),
    }


def shuffled(count: int, seed: int) -> list[int]:
    """0…count-1 in an order that depends on the seed alone."""
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order


def pad_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Any id will do where nothing is attended to and nothing is labelled."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            out: int = token
            return out
    return 0
