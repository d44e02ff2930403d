"""Settings: read from YAML and flags with one set of types, and every mistake named."""

from dataclasses import dataclass
from typing import Literal

import pytest

from fastft.finetune import UserError
from fastft.finetune.config import Config, option, read


@dataclass(kw_only=True)
class Settings(Config):
    """What the tests read: 100% made up.

    A second paragraph.
    """

    model: str = option(help="a model, 100% local")
    rate: float = option(1e-3, "learning rate", above=0)
    steps: int = option(10, "optimizer steps", least=1, most=1000)
    patch: bool = option(True, "patch it")
    dry_run: bool = option(False, "only show")
    task: Literal["classify", "lm"] = option("lm", "what to learn")
    bits: Literal[4, 8] = option(8, "of a weight")
    limit: int | None = option(None, "rows", least=1)
    offset: float = option(0.0, "any number")
    stop: list[str] = option(["."], "texts that end it")
    weights: list[float] | None = option(None, "of the labels", least=-5)
    no_repeat: int = option(0, "n-grams")
    between: str = option("\n", "what parts them")

    def check(self):
        if self.task == "classify" and self.stop != ["."]:
            raise UserError("stop: classify generates nothing")


def settings(*arguments):
    return read(Settings, "train", ["--model", "m", *arguments])


@pytest.fixture
def file(tmp_path):
    def written(text):
        path = tmp_path / "settings.yaml"
        path.write_text(text)
        return str(path)

    return written


def test_defaults():
    made = settings()
    assert made == Settings(model="m")
    assert made.stop == ["."] and made.stop is not settings().stop


FLAGS = [
    (["--rate", "3e-4"], "rate", 3e-4),
    (["--rate=1"], "rate", 1.0),
    (["--steps", "7"], "steps", 7),
    (["--no-patch"], "patch", False),
    (["--no-patch", "--patch"], "patch", True),
    (["--dry-run"], "dry_run", True),
    (["--dry_run"], "dry_run", True),
    (["--no_repeat=3"], "no_repeat", 3),
    (["--model=a_b"], "model", "a_b"),
    (["--task", "classify"], "task", "classify"),
    (["--bits", "4"], "bits", 4),
    (["--limit", "5"], "limit", 5),
    (["--model", "none"], "model", "none"),
    (["--no-repeat", "3"], "no_repeat", 3),
    (["--stop", "a b", "c", "--steps", "3"], "stop", ["a b", "c"]),
    (["--offset", "-2"], "offset", -2.0),
    (["--offset", "-1e-3"], "offset", -1e-3),
    (["--offset=-1e-3"], "offset", -1e-3),
    (["--offset", "-inf"], "offset", float("-inf")),
    (["--weights", "-1", "2", "-1e-3"], "weights", [-1.0, 2.0, -1e-3]),
    (["--model", "-m"], "model", "-m"),
    (["--model=--m"], "model", "--m"),
    (["--stop", "-", "- item", "-x", "end"], "stop", ["-", "- item", "-x", "end"]),
]


@pytest.mark.parametrize("arguments, name, value", FLAGS)
def test_flags(arguments, name, value):
    held = getattr(settings(*arguments), name)
    assert held == value and type(held) is type(value)


@pytest.mark.parametrize(
    "text, name, value",
    [
        ("rate: 3e-4", "rate", 3e-4),
        ("rate: 1", "rate", 1.0),
        ("steps: 7", "steps", 7),
        ("patch: false", "patch", False),
        ("dry-run: true", "dry_run", True),
        ("dry_run: yes", "dry_run", True),
        ("task: classify", "task", "classify"),
        ("bits: 4", "bits", 4),
        ("limit: null", "limit", None),
        ("rate: null", "rate", 1e-3),
        ("model: 5", "model", "5"),
        ("model: --m", "model", "--m"),
        ("model: 'a b=c'", "model", "a b=c"),
        ("model: ''", "model", ""),
        ("offset: -1e-3", "offset", -1e-3),
        ("stop: x", "stop", ["x"]),
        ("stop: [a b, -x, --steps, '-', '']", "stop", ["a b", "-x", "--steps", "-", ""]),
        ("weights: [-1, 2, -1e-3]", "weights", [-1.0, 2.0, -1e-3]),
        ("weights:\n  - 1\n  - .5", "weights", [1.0, 0.5]),
    ],
)
def test_yaml(file, text, name, value):
    model = "" if text.startswith("model") else "model: m\n"
    held = getattr(read(Settings, "train", [file(model + text)]), name)
    assert held == value and type(held) is type(value)


