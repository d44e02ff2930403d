"""The rows of files: text, csv, tsv, json, jsonl, parquet and CoNLL, one in memory at a time.

Not `datasets.load_dataset`: it counts its calls over the network, takes the text "NA" of a csv for
a missing value, and types a column by the first rows alone.
"""

import codecs
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fastft.finetune import UserError

Row = dict[str, Any]

CHUNK = 1 << 16  # characters or bytes read at a time
LARGEST_RECORD = 1 << 28  # characters; what is longer is a bracket left open
BATCH = 1000  # rows at a time of a parquet file


def records(path: Path) -> Iterator[Row]:
    """The rows of one file in its order, one in memory at a time; raises as reading.rows does."""
    import pyarrow

    path = Path(path)
    read = READERS.get(path.suffix.lower())
    if path.is_dir():
        raise UserError(f"{path}: a folder; expected a file")
    if read is None:
        raise UserError(f"{path}: expected a file that ends in {', '.join(READERS)}")
    try:
        yield from read(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or _first_line(error)}") from None
    except RecursionError:
        raise UserError(f"{path}: a record is nested too deeply") from None
    except UnicodeDecodeError:
        raise UserError(_not_utf8(path)) from None
    except pyarrow.ArrowException as error:
        if "invalid UTF8" in str(error):
            raise UserError(_not_utf8(path)) from None
        if "Empty CSV" in str(error):
            return
        raise UserError(f"{path}: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _not_utf8(path: Path) -> str:
    """Where the first byte lies that is not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    done, lines = 0, 1
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            held = len(decoder.getstate()[0])  # the start of a character, from the last chunk
            try:
                decoder.decode(chunk, final=len(chunk) < CHUNK)
            except UnicodeDecodeError as error:
                at = done - held + error.start
                lines += chunk[: max(error.start - held, 0)].count(b"\n")
                return f"{path}: not UTF-8 at byte {at} (line {lines}); save it as UTF-8 first"
            done += len(chunk)
            lines += chunk.count(b"\n")
    return f"{path}: not UTF-8; save it as UTF-8 first"


def _text(path: Path) -> Iterator[Row]:
    with open(path, encoding="utf-8-sig") as file:
        first = file.readline()
        if first.startswith("-DOCSTART-"):
            yield from conll(path)
            return
        if first:
            yield {"text": first.rstrip("\n")}
        for line in file:
            yield {"text": line.rstrip("\n")}


def conll(path: Path) -> Iterator[Row]:
    """Sentences of a CoNLL file: a word a line, its tag last, a blank line between sentences."""
    tokens, tags = [], []
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            fields = line.split()
            if fields and fields[0] == "-DOCSTART-":
                continue
            if len(fields) == 1:
                raise UserError(f"{path}: line {number}: expected a word and its tag")
            if fields:
                tokens.append(fields[0])
                tags.append(fields[-1])
            elif tokens:
                yield {"tokens": tokens, "tags": tags}
                tokens, tags = [], []
    if tokens:
        yield {"tokens": tokens, "tags": tags}


def _csv(path: Path, delimiter: str = ",") -> Iterator[Row]:
    import pyarrow
    from pyarrow import csv

    with open(path, "rb") as file:
        # Arrow would take UTF-16 for lines of one odd column.
        if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise UserError(_not_utf8(path))
    reading = csv.ReadOptions(block_size=16 << 20)
    parsing = csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    with csv.open_csv(path, reading, parsing) as reader:
        names = reader.schema.names
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{path}: two columns are called {name!r}")
    texts = csv.ConvertOptions(column_types={name: pyarrow.string() for name in names})
    with csv.open_csv(path, reading, parsing, texts) as reader:
        for batch in reader:
            yield from batch.to_pylist()


def _tsv(path: Path) -> Iterator[Row]:
    return _csv(path, "\t")


def _jsonl(path: Path) -> Iterator[Row]:
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                why = getattr(error, "msg", error)
                raise UserError(f"{path}: line {number}: not JSON: {why}") from None
            yield _object(record, f"{path}: line {number}")


def _json(path: Path) -> Iterator[Row]:
    """An array of objects, or one object a line; an array is never held whole."""
    with open(path, encoding="utf-8-sig") as file:
        text = file.read(CHUNK).lstrip()
        if not text.startswith("["):
            yield from _jsonl(path)
            return
        decode, number, at = json.JSONDecoder().raw_decode, 0, 1
        while True:
            while at < len(text) and text[at] in ", \t\r\n":
                at += 1
            if text[at : at + 1] == "]":
                return
            try:
                record, at = decode(text, at)
            except ValueError as error:
                more = file.read(max(CHUNK, len(text)))
                if not more or len(text) - at > LARGEST_RECORD:
                    why = getattr(error, "msg", error)
                    raise UserError(f"{path}: record {number}: not JSON: {why}") from None
                text, at = text[at:] + more, 0
                continue
            yield _object(record, f"{path}: record {number}")
            number += 1


def _object(record: Any, where: str) -> Row:
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected an object, {{...}}, got {str(record)[:40]!r}")
    return record


def _parquet(path: Path) -> Iterator[Row]:
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(BATCH):
            yield from batch.to_pylist()


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".txt": _text,
    ".csv": _csv,
    ".tsv": _tsv,
    ".json": _json,
    ".jsonl": _jsonl,
    ".parquet": _parquet,
    ".conll": conll,
}
