"""From the files of a run to the rows that are trained on, validated on and tested on."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastft.finetune import UserError, assets, reading, tasks

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

# Where a model sets no limit, or one that nobody's memory holds.
LONGEST = {"classify": 512, "ner": 512, "lm": 1024, "sft": 1024}


def files(config: Any) -> list[Path]:
    """The files that config names, for their hashes."""
    place = reading.located(config.data)
    found = list(reading.split_files(place).values()) if place.is_dir() else [place]
    if config.validation_data is not None:
        found.append(reading.located(config.validation_data))
    for path in config.old_data or ():
        place = reading.located(path)
        found.append(reading.split_files(place)["train"] if place.is_dir() else place)
    return found


def read(config: Any) -> dict[str, Any]:
    """{"train", "validation" and "test" where there are any}: rows as the files hold them.

    Without validation data a share of the training rows is held out, stratified by label where
    every class has two rows; of a text file its end.
    Raises: UserError.
    """
    rows = reading.splits(config.data)
    if config.validation_data is not None:
        if "validation" in rows:
            raise UserError(f"validation_data: {config.data} has a validation file already")
        rows["validation"] = reading.rows(config.validation_data)
    if config.folds:
        return rows
    if "validation" not in rows and config.validation > 0:
        rows |= _hold_out(rows["train"], config)
    if "validation" not in rows and config.early_stopping:
        raise UserError("early_stopping: there is no validation data to stop by")
    return rows


def folds(rows: dict[str, Any], config: Any) -> list[dict[str, Any]]:
    """rows split config.folds times, validated on another part each time (StratifiedKFold)."""
    from sklearn.model_selection import KFold, StratifiedKFold

    if "validation" in rows:
        raise UserError("folds: every fold validates on its own part; give training data alone")
    train = rows["train"]
    if len(train) < config.folds:
        raise UserError(f"folds: {len(train)} rows are fewer than {config.folds} folds")
    strata = tasks.of(config.task).strata(train, config)
    if strata is not None and (least := _rarest(strata))[1] < config.folds:
        raise UserError(
            f"folds: the label {least[0]!r} has {least[1]} rows, fewer than {config.folds} folds"
        )
    kind = KFold if strata is None else StratifiedKFold
    splitter = kind(config.folds, shuffle=True, random_state=config.seed)
    return [
        rows | {"train": train.select(learned), "validation": train.select(held)}
        for learned, held in splitter.split(range(len(train)), strata)
    ]


def encode(
    rows: dict[str, Any],
    tokenizer: "PreTrainedTokenizerBase",
    config: Any,
    names: Sequence[str] | None,
) -> dict[str, Any]:
    """Datasets of the same splits, as the task gives them to the model. Raises: UserError."""
    task = tasks.of(config.task)
    encoded = {}
    for split, held in rows.items():
        if config.task == "lm" and _is_text(config, split):
            held = task.lines(held)
        try:
            encoded[split] = task.encode(held, tokenizer, config, names)
        except UserError as error:
            raise UserError(f"{split}: {error}") from None
    return encoded


def limit(config: Any, tokenizer: "PreTrainedTokenizerBase", model_config: Any) -> int:
    """The tokens that an example may have: what was asked for, within what the model takes."""
    most = min(tokenizer.model_max_length, 1 << 30)
    positions = getattr(model_config, "max_position_embeddings", None)
    if positions is not None:
        # RoBERTa's positions begin behind its padding token's.
        offset = (model_config.pad_token_id or 0) + 1 if _is_roberta(model_config) else 0
        most = min(most, positions - offset)
    if config.method in ("prompt", "prefix"):
        most -= config.virtual_tokens
    if config.max_length is None:
        return min(most, LONGEST[config.task])
    if config.max_length > most:
        raise UserError(f"max_length: {config.max_length} is more than the model's {most} tokens")
    out: int = config.max_length
    return out


def _hold_out(train: "Dataset", config: Any) -> dict[str, Any]:
    from sklearn.model_selection import train_test_split

    places = list(range(len(train)))
    if len(places) < 2:
        raise UserError("validation: one row cannot be split; set validation to 0 or add data")
    held = max(1, round(len(places) * config.validation))
    if config.task == "lm" and _is_text(config, "train"):
        learned, held = places[:-held], places[-held:]
    else:
        strata = tasks.of(config.task).strata(train, config)
        if strata is not None and (_rarest(strata)[1] < 2 or held < len(set(strata))):
            assets.say("validation: held out at random, since some label has too few rows")
            strata = None
        learned, held = train_test_split(
            places, test_size=held, random_state=config.seed, stratify=strata
        )
    return {"train": train.select(learned), "validation": train.select(held)}


def _rarest(strata: list[str]) -> tuple[str, int]:
    from collections import Counter

    return min(Counter(strata).items(), key=lambda item: item[1])


def _is_text(config: Any, split: str) -> bool:
    """Whether a split's rows are the lines of a text file."""
    place = reading.located(config.data)
    if split == "validation" and config.validation_data is not None:
        return reading.located(config.validation_data).suffix == ".txt"
    if not place.is_dir():
        return place.suffix == ".txt"
    found = reading.split_files(place)
    return found.get(split, found["train"]).suffix == ".txt"


def _is_roberta(model_config: Any) -> bool:
    return "roberta" in model_config.model_type or model_config.model_type == "camembert"
