"""Any bytes as data or as settings: rows, or one readable sentence, and never another exception."""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastft import cli
from fastft.finetune import TrainConfig, UserError, config
from fastft.finetune.prepare import PrepareConfig, prepare
from fastft.finetune.readers import READERS, records

LONGEST = 400
# Pieces of the formats, so that some of what is made gets deep into a reader.
PIECES = st.sampled_from(
    [b'{"text": "a", "label": "b"}', b"[", b"]", b"{", b"}", b'"', b",", b"\n", b"\t", b":", b"\0",
     b"text,label\n", b"a,b\n", b"\r", b"\\", b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"NaN",
     b"1e999", b"-DOCSTART-", b"word O\n", b"\\ud800", b"null", b"task: lm\n", b"- ", b"&a ", b"*a",
     b"!!python/object:os.system ", b"steps: 1_0\n", b"2020-99-99", b"? ", b"<<: ", b"%YAML 9\n"]
)  # fmt: skip
ANY = st.binary(max_size=LONGEST) | st.lists(PIECES, max_size=30).map(b"".join)


def parquet(folder: Path) -> bytes:
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.table({"text": ["a", "b", None], "label": ["x", "y", "x"], "n": [[1], [], [2]]})
    parquet.write_table(table, folder / "whole.parquet")
    return (folder / "whole.parquet").read_bytes()


@dataclass
class Damage:
    """A valid file of which some bytes are others, are missing, or are there twice."""

    places: list[tuple[float, int]]
    cut: float

    def of(self, whole: bytes) -> bytes:
        held = bytearray(whole)
        for place, byte in self.places:
            held[int(place * (len(held) - 1))] = byte
        return bytes(held[: int(self.cut * len(held))])


damages = st.builds(
    Damage,
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=6),
    st.just(1.0) | st.floats(0, 1),
)


def assert_a_sentence(read) -> None:
    try:
        read()
    except UserError as error:
        assert str(error).strip() and "\n" not in str(error).strip(), error
        assert len(str(error)) < 2000


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.mark.parametrize("suffix", [s for s in READERS if s != ".parquet"])
def test_any_bytes_are_rows_or_a_sentence(folder, suffix):
    path = folder / f"data{suffix}"

    @settings(max_examples=150)
    @given(ANY)
    @example(b"[" * 100_000)
    @example(b'{"a":' * 100_000)
    @example(b"[" + b"9" * 6000 + b"]")
    def check(data):
        path.write_bytes(data)
        assert_a_sentence(lambda: list(records(path)))

    check()


def test_a_damaged_parquet_is_rows_or_a_sentence(folder):
    whole, path = parquet(folder), folder / "damaged.parquet"

    @settings(max_examples=150)
    @given(damages)
    def check(damage):
        path.write_bytes(damage.of(whole))
        assert_a_sentence(lambda: list(records(path)))

    check()


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_prepare_takes_any_values(suffix):
    """Whatever a row holds, prepare ends with a folder or with a sentence."""
    values = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
        lambda held: st.lists(held, max_size=3) | st.dictionaries(st.text(max_size=3), held),
        max_leaves=6,
    )
    names = st.sampled_from(["text", "label", "tokens", "tags", "messages", "prompt", "completion"])
    rows = st.lists(st.dictionaries(names | st.text(max_size=4), values, max_size=4), max_size=6)

    @settings(max_examples=30)
    @given(rows)
    def check(held):
        with tempfile.TemporaryDirectory() as made:
            path = Path(made) / f"raw{suffix}"
            path.write_text("".join(json.dumps(row) + "\n" for row in held), encoding="utf-8")
            output = Path(made) / "made"
            asked = PrepareConfig(data=str(path), output=str(output), near_duplicates=False)
            assert_a_sentence(lambda: prepare(asked))

    check()


def test_any_bytes_are_settings_or_a_sentence(folder):
    path = folder / "settings.yaml"

    @settings(max_examples=300)
    @given(ANY | st.lists(PIECES, max_size=9).map(lambda p: b"steps: " + b"".join(p)))
    @example(b"[" * 100_000)
    @example(b"steps: 2020-99-99")
    @example(b"steps: 0b12")
    @example(b"a: &a [*a, *a]")
    @example(b"task: \x00")
    @example(b"steps: " + b"9" * 6000)
    def check(data):
        path.write_bytes(data)
        assert_a_sentence(lambda: config.read(TrainConfig, "train", [str(path)]))

    check()


def test_the_command_says_it(folder, capsys):
    path = folder / "deep.json"
    path.write_bytes(b"[" * 100_000)
    assert cli.main(["prepare", "--data", str(path), "--output", str(folder / "made")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
