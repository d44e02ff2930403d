"""Tables from files: text, csv, tsv, json, jsonl, parquet and CoNLL, read a row at a time.

Not `datasets.load_dataset`: it counts its calls over the network, takes the text "NA" of a csv for
a missing value, and types a column by the first rows alone.
"""

import codecs
import difflib
import json
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastft.finetune import UserError, assets, need

if TYPE_CHECKING:
    from datasets import Dataset, Features, IterableDataset

Row = dict[str, Any]

# A larger file becomes an Arrow file in datasets' cache, which is mapped into memory.
IN_MEMORY = 64 << 20  # bytes
CHUNK = 1 << 16  # characters or bytes read at a time
LARGEST_RECORD = 1 << 28  # characters; what is longer is a bracket left open
BATCH = 1000  # rows whose types are looked at together
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}


def rows(path: str | Path, *, streaming: bool = False) -> "Dataset | IterableDataset":
    """The rows of one file: .txt .csv .tsv .json .jsonl .parquet or .conll.

    A line of a .txt is a row {"text": line}, unless the file starts with -DOCSTART-: that is
    CoNLL, {"tokens": [...], "tags": [...]} per sentence. Every value of a csv or tsv is a text.
    A column that a row lacks is None there. streaming: an IterableDataset that reads as it goes.

    Raises: UserError for a file that is missing, empty, not UTF-8, malformed, or of columns whose
    values are of different types.
    """
    datasets = need("datasets", "reading data")
    path = located(path)
    if next(records(path), None) is None:
        raise UserError(f"{path}: empty, no rows in it")
    features = _features(path)
    if streaming:
        return datasets.IterableDataset.from_generator(
            records, features=features, gen_kwargs={"path": path}
        )
    if path.stat().st_size <= IN_MEMORY:
        held = list(records(path))
        columns = {name: [row.get(name) for row in held] for name in features}
        return datasets.Dataset.from_dict(columns, features=features)
    return _on_disk(path, features)


def splits(path: str | Path) -> "dict[str, Dataset]":
    """A folder's train, validation and test files, or one file as {"train": rows}.

    Raises: as rows; UserError for a folder without train file, or with two files for one split.
    """
    path = located(path)
    if not path.is_dir():
        return {"train": rows(path)}
    return {split: rows(file) for split, file in split_files(path).items()}


def split_files(folder: Path) -> dict[str, Path]:
    """The file of every split that a folder has, named train, validation (valid, dev) and test."""
    found: dict[str, Path] = {}
    for split, names in SPLITS.items():
        files = [
            file for name in names for s in READERS if (file := folder / f"{name}{s}").is_file()
        ]
        if len(files) > 1:
            raise UserError(f"{folder}: {files[0].name} and {files[1].name} are both its {split}")
        if files:
            found[split] = files[0]
    if "train" not in found:
        raise UserError(f"{folder}: no train file in it (train.jsonl, train.csv, …)")
    return found


def column(dataset: "Dataset | IterableDataset", name: str) -> str:
    """name, where dataset has such a column; UserError with the nearest name where not."""
    return among(dataset.column_names or [], name)


def among(names: Iterable[str], name: str, where: str = "data") -> str:
    """name, where it is one of the names of columns; UserError with the nearest where not."""
    names = list(names)
    if name in names:
        return name
    near = difflib.get_close_matches(name, names, 1, cutoff=0.65)
    hint = f"did you mean {near[0]!r}" if near else f"it has {', '.join(map(repr, names))}"
    raise UserError(f"{where}: no column {name!r}; {hint}")


def located(path: str | Path) -> Path:
    """path as it is on this machine; a name of assets.DATASETS is fetched."""
    here = Path(path).expanduser()
    if str(path) in assets.DATASETS and not here.exists():
        return assets.dataset(str(path))
    if not here.exists():
        raise UserError(f"{path}: no such file or folder")
    return here


def records(path: Path) -> Iterator[Row]:
    """The rows of one file in its order, one in memory at a time; raises as `rows` does."""
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
        raise UserError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise UserError(_not_utf8(path)) from None
    except pyarrow.ArrowInvalid as error:
        if "invalid UTF8" in str(error):
            raise UserError(_not_utf8(path)) from None
        if "Empty CSV" in str(error):
            return
        raise UserError(f"{path}: {str(error).splitlines()[0][:200]}") from None


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


def _features(path: Path) -> "Features":
    """The columns and their types, of all rows: a column may be None in the first thousands."""
    import pyarrow
    from datasets import Features
    from pyarrow import parquet

    if path.suffix.lower() == ".parquet":
        return Features.from_arrow_schema(parquet.read_schema(path))
    types: dict[str, pyarrow.DataType] = {}
    held = records(path)
    while batch := list(islice(held, BATCH)):
        for name in {name: None for row in batch for name in row}:
            try:
                seen = pyarrow.array([row.get(name) for row in batch]).type
                schemas = [pyarrow.schema({name: t}) for t in (types.get(name, seen), seen)]
                both = pyarrow.unify_schemas(schemas, promote_options="permissive")
            except UnicodeEncodeError:
                raise UserError(
                    f"{path}: column {name!r} holds half a character (a lone surrogate); "
                    "`fastft prepare` repairs it"
                ) from None
            except (pyarrow.ArrowException, OverflowError) as error:
                why = str(error).splitlines()[0]
                raise UserError(
                    f"{path}: column {name!r} holds values of different types: {why}"
                ) from None
            types[name] = both.field(name).type
        if path.suffix.lower() in (".csv", ".tsv"):
            break  # all texts
    return Features.from_arrow_schema(pyarrow.schema(types))


def _on_disk(path: Path, features: "Features") -> "Dataset":
    """path as an Arrow file in datasets' cache, made anew when the file changes."""
    from datasets import Dataset
    from datasets.exceptions import DatasetGenerationError
    from datasets.fingerprint import Hasher

    stat = path.stat()
    held = (str(path.resolve()), stat.st_size, stat.st_mtime_ns, repr(features))
    try:
        return Dataset.from_generator(
            records,
            features=features,
            gen_kwargs={"path": path},
            fingerprint=Hasher.hash(held),
        )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        if isinstance(error.__cause__, OSError):  # a full disk
            raise UserError(f"{path}: its cache: {error.__cause__}") from None
        raise
