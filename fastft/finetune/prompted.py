"""Classification without training: a prompt for every text, and the likelihood of each label."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastft.finetune import UserError, likelihood, metrics, vocabulary
from fastft.finetune.reading import among, column
from fastft.finetune.serving import Prompts, prompts_of
from fastft.finetune.tasks import classify
from fastft.foreign import ForeignModule

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Labelled:
    """Rows as the templates see them, with the words for their labels, and positions of these."""

    rows: list[dict[str, Any]]
    labels: list[int]
    names: list[str]
    words: list[str]
    column: str


def measure(
    config: Any, model: nn.Module, tokenizer: "PreTrainedTokenizerBase", dataset: "Dataset"
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """metrics.classification's of the labels' likelihoods, and a row for each prediction.

    config: an EvaluateConfig. Probabilities are p(label | prompt) over their sum for the labels.
    """
    if config.template is None:
        config = replace(config, template="label")
    held = labelled(config, dataset)

    def named(row: dict[str, Any]) -> dict[str, Any]:
        whole = _with_text(config, row, config.examples)
        return _with_label(whole, held, _word(config, held, dataset, row))

    prompts = prompts_of(config, held.rows, tokenizer, named)
    answers = [
        [prompts.prompter.answer(_with_label(row, held, word)) for word in held.words]
        for row in held.rows
    ]
    for row in answers:
        if len(set(row)) < len(row):
            raise UserError(f"answer: the template writes two labels alike, {row[0]!r}")
    scores = _score(config, model, prompts, prompts.texts, answers)
    if config.calibrate:
        scores = likelihood.calibrate(scores, _content_free(config, model, prompts, held, answers))
    probabilities = scores.softmax(-1)
    found = metrics.classification(held.labels, probabilities.numpy(), held.names)
    predictions = [
        {
            "index": i,
            "prompt": prompts.texts[i],
            "label": held.names[held.labels[i]],
            "predicted": held.names[int(row.argmax())],
            "probabilities": dict(zip(held.names, row.tolist(), strict=True)),
        }
        for i, row in enumerate(probabilities)
    ]
    return found, predictions


def labelled(config: Any, dataset: "Dataset") -> Labelled:
    """The rows to classify. Raises UserError for labels that are not config.labels."""
    where = column(dataset, config.label_column or classify.LABEL)
    names = config.labels or classify.names(dataset, config)
    words = config.label_words or names
    if len(words) != len(names):
        raise UserError(f"label_words: {len(words)} for the {len(names)} labels {', '.join(names)}")
    if len(set(words)) < len(words):
        raise UserError("label_words: one of its own for each label")
    held = Labelled([], [], names, words, where)
    for number, row in enumerate(dataset):
        name = _name(dataset, where, row[where])
        if name not in names:
            raise UserError(f"row {number}: the label {name!r} is none of {', '.join(names)}")
        held.labels.append(names.index(name))
        held.rows.append(_with_label(_with_text(config, row, "data"), held, words[held.labels[-1]]))
    return held


def _name(dataset: "Dataset", where: str, value: Any) -> str:
    return getattr(dataset.features[where], "int2str", str)(value)


def _word(config: Any, held: Labelled, dataset: "Dataset", row: dict[str, Any]) -> str:
    """What stands for the label of an example."""
    if held.column not in row:
        raise UserError(f"{config.examples}: no column {held.column!r}")
    name = _name(dataset, held.column, row[held.column])
    if name not in held.names:
        raise UserError(f"{config.examples}: the label {name!r} is none of {', '.join(held.names)}")
    return held.words[held.names.index(name)]


def _with_text(config: Any, row: dict[str, Any], where: str) -> dict[str, Any]:
    """Templates find the text under `text`, whatever its column is called."""
    if config.text_column is None:
        return row
    return row | {"text": row[among(row, config.text_column, where)]}


def _with_label(row: dict[str, Any], held: Labelled, word: str) -> dict[str, Any]:
    return row | {held.column: word, "label": word}


def _content_free(
    config: Any, model: nn.Module, prompts: Prompts, held: Labelled, answers: Sequence[list[str]]
) -> Tensor:
    """(rows, inputs, labels): scores where the text says nothing, after each row's examples."""
    fields = prompts.prompter.names - {held.column, "label"}
    asked: dict[str, list[str]] = {}  # most rows have the examples of others
    places = []
    for row, examples, own in zip(held.rows, prompts.examples, answers, strict=True):
        for text in likelihood.CONTENT_FREE:
            emptied = {name: text for name in fields if isinstance(row.get(name), str)}
            prompt = prompts.prompter.prompt(row | emptied, examples)
            asked[prompt] = own
            places.append(prompt)
    scores = _score(config, model, prompts, list(asked), list(asked.values()))
    order = {prompt: i for i, prompt in enumerate(asked)}
    found = scores[torch.tensor([order[prompt] for prompt in places])]
    return found.view(len(held.rows), len(likelihood.CONTENT_FREE), -1)


def _score(
    config: Any,
    model: ForeignModule,
    prompts: Prompts,
    texts: list[str],
    answers: Sequence[list[str]],
) -> Tensor:
    from tqdm import tqdm

    ids = prompts.prompter.ids
    rows = (
        [token for answer in own for token in ids(text + answer)]
        for text, own in zip(texts, answers, strict=True)
    )
    known = getattr(model.config.get_text_config(), "vocab_size", None)
    vocabulary.check(rows, prompts.prompter.tokenizer, known)
    with tqdm(total=len(texts), desc="prompts", disable=None) as bar:
        return likelihood.score(
            model,
            ids,
            texts,
            answers,
            batch_size=config.batch_size,
            progress=bar.update,
        )
