"""Tables from files: a file's rows as a Dataset, a folder's splits, and columns by their names."""

import difflib
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from fastft.finetune import UserError, assets, need
from fastft.finetune.readers import READERS, records
from fastft.finetune.run_folder import readable

if TYPE_CHECKING:
    from datasets import Dataset, Features, IterableDataset

# A larger file becomes an Arrow file in datasets' cache, which is mapped into memory.
IN_MEMORY = 64 << 20  # bytes
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


def listed(names: Iterable[str], most: int = 12) -> str:
    """names for a sentence, which hundreds of them would hide."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def located(path: str | Path) -> Path:
    """path as it is on this machine; a name of assets.DATASETS is fetched."""
    here = Path(path).expanduser()
    with readable(str(path)):
        found = here.exists()
    if str(path) in assets.DATASETS and not found:
        return assets.dataset(str(path))
    if not found:
        raise UserError(f"{path}: no such file or folder")
    return here


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
