"""Named entities: a tag for every word, learned at the word's first token."""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from fastft.finetune import UserError
from fastft.finetune.data import IGNORED
from fastft.finetune.reading import column, listed

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

TEXT, LABEL = "tokens", "tags"
BEST = "f1_micro"


def names(rows: "Dataset", config: Any, known: Sequence[str] | None = None) -> list[str]:
    """The tags in rows, O first, in the order of known where that has them all."""
    found = labels_in(rows, config)
    if len(found) < 2 and not (known and config.continues):
        raise UserError(
            f"every word has the tag {', '.join(found)!r}: there is nothing to tell apart"
        )
    if known is not None and found <= set(known):
        return list(known)
    if all(tag.isdecimal() for tag in found):
        raise UserError(
            f"the tags are numbers ({', '.join(sorted(found, key=int)[:4])}, …), which do not tell "
            "what is an entity; write their names (O, B-PER, I-PER, …)"
        )
    return sorted(found, key=lambda tag: (tag != "O", tag.partition("-")[2], tag))


def labels_in(rows: "Dataset", config: Any) -> set[str]:
    """The tags in rows."""
    where = column(rows, config.label_column or LABEL)
    return {tag for tags in _tags(rows, where) for tag in tags}


def strata(rows: "Dataset", config: Any) -> None:
    return None


def encode(
    rows: "Dataset", tokenizer: "PreTrainedTokenizerBase", config: Any, names: Sequence[str]
) -> "Dataset":
    """A Dataset of input_ids, attention_mask and labels, IGNORED after a word's first token.

    Raises: UserError for a missing column, rows of unequal length, and a tag that is not in names.
    """
    if not tokenizer.is_fast:
        raise UserError("ner: this model's tokenizer cannot tell which word a token belongs to")
    words = rows[column(rows, config.text_column or TEXT)]
    tags = list(_tags(rows, column(rows, config.label_column or LABEL)))
    ids = {name: i for i, name in enumerate(names)}
    for number, (row, own) in enumerate(zip(words, tags, strict=True)):
        if not isinstance(row, list) or not row:
            raise UserError(f"row {number}: expected a list of words, got {row!r}")
        if len(row) != len(own):
            raise UserError(f"row {number}: {len(row)} words and {len(own)} tags")
        for tag in own:
            if tag not in ids:
                raise UserError(f"row {number}: the tag {tag!r} is not one of {listed(names)}")

    def tokenize(batch: dict[str, Any]) -> dict[str, Any]:
        encoded = tokenizer(
            batch["words"],
            is_split_into_words=True,
            truncation=True,
            max_length=config.max_length,
        )
        encoded["labels"] = [
            align(encoded.word_ids(i), [ids[tag] for tag in own])
            for i, own in enumerate(batch["tags"])
        ]
        out: dict[str, Any] = encoded
        return out

    from datasets import Dataset

    held = Dataset.from_dict({"words": words[:], "tags": tags})
    return held.map(tokenize, batched=True, remove_columns=["words", "tags"])


def align(word_ids: Sequence[int | None], tags: Sequence[int]) -> list[int]:
    """Labels of tokens: a word's tag at its first token, IGNORED elsewhere."""
    before = [None, *word_ids]
    return [
        IGNORED if word is None or word == last else tags[word]
        for word, last in zip(word_ids, before, strict=False)
    ]


def collator(tokenizer: "PreTrainedTokenizerBase", config: Any) -> Callable[..., Any]:
    from transformers import DataCollatorForTokenClassification

    return DataCollatorForTokenClassification(tokenizer)


def reduce(logits: Any, labels: Any) -> Any:
    """What an evaluation keeps of the logits, (batch, tokens, tags): the likeliest tag."""
    return logits.argmax(-1)


def metrics(names: Sequence[str], config: Any) -> Callable[..., Any]:
    """(tags (n, tokens), labels (n, tokens)) -> what fastft.finetune.metrics gives."""
    from fastft.finetune import metrics

    def compute(predicted: Any, labels: Any) -> dict[str, Any]:
        kept = labels != IGNORED  # a word that was cut off has no label either
        true, found = (
            [[names[tag] for tag in row[mask]] for row, mask in zip(tags, kept, strict=True)]
            for tags in (labels, predicted)
        )
        return metrics.entities(true, found)

    return compute


def _tags(rows: "Dataset", where: str) -> Iterator[list[str]]:
    feature = getattr(rows.features[where], "feature", None)
    text_of = getattr(feature, "int2str", str)
    for number, tags in enumerate(rows[where]):
        if not isinstance(tags, list):
            raise UserError(f"row {number}: expected a list of tags, got {tags!r}")
        yield [text_of(tag) for tag in tags]
