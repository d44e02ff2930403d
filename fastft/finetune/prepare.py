"""`fastft prepare`: raw rows to a folder of train, validation and test, in one format.

Rows pass by once, cleaned and written to a file aside; of each only numbers stay in memory. When
all have been seen, the splits are drawn and the lines of that file dealt out. The folder appears
when it is complete: an interrupted run, or a full disk, leaves nothing.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from fastft.finetune import UserError, formats, prepare_report, readers, reading, splitting
from fastft.finetune.cleaning import Filters, Normalization, repair
from fastft.finetune.config import Config, option
from fastft.finetune.duplicates import Near
from fastft.finetune.formats import Format
from fastft.finetune.readers import Row
from fastft.finetune.run_folder import new_folder
from fastft.finetune.sieve import Drop, Kept, Place, Rules, Sieve

SHOWN = 200  # characters of a dropped text in dropped.jsonl


@dataclass(kw_only=True)
class PrepareConfig(Config):
    """Cleans a data set, removes its duplicates, converts it and splits it.

    Reads .txt .csv .tsv .json .jsonl .parquet .conll, larger than memory too; writes a folder with
    train.jsonl, validation.jsonl, test.jsonl, dropped.jsonl (every row dropped, and why),
    metrics.json and overview.png.
    """

    data: str = option(help="a file, or a folder with train and test files, whose splits are kept")
    output: str = option(help="the folder to make; nothing is overwritten")
    text_column: str | None = option(None, "the column of texts, or of words; default: by its name")
    label_column: str | None = option(None, "the column of labels, or of tags; default: by name")
    keep_columns: list[str] | None = option(None, "columns to keep beside those of the format")
    source_format: Format | None = option(None, "format of the data; default: by its columns")
    target_format: Format | None = option(None, "format to convert to; default: the same")
    paragraphs: bool = option(False, "a row of a .txt ends at an empty line, not at every line")
    fix: bool = option(True, "repair texts decoded wrongly, entities, control characters (ftfy)")
    normalization: Normalization = option("NFC", "Unicode form of the texts")
    strip: bool = option(True, "remove spaces at both ends, but not between prompt and completion")
    min_characters: int = option(1, "drop shorter rows", least=1)
    max_characters: int | None = option(None, "drop longer rows", least=1)
    min_letters: float = option(
        0.0, "drop rows with a smaller share of letters and digits of any script", least=0, most=1
    )
    max_compression: float = option(
        10.0, "drop rows that zlib makes this many times smaller: they repeat themselves", above=1
    )
    duplicates: bool = option(True, "drop duplicates; if not, they are kept in one split together")
    near_duplicates: bool = option(True, "count what is nearly the same as a duplicate (MinHash)")
    near_threshold: float = option(
        0.85, "Jaccard similarity from which two rows are nearly the same", least=0.1, most=0.99
    )
    near_shingle: int = option(5, "characters that are compared together", least=1)
    near_permutations: int = option(128, "length of a row's MinHash signature", least=16)
    validation: float = option(0.1, "share of the rows for validation", least=0, most=0.9)
    test: float = option(0.1, "share of the rows for the test", least=0, most=0.9)
    seed: int = option(0, "the split is drawn by it", least=0)

    def check(self) -> None:
        if self.validation + self.test > 0.9 + 1e-9:
            raise UserError("validation and test: expected at most 0.9 together, to train on some")
        if self.max_characters is not None and self.max_characters < self.min_characters:
            raise UserError("max_characters: expected no less than min_characters")


@dataclass(frozen=True)
class PrepareResult:
    """The folder that was made, and what metrics.json in it says."""

    folder: Path
    metrics: dict[str, Any]

    @property
    def splits(self) -> dict[str, int]:
        """Rows of each split."""
        return {name: held["rows"] for name, held in self.metrics["splits"].items()}

    @property
    def dropped(self) -> dict[str, int]:
        """Rows dropped for each reason."""
        out: dict[str, int] = self.metrics["dropped"]
        return out


@dataclass(frozen=True)
class Source:
    """What is read: files with the split they are already of, and how their rows are meant."""

    files: dict[Path, str | None]
    format: str
    renamed: dict[str, str]

    @property
    def given(self) -> bool:
        """Whether the data comes split."""
        return None not in self.files.values()


def prepare(config: PrepareConfig) -> PrepareResult:
    """Makes config.output of config.data, prints a table of what became of the rows.

    Raises: UserError for data that cannot be read or has no such column, where no row is left,
    labels are of two kinds or all the same, for an output that exists or is being made, and for a
    full disk: then nothing is written.
    """
    output = Path(config.output).expanduser()
    if os.path.lexists(output):
        raise UserError(f"{output} exists already; nothing was overwritten")
    source = _source(config)
    with new_folder(output) as folder:
        kept, dropped = _sift(config, source, folder)
        _check_kept(config, kept, dropped)
        splits = _deal(config, kept, source.given, folder)
        metrics = prepare_report.metrics(config, source, kept, splits, dropped)
        with _open(folder / "metrics.json") as file:
            json.dump(metrics, file, indent=1, ensure_ascii=False)
        prepare_report.plot(metrics, kept.lengths, splits, folder / "overview.png")
    print(prepare_report.text(metrics, output))
    return PrepareResult(output, metrics)


def _source(config: PrepareConfig) -> Source:
    path = reading.located(config.data)
    files: dict[Path, str | None] = {path: None}
    if path.is_dir():
        # Of two that are the same, the later is dropped: train loses what is asked in a test.
        files = {file: name for name, file in reversed(reading.split_files(path).items())}
    first = list(islice(_rows(next(iter(files)), config), 100))
    if not first:
        raise UserError(f"{next(iter(files))}: empty, no rows in it")
    columns = {name: None for row in first for name in row}
    for name in (config.text_column, config.label_column, *(config.keep_columns or ())):
        if name is not None:
            reading.among(columns, name, config.data)
    words = any(isinstance(row.get(config.text_column or "tokens"), list) for row in first)
    names = (config.text_column, config.label_column)
    meant = ("tokens", "tags") if words else ("text", "label")
    renamed = {name: as_ for name, as_ in zip(names, meant, strict=True) if name is not None}
    seen = [_named(row, renamed) for row in first]
    if renamed:  # only what the user named, and what is left to its own name
        seen = [{name: row[name] for name in meant if name in row} for row in seen]
    format = config.source_format or formats.detect(seen)
    formats.check_possible(format, config.target_format or format)
    return Source(files, format, renamed)


def _rows(path: Path, config: PrepareConfig) -> Iterator[Row]:
    rows = readers.records(path)
    return _paragraphs(rows) if config.paragraphs and path.suffix == ".txt" else rows


def _paragraphs(lines: Iterator[Row]) -> Iterator[Row]:
    held: list[str] = []
    for row in lines:
        if "text" not in row:  # CoNLL
            yield row
        elif row["text"].strip():
            held.append(row["text"])
        elif held:
            yield {"text": "\n".join(held)}
            held = []
    if held:
        yield {"text": "\n".join(held)}


def _named(row: Row, renamed: dict[str, str]) -> Row:
    rest = {name: value for name, value in row.items() if name not in renamed}
    return rest | {as_: row.get(name) for name, as_ in renamed.items()}


def _sift(config: PrepareConfig, source: Source, folder: Path) -> tuple[Kept, Counter[str]]:
    """Writes rows.jsonl and dropped.jsonl: the numbers of the one, the reasons of the other."""
    from tqdm import tqdm

    kept, dropped = Kept(), Counter[str]()
    sieve = Sieve(_rules(config, source), kept)
    with (
        _open(folder / "rows.jsonl") as rows_file,
        _open(folder / "dropped.jsonl") as dropped_file,
        tqdm(desc="rows", unit="", unit_scale=True, disable=None) as bar,
    ):
        for path, split in source.files.items():
            for number, raw in enumerate(_rows(path, config)):
                bar.update()
                place = Place(path.name, number, split)
                try:
                    row = sieve.take(_named(raw, source.renamed), place)
                except Drop as drop:
                    dropped[drop.reason] += 1
                    shown = json.dumps(raw, ensure_ascii=False, default=str)[:SHOWN]
                    _write(dropped_file, drop.record(place, kept) | {"text": shown})
                else:
                    extra = {name: raw.get(name) for name in config.keep_columns or ()}
                    _write(rows_file, extra | row)
    return kept, dropped


def _rules(config: PrepareConfig, source: Source) -> Rules:
    filters = Filters(
        config.min_characters, config.max_characters, config.min_letters, config.max_compression
    )
    near = Near(config.near_threshold, config.near_shingle, config.near_permutations)
    return Rules(
        source=source.format,
        target=config.target_format or source.format,
        repair=repair(config.fix, config.normalization),
        strip=config.strip,
        filters=filters,
        near=near if config.near_duplicates else None,
        drop_duplicates=config.duplicates,
    )


def _open(path: Path) -> TextIO:
    # Labels and dropped rows may hold half a character, which UTF-8 cannot.
    return open(path, "w", encoding="utf-8", errors="replace")


def _write(file: TextIO, row: Row) -> None:
    file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")


def _check_kept(config: PrepareConfig, kept: Kept, dropped: Counter[str]) -> None:
    if not len(kept):
        why = ", ".join(f"{count} {reason}" for reason, count in dropped.most_common())
        raise UserError(f"{config.data}: no row is left ({why}); nothing was written")
    for pair in (("one", "list"), ("name", "number")):
        found = [first for kind, first in kept.kinds.items() if kind in pair]
        if len(found) == 2:
            told = (f"{label!r:.60} (row {place.row} of {place.file})" for label, place in found)
            raise UserError(
                f"{config.data}: the labels {' and '.join(told)} cannot be read as one column; "
                "nothing was written"
            )
    labels = set(kept.labels)
    if len(labels) == 1 and len(only := labels.pop()) == 1 and "one" in kept.kinds:
        raise UserError(
            f"{config.data}: every row has the label {only[0]!r}, and there is nothing to learn "
            "from one; nothing was written"
        )


def _deal(config: PrepareConfig, kept: Kept, given: bool, folder: Path) -> list[str]:
    """Writes the lines of rows.jsonl to the files of their splits; the split of each row."""
    if given:
        found = [str(place.split) for place in kept.places]
    else:
        strata = splitting.rarest(kept.labels)
        firsts = [row for row in range(len(kept)) if kept.first(row) == row]
        shares = {"validation": config.validation, "test": config.test}
        drawn = splitting.split([strata[row] for row in firsts], shares, config.seed)
        by_first = dict(zip(firsts, drawn, strict=True))
        found = [by_first[kept.first(row)] for row in range(len(kept))]
    with ExitStack() as files, open(folder / "rows.jsonl", encoding="utf-8") as rows:
        names = sorted(set(found))
        outputs = {n: files.enter_context(_open(folder / f"{n}.jsonl")) for n in names}
        for line, name in zip(rows, found, strict=True):
            outputs[name].write(line)
    (folder / "rows.jsonl").unlink()
    return found