@pytest.mark.parametrize("how", ["{}", "--config {}", "--config={}"])
def test_a_flag_wins_over_the_file(file, how):
    path = file("model: m\nsteps: 5\nstop: [a, b]\npatch: false\nrate: 1e-2")
    flags = ["--steps", "6", "--stop", "c", "--patch"]
    made = read(Settings, "train", [*how.format(path).split(), *flags])
    assert made == Settings(model="m", steps=6, stop=["c"], rate=1e-2)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--step", "3"], "--step: no such setting; did you mean --steps?"),
        (["--dry_runn"], "--dry-runn: no such setting; did you mean --dry-run?"),
        (["--learning=3"], "--learning: no such setting"),
        (["--zzz"], "--zzz: no such setting"),
        (["--no-zzz"], "--no-zzz: no such setting"),
        (["--no-steps"], "unexpected argument '--no-steps'; `fastft train --help` lists them"),
        (["extra"], "unexpected argument 'extra'"),
        (["--steps", "3", "-x"], "unexpected argument '-x'"),
        (["--steps", "many"], "--steps: invalid int value: 'many'"),
        (["--steps", "1.5"], "--steps: invalid int value: '1.5'"),
        (["--steps", "-x"], "--steps: invalid int value: '-x'"),
        (["--rate", "fast"], "--rate: invalid float value: 'fast'"),
        (["--weights", "1", "x"], "--weights: invalid float value: 'x'"),
        (["--steps"], "--steps: expected one argument"),
        (["--stop"], "--stop: expected at least one argument"),
        (["--stop", "a", "--steps", "3", "--stop", "b"], "--stop: given twice"),
        (["--task", "ner"], "--task: invalid choice: 'ner'"),
        (["--bits", "3"], "--bits: invalid choice: 3"),
        (["--steps", "0"], "steps: expected at least 1, got 0"),
        (["--steps", "1001"], "steps: expected at most 1000, got 1001"),
        (["--limit", "0"], "limit: expected at least 1, got 0"),
        (["--rate", "0"], "rate: expected more than 0, got 0.0"),
        (["--rate", "nan"], "rate: expected more than 0, got nan"),
        (["--rate", "inf"], "rate: expected a finite number, got inf"),
        (["--weights", "1", "-6"], "weights: expected at least -5, got -6.0"),
        (["--task", "classify", "--stop", "a"], "stop: classify generates nothing"),
        (["--config"], "--config: expected a file"),
        (["--config="], "--config: expected a file"),
        (["--config", "a.yaml", "--config=b.yaml"], "one settings file at a time"),
    ],
)
def test_mistakes_in_flags(arguments, message):
    with pytest.raises(UserError) as error:
        settings(*arguments)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text, message",
    [
        ("stpes: 3", "settings.yaml: stpes: no such setting; did you mean steps?"),
        ("steps: many", "--steps: invalid int value: 'many'"),
        ("steps: 0", "steps: expected at least 1, got 0"),
        ("steps: 2.5", "--steps: invalid int value: '2.5'"),
        ("steps: [1, 2]", "steps: expected int, got [1, 2]"),
        ("stop: []", "stop: expected a value or a list of values, got []"),
        ("stop: [[a]]", "stop: expected a value or a list of values, got [['a']]"),
        ("rate: {a: 1}", "rate: expected a value or a list of values"),
        ("steps: true", "settings.yaml: steps: expected int, got True"),
        ("patch: 5", "patch: expected bool, got 5"),
        ("patch: 'false'", "patch: expected bool, got 'false'"),
        ("task: no", "settings.yaml: task: expected 'classify' or 'lm', got False"),
        ("stop: [a, {b: 1}]", "stop: expected a value or a list of values"),
        ("- a\n- b", "settings.yaml: expected lines of `key: value`"),
        ("", "settings.yaml: expected lines of `key: value`"),
        ("a: [1", "settings.yaml: not YAML in line "),
        ("a: !!python/object/apply:os.getcwd []", "settings.yaml: not YAML in line 1"),
    ],
)
def test_mistakes_in_a_file(file, text, message):
    with pytest.raises(UserError) as error:
        read(Settings, "train", [file(text), "--model", "m"])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="none.yaml: No such file"):
        read(Settings, "train", [str(tmp_path / "none.yaml")])
    (tmp_path / "a.yaml").write_bytes(b"model: caf\xe9")
    with pytest.raises(UserError, match=r"a.yaml: not UTF-8 \(byte 10\)"):
        read(Settings, "train", [str(tmp_path / "a.yaml")])


def test_what_is_required():
    with pytest.raises(UserError, match="required: --model"):
        read(Settings, "train", [])


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_lists_every_setting(flag, capsys):
    with pytest.raises(SystemExit) as stop:
        settings(flag)
    assert stop.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for expected in (
        "usage: fastft train [settings.yaml] [--key value ...]",
        "What the tests read: 100% made up. A second paragraph.",
        "--model STR a model, 100% local (required)",
        "--rate FLOAT learning rate (default: 0.001)",
        "--patch, --no-patch patch it (default: True)",
        "--task {classify,lm} what to learn (default: lm)",
        "--stop STR [STR ...] texts that end it (default: .)",
        "--limit INT rows --offset FLOAT",
        r"--between STR what parts them (default: '\n')",
    ):
        assert expected in shown


@pytest.mark.parametrize(
    "values, message",
    [
        ({"steps": "3"}, "steps: expected int, got '3'"),
        ({"steps": 3.0}, "steps: expected int, got 3.0"),
        ({"steps": True}, "steps: expected int, got True"),
        ({"rate": "1e-3"}, "rate: expected float, got '1e-3'"),
        ({"patch": 1}, "patch: expected bool, got 1"),
        ({"task": "ner"}, "task: expected 'classify' or 'lm', got 'ner'"),
        ({"limit": "x"}, "limit: expected int or None, got 'x'"),
        ({"stop": "x"}, "stop: expected a list of str, got 'x'"),
        ({"stop": [1]}, "stop: expected a list of str, got [1]"),
        ({"weights": [1, -6]}, "weights: expected at least -5, got -6"),
        ({"model": None}, "model: expected str, got None"),
    ],
)
def test_values_given_in_python_are_checked(values, message):
    with pytest.raises(UserError) as error:
        Settings(**{"model": "m"} | values)
    assert str(error.value) == message


def test_whole_numbers_are_floats_where_floats_are_expected():
    made = Settings(model="m", rate=1)
    assert made.rate == 1.0 and isinstance(made.rate, float)
