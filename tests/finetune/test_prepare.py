"""`fastft prepare`: what is written, what is dropped and why, and nothing where something fails."""

import errno
import hashlib
import importlib
import json
import re
import shutil

import pytest
from finetune import tiny

from fastft import cli
from fastft.finetune import UserError, prepare_report, readers, reading
from fastft.finetune.prepare import PrepareConfig, prepare
from fastft.finetune.run_folder import new_folder

# The package's own name for it is the function's.
module = importlib.import_module("fastft.finetune.prepare")
WORDS = "red green blue black white brown pink gray gold tan".split()
NUMBERS = "one two three four five six seven eight nine ten".split()
# 100 texts of which none is near another: each pair of words, each said another way.
TEXTS = [
    f"{w} {n} " + hashlib.sha256(f"{w}{n}".encode()).hexdigest() for w in WORDS for n in NUMBERS
]


def save(path, rows):
    return str(tiny.save_rows(path, rows))


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def labelled(tmp_path):
    """70 rows of one label and 30 of another, and of rows that do not stay one of each kind."""
    rows = [{"text": t, "label": ["good", "bad"][i >= 70], "id": i} for i, t in enumerate(TEXTS)]
    rows += [
        {"text": TEXTS[3], "label": "good"},
        {"text": f" {TEXTS[4].upper()}", "label": "bad"},
        {"text": " ", "label": "bad"},
        {"text": "spam " * 100, "label": "bad"},
        {"text": "nothing said", "label": None},
        {"text": "half \ud83d", "label": "good"},
    ]
    return save(tmp_path / "raw.jsonl", rows)


def test_labelled_rows_are_cleaned_and_split(labelled, tmp_path, capsys):
    made = prepare(PrepareConfig(data=labelled, output=str(tmp_path / "made"), validation=0.2))
    assert made.splits == {"train": 71, "validation": 20, "test": 10}
    assert made.dropped == {
        "duplicate": 1,
        "near duplicate with another label": 1,
        "empty": 1,
        "repeats itself": 1,
        "no label": 1,
    }
    read = reading.splits(made.folder)
    assert list(read) == ["train", "validation", "test"]
    texts = [text for split in read.values() for text in split["text"]]
    assert sorted(texts) == sorted([*TEXTS, "half �"])
    assert read["train"].column_names == ["text", "label"]
    assert [list(split["label"]).count("bad") for split in read.values()] == [21, 6, 3]

    files = {path.name for path in made.folder.iterdir()}
    assert files == {
        *("train.jsonl", "validation.jsonl", "test.jsonl", "dropped.jsonl"),
        *("metrics.json", "overview.png"),
    }
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".partial")]
    shown = capsys.readouterr().out
    assert "106 rows of text-label read, 101 kept" in shown and "6 (30.0%)" in shown


def test_every_dropped_row_is_told(labelled, tmp_path):
    made = prepare(PrepareConfig(data=labelled, output=str(tmp_path / "made")))
    told = {row["row"]: row for row in lines(made.folder / "dropped.jsonl")}
    assert {row: held["reason"] for row, held in told.items()} == {
        100: "duplicate",
        101: "near duplicate with another label",
        102: "empty",
        103: "repeats itself",
        104: "no label",
    }
    assert told[101]["of_row"] == 4 and told[101]["of_file"] == "raw.jsonl"
    assert TEXTS[4].upper() in told[101]["text"]
    metrics = json.loads((made.folder / "metrics.json").read_text())
    assert metrics == made.metrics
    assert metrics["settings"]["output"] == str(tmp_path / "made")
    (sha256,) = metrics["files"].values()
    assert sha256 == hashlib.sha256((tmp_path / "raw.jsonl").read_bytes()).hexdigest()


def test_same_settings_same_files(labelled, tmp_path):
    def written(name, **settings):
        made = prepare(PrepareConfig(data=labelled, output=str(tmp_path / name), **settings))
        return [(made.folder / f"{split}.jsonl").read_bytes() for split in made.splits]

    first = written("a")
    assert first == written("b") != written("c", seed=1)


