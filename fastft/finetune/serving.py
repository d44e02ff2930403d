"""A language model ready to run, and the prompts that it is given."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastft.finetune import loading, reading
from fastft.finetune.prompting import Examples, PromptConfig, Prompter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prompts:
    """The prompts of rows, what wrote them, and the examples in each."""

    prompter: Prompter
    texts: list[str]
    examples: list[list[Any]]


def prompts_of(
    config: PromptConfig,
    rows: list[dict[str, Any]],
    tokenizer: "PreTrainedTokenizerBase",
    named: Callable[[dict[str, Any]], dict[str, Any]] = lambda row: row,
) -> Prompts:
    """The prompt of every row, with the examples that config asks for.

    named: turns a row of the examples' file into what the templates see.
    """
    prompter = Prompter(config, list(rows[0]), tokenizer)
    examples: list[list[Any]] = [[] for _ in rows]
    if config.shots and config.examples is not None:
        held = Examples([named(row) for row in reading.rows(config.examples)], prompter, rows)
        examples = [held.of(row, i) for i, row in enumerate(rows)]
    texts = [prompter.prompt(row, own) for row, own in zip(rows, examples, strict=True)]
    return Prompts(prompter, texts, examples)


def serving(source: str, config: Any) -> tuple[nn.Module, Any, str | None]:
    """A language model ready to run, its tokenizer, and patch's report.

    config: has dtype, patch, threads, and perhaps decode_weights.
    """
    from fastft.patch import patch

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    tokenizer = loading.load_tokenizer(source)
    model: nn.Module = loading.load_model(source, "lm", dtype=config.dtype)
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    if not config.patch:
        return model, tokenizer, None
    stored = getattr(config, "decode_weights", "none")
    return model, tokenizer, str(patch(model, decode_weights=None if stored == "none" else stored))
