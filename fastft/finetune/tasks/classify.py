"""Classification of texts: one label of several, or with multi_label any number of them."""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from fastft.finetune import UserError
from fastft.finetune.reading import column, listed

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

TEXT, LABEL = "text", "label"
BEST = "f1_macro"


def names(rows: "Dataset", config: Any, known: Sequence[str] | None = None) -> list[str]:
    """The classes in rows, in the order of known where that has them all, else sorted.

    Raises: UserError for rows without a label, and where there is nothing to tell apart.
    """
    found = labels_in(rows, config)
    if not config.multi_label and len(found) < 2 and not (known and config.continues):
        raise UserError(
            f"every row to learn from has the label {found.pop()!r}: there is nothing to tell apart"
        )
    if not found:
        raise UserError(f"no row has any label under {config.label_column or LABEL!r}")
    if known is not None and found <= set(known):
        return list(known)
    return sorted(found, key=_order)


def labels_in(rows: "Dataset", config: Any) -> set[str]:
    """The classes in rows."""
    where = column(rows, config.label_column or LABEL)
    return {name for row in _labels(rows, where, config.multi_label) for name in row}


def strata(rows: "Dataset", config: Any) -> list[str] | None:
    """What a split has to keep the shares of; None for several labels per text."""
    if config.multi_label:
        return None
    return [label for (label,) in _labels(rows, column(rows, config.label_column or LABEL), False)]


def encode(
    rows: "Dataset", tokenizer: "PreTrainedTokenizerBase", config: Any, names: Sequence[str]
) -> "Dataset":
    """A Dataset of input_ids, attention_mask and labels: an int, or 0.0 and 1.0 for every class.

    Raises: UserError for a missing column, a text that is none, and a label that is not in names.
    """
    texts = rows[column(rows, config.text_column or TEXT)]
    where = column(rows, config.label_column or LABEL)
    ids = {name: i for i, name in enumerate(names)}
    labels = []
    for number, row in enumerate(_labels(rows, where, config.multi_label)):
        for name in row:
            if name not in ids:
                raise UserError(f"row {number}: the label {name!r} is not one of {listed(names)}")
        one = [float(name in row) for name in names] if config.multi_label else ids[row[0]]
        labels.append(one)
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise UserError(f"row {number}: expected a text to classify, got {text!r}")

    def tokenize(batch: dict[str, Any]) -> dict[str, Any]:
        out: dict[str, Any] = tokenizer(
            batch["text"], truncation=True, max_length=config.max_length
        )
        return out

    from datasets import Dataset

    encoded = Dataset.from_dict({"text": texts[:]}).map(
        tokenize, batched=True, remove_columns="text"
    )
    for number, row in enumerate(encoded["input_ids"]):
        if not row:
            raise UserError(f"row {number}: the text has no tokens")
    return encoded.add_column("labels", labels)


def collator(tokenizer: "PreTrainedTokenizerBase", config: Any) -> Callable[..., Any]:
    from transformers import DataCollatorWithPadding

    return DataCollatorWithPadding(tokenizer)


def metrics(names: Sequence[str], config: Any) -> Callable[..., Any]:
    """(logits (n, classes), labels) -> what fastft.finetune.metrics gives."""
    import torch

    from fastft.finetune import metrics

    def compute(logits: Any, labels: Any) -> dict[str, Any]:
        logits = torch.from_numpy(logits).double()
        if config.multi_label:
            return metrics.multi_label(labels, logits.sigmoid().numpy(), names)
        return metrics.classification(labels, logits.softmax(-1).numpy(), names)

    return compute


def _labels(rows: "Dataset", where: str, several: bool) -> Iterator[list[str]]:
    """The labels of each row as a list of names."""
    feature = rows.features[where]
    text_of = getattr(feature, "int2str", str)
    for number, value in enumerate(rows[where]):
        if value is None or value == "":
            if several and value == "":
                yield []
                continue
            raise UserError(f"row {number}: no label under {where!r}")
        if several:
            parts = value.split(",") if isinstance(value, str) else value
            if not isinstance(parts, list):
                raise UserError(f"row {number}: expected labels in a list, got {value!r}")
            yield [str(part).strip() for part in parts]
        elif isinstance(value, list | dict):
            raise UserError(
                f"row {number}: expected one label, got {value!r}; multi_label takes several"
            )
        elif isinstance(value, float) and not value.is_integer():
            raise UserError(
                f"row {number}: the label {value!r} is a measure; classify tells classes apart"
            )
        else:
            yield [text_of(value)]


def _order(name: str) -> tuple[Any, ...]:
    """Numbers by their value, before words."""
    return (0, int(name), "") if name.lstrip("-").isdigit() else (1, 0, name)