def test_duplicates_that_are_kept_share_a_split(tmp_path):
    rows = [{"text": text + end} for text in TEXTS for end in ("", "", "!")]
    data = save(tmp_path / "raw.jsonl", rows)
    config = PrepareConfig(data=data, output=str(tmp_path / "made"), duplicates=False, test=0.3)
    made = prepare(config)
    assert made.splits == {"train": 180, "validation": 30, "test": 90} and not made.dropped
    files = [lines(made.folder / f"{split}.jsonl") for split in made.splits]
    seen = [{row["text"].rstrip("!") for row in held} for held in files]
    assert sum(map(len, seen)) == 100 == len(set.union(*seen))


def test_given_splits_are_kept_and_train_loses_what_is_tested(tmp_path):
    folder = tmp_path / "raw"
    folder.mkdir()
    save(folder / "train.jsonl", [{"text": text} for text in TEXTS])
    save(folder / "test.jsonl", [{"text": text} for text in TEXTS[:5]])
    for name, duplicates in (("a", True), ("b", False)):
        settings = {"data": str(folder), "output": str(tmp_path / name)}
        made = prepare(PrepareConfig(duplicates=duplicates, **settings))
        assert made.splits == {"train": 95, "test": 5}
        told = lines(made.folder / "dropped.jsonl")
        assert {(r["file"], r["of_file"]) for r in told} == {("train.jsonl", "test.jsonl")}


def test_conversion_and_what_does_not_fit_it(tmp_path):
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    rows = [
        {"messages": [{"role": "user", "content": t}, {"role": "assistant", "content": " yes "}]}
        for t in TEXTS[:10]
    ]
    data = save(tmp_path / "raw.jsonl", [*rows, {"messages": turns * 2}])
    settings = {"data": data, "output": str(tmp_path / "made"), "validation": 0.0, "test": 0.0}
    made = prepare(PrepareConfig(target_format="alpaca", **settings))
    assert lines(made.folder / "train.jsonl") == [
        {"instruction": text, "input": "", "output": "yes", "system": ""} for text in TEXTS[:10]
    ]
    (reason,) = made.dropped
    assert reason.startswith("more than one question")


def test_the_space_before_a_completion_stays(tmp_path):
    rows = [{"prompt": f"{text} is", "completion": " so"} for text in TEXTS[:4]]
    data = save(tmp_path / "raw.jsonl", rows)
    made = prepare(PrepareConfig(data=data, output=str(tmp_path / "made")))
    assert lines(made.folder / "train.jsonl")[0]["completion"] == " so"


def test_tokens_are_stratified_by_entity(tmp_path):
    rows = []
    for i, text in enumerate(TEXTS):
        tag = "B-LOC" if i % 10 == 0 else "O"
        rows.append({"words": [*text.split(), "\u00a0"], "ner": [tag, "O", "I-PER", "O"], "id": i})
    data = save(tmp_path / "raw.jsonl", rows)
    config = PrepareConfig(
        data=data,
        output=str(tmp_path / "made"),
        text_column="words",
        label_column="ner",
        keep_columns=["id"],
    )
    made = prepare(config)
    held = {name: one["labels"] for name, one in made.metrics["splits"].items()}
    assert held["test"] == {"PER": 10, "LOC": 1} and held["train"] == {"PER": 80, "LOC": 8}
    row = lines(made.folder / "train.jsonl")[0]
    assert set(row) == {"tokens", "tags", "id"} and len(row["tokens"]) == len(row["tags"]) == 4
    assert row["tokens"][3]  # not stripped to nothing: tokenizers lose empty words


def test_labels_are_cleaned_and_shown_as_they_are(tmp_path, capsys):
    labels = [" $\\frac$", "$\\frac$\n", "half \ud83d"]
    rows = [{"text": text, "label": labels[i % 3]} for i, text in enumerate(TEXTS[:9])]
    data = save(tmp_path / "raw.jsonl", [*rows, {"text": "\ud83d", "label": ""}])
    made = prepare(PrepareConfig(data=data, output=str(tmp_path / "made")))
    assert made.metrics["splits"]["train"]["labels"] == {"$\\frac$": 4, "half �": 3}
    (dropped,) = lines(made.folder / "dropped.jsonl")
    assert dropped["reason"] == "no label" and '"text": "?"' in dropped["text"]
    assert "label $\\frac$" in capsys.readouterr().out


