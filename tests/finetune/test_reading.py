"""Files as tables: every kind gives the same rows, and what is wrong with one is a sentence."""

import json

import pytest
from finetune import tiny

from fastft.finetune import UserError, readers, reading

ROWS = [{"text": "NA", "label": "0"}, {"text": 'says "ä",\nthen', "label": "1"}]


def save(path, rows=ROWS):
    """rows as a file of the kind that path's name says."""
    import pyarrow
    from pyarrow import csv, parquet

    table, kind = pyarrow.Table.from_pylist(rows), path.suffix
    if kind == ".json":
        path.write_text(json.dumps(rows, indent=1))
    elif kind == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == ".parquet":
        parquet.write_table(table, path)
    else:
        csv.write_csv(table, path, csv.WriteOptions(delimiter="\t" if kind == ".tsv" else ","))
    return path


@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "jsonl", "parquet"])
@pytest.mark.parametrize("streaming", [False, True])
def test_every_kind_gives_the_same_rows(tmp_path, kind, streaming):
    read = reading.rows(save(tmp_path / f"data.{kind}"), streaming=streaming)
    assert list(read) == ROWS and read.column_names == ["text", "label"]


def test_lines_of_text(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\n\r\n tw\x85o \n".encode())
    assert reading.rows(tmp_path / "a.txt")["text"][:] == ["one", "", " tw\x85o "]


@pytest.mark.parametrize("name", ["a.conll", "a.txt"])
def test_conll(tmp_path, name):
    text = "-DOCSTART- -X- O O\n\nEU NNP I-NP B-ORG\nrejects VBZ I-VP O\n\n\nPeter NNP I-NP B-PER"
    (tmp_path / name).write_text(text)
    assert list(reading.rows(tmp_path / name)) == [
        {"tokens": ["EU", "rejects"], "tags": ["B-ORG", "O"]},
        {"tokens": ["Peter"], "tags": ["B-PER"]},
    ]


def test_types_are_those_of_all_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "BATCH", 2)
    held = [{"a": None, "b": 1}] * 3 + [{"a": "x", "b": 0.5, "c": [{"k": 1}]}] * 3
    read = reading.rows(tiny.save_rows(tmp_path / "a.jsonl", held))
    assert read[0] == {"a": None, "b": 1.0, "c": None}
    assert read[5] == {"a": "x", "b": 0.5, "c": [{"k": 1}]}


def test_a_large_file_is_mapped_and_read_anew_when_it_changes(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(reading, "IN_MEMORY", 0)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = save(tmp_path / "a.csv")
    read = reading.rows(path)
    assert list(read) == ROWS and read.cache_files
    save(path, ROWS[:1])
    assert list(reading.rows(path)) == ROWS[:1]


@pytest.mark.parametrize("chunk", [1, 2, 7, 50])
def test_an_array_in_pieces(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(readers, "CHUNK", chunk)
    held = [{"text": "]},{ \\", "n": [1, {"x": 23.5}]}, {"text": "ä" * 90, "n": []}]
    path = tmp_path / "a.json"
    path.write_text("\ufeff" + json.dumps(held, ensure_ascii=False))
    assert list(readers.records(path)) == held


def test_splits(tmp_path):
    single = save(tmp_path / "a.csv")
    assert list(reading.splits(single)) == ["train"]
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(UserError, match="no train file"):
        reading.splits(folder)
    save(folder / "train.jsonl")
    save(folder / "dev.csv", ROWS[:1])
    read = reading.splits(folder)
    assert {name: len(d) for name, d in read.items()} == {"train": 2, "validation": 1}
    save(folder / "valid.csv")
    with pytest.raises(UserError, match="valid.csv and dev.csv are both its validation"):
        reading.splits(folder)


def test_column_names_the_nearest(tmp_path):
    read = reading.rows(save(tmp_path / "a.csv"))
    assert reading.column(read, "text") == "text"
    with pytest.raises(UserError, match="no column 'texts'; did you mean 'text'"):
        reading.column(read, "texts")
    with pytest.raises(UserError, match="no column 'zzz'; it has 'text', 'label'"):
        reading.column(read, "zzz")


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", b"", "empty"),
        ("a.csv", b"", "empty"),
        ("a.csv", b"text,label\n", "empty"),
        ("a.json", b"[]", "empty"),
        ("a.jsonl", b"\n\n", "empty"),
        ("a.txt", b"one\ncaf\xe9 two\n", r"not UTF-8 at byte 7 \(line 2\)"),
        ("a.csv", b"text\none\ncaf\xe9 two\n", r"not UTF-8 at byte 12 \(line 3\)"),
        ("a.csv", b"text,caf\xe9\n1,2\n", "not UTF-8 at byte 8"),
        ("a.jsonl", b'{"a": "\xff"}', "not UTF-8 at byte 7"),
        ("a.json", b'[{"a": "\xff"}]', "not UTF-8 at byte 8"),
        ("a.txt", "text".encode("utf-16"), "not UTF-8 at byte 0"),
        ("a.csv", "text\n\u00e4\n".encode("utf-16"), "not UTF-8 at byte 0"),
        ("a.csv", b"a,b\n1,2,3\n", "Expected 2 columns, got 3"),
        ("a.csv", b"a,a\n1,2\n", "two columns are called 'a'"),
        ("a.jsonl", b'{"a": 1}\n{"a": \n', "line 2: not JSON"),
        ("a.jsonl", b"[1, 2]\n", "line 1: expected an object"),
        ("a.json", b'[{"a": 1}, 5]', "record 1: expected an object"),
        ("a.json", b'[{"a": 1}, {"a": 2', "record 1: not JSON"),
        ("a.json", b'[{"a": 1}', "record 1: not JSON"),
        ("a.json", b'{\n"a": 1}', "line 1: not JSON"),
        ("a.jsonl", b'{"a": 1}\n{"a": "x"}\n', "'a' holds values of different types"),
        ("a.jsonl", b'{"a": %d}\n' % 2**70, "'a' holds values of different types"),
        ("a.jsonl", b'{"a": "\\ud83d"}', "'a' holds half a character"),
        ("a.parquet", b"PAR1 no, it is not", "a.parquet: "),
        ("a.conll", b"word\n", "line 1: expected a word and its tag"),
        ("a.xlsx", b"PK", "expected a file that ends in .txt, .csv"),
    ],
)
def test_bad_files_are_a_sentence(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        reading.rows(tmp_path / name)
    assert "\n" not in str(error.value) and name in str(error.value)


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 100])
def test_a_bad_byte_after_characters_in_pieces(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(readers, "CHUNK", chunk)
    (tmp_path / "a.txt").write_bytes("é€\n😀".encode() + b"\xe9 x")
    with pytest.raises(UserError, match=r"not UTF-8 at byte 10 \(line 2\)"):
        reading.rows(tmp_path / "a.txt")


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        reading.rows(tmp_path / "none.csv")
    with pytest.raises(UserError, match="a folder"):
        reading.rows(tmp_path)


def test_a_bad_row_far_into_a_large_file(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(reading, "IN_MEMORY", 0)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "a.csv").write_bytes(b"text\n" + b"fine\n" * 5000 + b"caf\xe9\n")
    with pytest.raises(UserError, match=r"not UTF-8 at byte 25008 \(line 5002\)"):
        reading.rows(tmp_path / "a.csv")
