"""Language modelling: every token of plain texts, laid end to end in rows of one length."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from fastft.finetune import UserError
from fastft.finetune.data import pad_id
from fastft.finetune.reading import column

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

TEXT, LABEL = "text", None
BEST = "loss"
# Of a line of a text file: whether the text ends there. Other rows are texts of their own.
END = "ends"


def names(rows: "Dataset", config: Any, known: Sequence[str] | None = None) -> None:
    return None


def strata(rows: "Dataset", config: Any) -> None:
    return None


def lines(rows: "Dataset") -> "Dataset":
    """Rows of a text file's lines as one text: a newline after each, an end after the last."""
    from datasets import Dataset

    texts = [f"{text}\n" for text in rows["text"]]
    return Dataset.from_dict({"text": texts, END: [False] * (len(texts) - 1) + [True]})


def encode(
    rows: "Dataset",
    tokenizer: "PreTrainedTokenizerBase",
    config: Any,
    names: Sequence[str] | None = None,
) -> "Dataset":
    """A Dataset of input_ids and labels, in rows of max_length unless packing is off.

    Raises: UserError for a missing column, and for data without a single token to predict.
    """
    from datasets import Dataset

    texts = rows[column(rows, config.text_column or TEXT)][:]
    ends = rows[END][:] if END in rows.column_names else [True] * len(texts)
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise UserError(f"row {number}: expected a text, got {text!r}")
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    packed = config.packing is not False

    def tokenize(batch: dict[str, Any]) -> dict[str, Any]:
        found = tokenizer(batch["text"], add_special_tokens=not packed)["input_ids"]
        both = zip(found, batch[END], strict=True)
        ids = [row + end if last and row[-1:] != end else row for row, last in both]
        return {"input_ids": ids if packed else [row[: config.max_length] for row in ids]}

    encoded = Dataset.from_dict({"text": texts, END: ends}).map(
        tokenize, batched=True, remove_columns=["text", END]
    )
    if packed:
        encoded = _wrapped(encoded, config.max_length)
    encoded = encoded.filter(lambda row: len(row["input_ids"]) > 1)
    if not len(encoded):
        raise UserError("the data has no token to predict: its texts are empty")
    return encoded.add_column("labels", encoded["input_ids"][:])


def _wrapped(encoded: Any, length: int) -> "Dataset":
    from itertools import chain

    from datasets import Dataset

    stream = list(chain.from_iterable(encoded["input_ids"]))
    return Dataset.from_dict(
        {"input_ids": [stream[i : i + length] for i in range(0, len(stream), length)]}
    )


def collator(tokenizer: "PreTrainedTokenizerBase", config: Any) -> Callable[..., Any]:
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    return DataCollatorForLanguageModeling(pad_id(tokenizer))


metrics = None