def test_paragraphs_of_a_text_file(tmp_path):
    (tmp_path / "raw.txt").write_text("\n\n".join(f"{t}\nand {t[::-1]}" for t in TEXTS) + "\n\n\n")
    settings = {"data": str(tmp_path / "raw.txt")}
    made = prepare(PrepareConfig(output=str(tmp_path / "a"), paragraphs=True, **settings))
    assert sum(made.splits.values()) == 100
    assert lines(made.folder / "train.jsonl")[0]["text"] == f"{TEXTS[0]}\nand {TEXTS[0][::-1]}"
    made = prepare(PrepareConfig(output=str(tmp_path / "b"), **settings))
    assert sum(made.splits.values()) == 200 and made.dropped == {"empty": 101}


def test_multi_label_and_measures_have_no_one_class(tmp_path):
    for name, label in (("a", ["x", "y"]), ("b", 0.5), ("c", ["x"])):
        data = save(tmp_path / f"{name}.jsonl", [{"text": t, "label": label} for t in TEXTS])
        made = prepare(PrepareConfig(data=data, output=str(tmp_path / name)))
        assert made.splits["train"] == 80


def test_a_row_at_a_time(tmp_path, monkeypatch):
    """No more than a row is asked for before the last is written: nothing is gathered."""
    waiting = []

    def records(path):
        for text in TEXTS:
            waiting.append(text)
            yield {"text": text}

    def write(file, row):
        assert waiting.pop() == row["text"] and not waiting
        original(file, row)

    original = module._write
    data = save(tmp_path / "raw.jsonl", [{"text": TEXTS[0]}])
    config = PrepareConfig(data=data, output=str(tmp_path / "made"))
    source = module._source(config)
    monkeypatch.setattr(readers, "records", records)
    monkeypatch.setattr(module, "_write", write)
    kept, _ = module._sift(config, source, tmp_path)
    assert len(kept) == 100


GOOD = [{"text": text, "label": i % 2} for i, text in enumerate(TEXTS[:10])]


@pytest.mark.parametrize(
    "rows, settings, message",
    [
        (GOOD, {"text_column": "texts"}, "no column 'texts'; did you mean 'text'"),
        (GOOD, {"label_column": "target"}, "no column 'target'; it has 'text', 'label'"),
        (GOOD, {"keep_columns": ["labels"]}, "no column 'labels'; did you mean 'label'"),
        (GOOD, {"target_format": "messages"}, "text-label cannot become messages"),
        (GOOD, {"source_format": "alpaca"}, "no row is left .10 no instruction."),
        (GOOD, {"min_characters": 999}, "no row is left .10 shorter than 999 characters."),
        ([r | {"label": "x"} for r in GOOD], {}, "every row has the label 'x'"),
        ([{"a": 1}], {}, "columns 'a' are of no known format"),
        ([], {}, "empty"),
        (GOOD, {"data": "none.csv"}, "none.csv: no such file"),
    ],
)
def test_what_a_user_can_put_right(tmp_path, rows, settings, message):
    data = save(tmp_path / "raw.jsonl", rows)
    with pytest.raises(UserError, match=message) as error:
        prepare(PrepareConfig(**{"data": data, "output": str(tmp_path / "made")} | settings))
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["raw.jsonl"]


@pytest.mark.parametrize(
    "first, other", [(0, "x"), ("x", ["x"]), ([1], 1), ("x", 0.5), (["x"], ["x", 1])]
)
def test_labels_of_two_kinds_are_no_column(tmp_path, first, other):
    rows = [{"text": text, "label": first} for text in TEXTS[:9]]
    data = save(tmp_path / "raw.jsonl", [*rows, {"text": TEXTS[9], "label": other}])
    told = f"the labels {first!r} (row 0 of raw.jsonl) and {other!r} (row 9 of raw.jsonl) cannot"
    with pytest.raises(UserError, match=re.escape(told)):
        prepare(PrepareConfig(data=data, output=str(tmp_path / "made")))
    assert [path.name for path in tmp_path.iterdir()] == ["raw.jsonl"]


def test_wrong_encoding_far_into_the_file(tmp_path):
    text = "\n".join(TEXTS).encode() + b"\ncaf\xe9\n"
    (tmp_path / "raw.txt").write_bytes(text)
    with pytest.raises(UserError, match=rf"not UTF-8 at byte {len(text) - 2} \(line 101\)"):
        prepare(PrepareConfig(data=str(tmp_path / "raw.txt"), output=str(tmp_path / "made")))
    assert [path.name for path in tmp_path.iterdir()] == ["raw.txt"]


@pytest.mark.parametrize("kind", ["folder", "file", "link to nowhere"])
def test_an_output_that_exists_is_left_alone(labelled, tmp_path, kind):
    output = tmp_path / "made"
    if kind == "folder":
        output.mkdir()
    elif kind == "file":
        output.write_text("mine")
    else:
        output.symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="exists already"):
        prepare(PrepareConfig(data=labelled, output=str(output)))
    assert kind != "file" or output.read_text() == "mine"
    assert kind != "folder" or not list(output.iterdir())


@pytest.mark.parametrize("where", ["_write", "_deal", "plot"])
def test_a_full_disk_leaves_nothing(labelled, tmp_path, monkeypatch, where):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(prepare_report if where == "plot" else module, where, full)
    with pytest.raises(UserError, match="made: No space left on device; nothing was written"):
        prepare(PrepareConfig(data=labelled, output=str(tmp_path / "made")))
    assert [path.name for path in tmp_path.iterdir()] == ["raw.jsonl"]


def test_interrupted_leaves_nothing(labelled, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_deal", stop)
    with pytest.raises(KeyboardInterrupt):
        prepare(PrepareConfig(data=labelled, output=str(tmp_path / "made")))
    assert [path.name for path in tmp_path.iterdir()] == ["raw.jsonl"]


def test_a_process_that_makes_the_same_is_not_disturbed(labelled, tmp_path):
    asked = PrepareConfig(data=labelled, output=str(tmp_path / "made"))
    with new_folder(asked.output) as part:
        with pytest.raises(UserError, match="made: another process is making it; nothing was"):
            prepare(asked)
        (part / "theirs").touch()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "raw.jsonl"]
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["theirs"]


def test_where_files_cannot_be_locked(labelled, tmp_path, monkeypatch):
    """What another process made, or makes, cannot be told apart then."""

    def no_locks(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", no_locks)
    asked = PrepareConfig(data=labelled, output=str(tmp_path / "made"))
    left = tmp_path / ".partial-made" / "made"
    left.mkdir(parents=True)
    with pytest.raises(UserError, match=r"\.partial-made is in use, or was left .*: remove it;"):
        prepare(asked)
    assert left.is_dir()
    shutil.rmtree(left.parent)
    prepare(asked)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "raw.jsonl"]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"validation": 0.5, "test": 0.5}, "at most 0.9 together"),
        ({"min_characters": 5, "max_characters": 4}, "max_characters"),
        ({"near_threshold": 1.5}, "near_threshold: expected at most 0.99"),
    ],
)
def test_settings_that_do_not_belong_together(settings, message):
    with pytest.raises(UserError, match=message):
        PrepareConfig(data="a", output="b", **settings)


def test_as_a_command(labelled, tmp_path, capsys):
    made = tmp_path / "made"
    arguments = ["prepare", "--data", labelled, "--output", str(made), "--no-near-duplicates"]
    assert cli.main(arguments) == 0
    assert "102 kept as text-label" in capsys.readouterr().out
    assert cli.main(arguments) == 2
    assert "made exists already" in capsys.readouterr().err.splitlines()[-1]
