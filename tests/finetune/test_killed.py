"""Commands that end at any moment: what they go on to is bit for bit what would have been."""

import json
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path

import pytest
from finetune.commands import Limits, run, start

from fastft.finetune.run_folder import RunFolder

SEARCH = ["--trials", 3, "--space", "learning_rate: [1e-3, 1e-1, log]", "rank: [2, 4]"]
# What runs differ in: the task, what is trained, when they end, and whether the best is kept.
RUNS = {
    "best": ["classify", "--steps", 7, "--dropout", 0.1, "--learning-rate", 1e-2],
    "last": ["classify", "--steps", 7, "--dropout", 0.1, "--no-best", "--logging-steps", 3],
    "stops early": ["classify", "--steps", 40, "--early-stopping", 2, "--learning-rate", 0.3],
    "adapter": ["sft", "--steps", 6, "--method", "lora", "--lora-dropout", 0.1, "--no-packing"],
}


@pytest.fixture(scope="module")
def home(shared, tmp_path_factory):
    """Folder for runs that are compared with, each made once."""
    return tmp_path_factory.mktemp("whole")


def arguments(shared, settings: list, output: Path, command="train") -> list:
    task, *more = settings
    data = next(shared.glob(f"{task}.json*"))
    model = shared / ("decoder" if task == "sft" else "encoder")
    usual = ["--batch-size", 4, "--max-length", 32, "--validation", 0.25, "--evaluate-every", 2]
    usual += ["--logging-steps", 1, "--task", task, "--model", model, "--data", data]
    return [command, *usual, *more, "--output", output]


def going_on(asked: list, output: Path) -> list:
    return [*asked, "--resume"] if RunFolder(output).record.is_file() else asked


def whole(home, shared, name: str, command="train"):
    """The run that nothing ended, and how many moments it had."""
    output = home / command / name
    said = home / f"{command} {name}.txt"
    if not said.exists():
        asked = arguments(shared, SETTINGS[command][name], output, command)
        ended = run(asked, said, Limits(under=output))
        assert ended.process.exitcode == 0, ended.said
    return output, int(said.read_text().rsplit("moments: ", 1)[1])


SETTINGS = {
    "train": RUNS,
    "search": {"tpe": ["classify", "--steps", 4, "--method", "lora", *SEARCH]},
}


def model_of(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted((folder / "model").glob("*.safetensors"))}


def read(path: Path):
    return json.loads(path.read_text())


def numbers(folder: Path) -> tuple:
    """What a run computed, without what its time and memory were."""
    own = ("seconds", "peak_memory_bytes")
    metrics = {k: v for k, v in read(folder / "metrics.json").items() if k not in own}
    seen = ("loss", "eval_loss", "eval_f1_macro", "step", "learning_rate", "grad_norm")
    log = [{k: entry[k] for k in seen if k in entry} for entry in read(folder / "log.json")]
    return metrics, [entry for entry in log if len(entry) > 1]


def assert_same_run(folder: Path, other: Path) -> None:
    assert model_of(folder) == model_of(other) and model_of(other)
    assert numbers(folder) == numbers(other)
    assert not list(folder.glob(".partial-*")) and not (folder / "checkpoints").exists()


def moments(count: int, last: int, seed: int) -> list[int]:
    """Every part of a run has its share of them."""
    draw = random.Random(seed)
    return [1 + int((i + draw.random()) * last / count) for i in range(count)]


@pytest.mark.parametrize(
    ("name", "kills"),
    [("best", 3), *(pytest.param(name, 8, marks=pytest.mark.slow) for name in RUNS)],
)
def test_a_killed_training_ends_as_if_it_had_not_been(shared, home, tmp_path, name, kills):
    """One run each, killed at that moment of it and then let be."""
    other, last = whole(home, shared, name)
    for at in moments(kills, last, seed=kills):
        output = tmp_path / str(at)
        asked = arguments(shared, RUNS[name], output)
        killed = run(asked, tmp_path / "log", Limits(under=output, at=at))
        assert killed.process.exitcode == -9, killed.said
        ended = run(going_on(asked, output), tmp_path / "log")
        assert ended.process.exitcode == 0, (at, ended.said)
        assert_same_run(output, other)


@pytest.mark.slow
def test_thirty_kills_at_any_time(shared, home, tmp_path):
    """By the clock, so inside whatever the libraries write, and resumed runs are killed too."""
    draw, killed, started = random.Random(0), 0, time.monotonic()
    whole(home, shared, "best")
    run(arguments(shared, RUNS["best"], tmp_path / "timed"), tmp_path / "log")
    longest = time.monotonic() - started
    for count in range(1000):
        name = list(RUNS)[count % len(RUNS)]
        other, _ = whole(home, shared, name)
        output = tmp_path / f"run {count}"
        asked = arguments(shared, RUNS[name], output)
        while not RunFolder(output).finished:
            command = start(going_on(asked, output), tmp_path / "log")
            code = command.wait(draw.uniform(0.1, longest) if killed < 30 else None)
            if code is None:
                code, killed = command.kill(), killed + 1
            assert code in (0, -9), command.said
        if (output / "checkpoints").exists():  # ended after its last file
            shutil.rmtree(output / "checkpoints")
        assert_same_run(output, other)
        if killed >= 30:
            return


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_keeps_the_step(shared, home, tmp_path, number):
    """With a better checkpoint before it, too, and a log that is the same."""
    other, last = whole(home, shared, "best")
    output = tmp_path / "run"
    asked = arguments(shared, RUNS["best"], output)
    ended = run(asked, tmp_path / "log", Limits(under=output, at=last // 3, number=number))
    assert ended.process.exitcode == 130 and "fastft: stopped" in ended.said, ended.said
    assert "Traceback" not in ended.said
    kept = RunFolder(output).last_checkpoint()
    assert kept is not None and not RunFolder(output).finished
    ended = run([*asked, "--resume"], tmp_path / "log")
    assert ended.process.exitcode == 0, ended.said
    assert model_of(output) == model_of(other)


def test_a_full_disk_loses_nothing(shared, home, tmp_path):
    """A file may have so many bytes: told in a sentence, and what was there is still there."""
    other, last = whole(home, shared, "best")
    output = tmp_path / "run"
    asked = arguments(shared, RUNS["best"], output)
    assert_one_sentence(run(asked, tmp_path / "log", Limits(largest=50_000)), str(output))
    shutil.rmtree(output)
    assert run(asked, tmp_path / "log", Limits(output, last // 2)).process.exitcode == -9
    before = RunFolder(output).last_checkpoint()
    assert before is not None
    for largest in (50_000, 100_000):  # the weights; the optimizer's state
        assert_one_sentence(run([*asked, "--resume"], tmp_path / "log", Limits(largest=largest)))
        assert RunFolder(output).last_checkpoint() == before
    assert run([*asked, "--resume"], tmp_path / "log").process.exitcode == 0
    assert_same_run(output, other)


def assert_one_sentence(ended, about: str = "") -> None:
    assert ended.process.exitcode == 2, ended.said
    # Bars of progress end in the lines around it.
    said = [line for line in ended.said.splitlines() if line.startswith("fastft ")]
    assert len(said) == 1 and about in said[0] and "Traceback" not in ended.said, ended.said


@pytest.fixture
def open_folder(shared):
    """A copy of shared that everyone may read, and nobody but us may write."""
    folder = Path(tempfile.mkdtemp())
    shutil.copytree(shared, folder / "shared")
    for held in (folder, folder / "shared"):
        held.chmod(0o755)
    (folder / "locked").mkdir()
    (folder / "locked").chmod(0o555)
    yield folder
    shutil.rmtree(folder)


def test_a_folder_that_may_not_be_written_is_a_sentence(open_folder, tmp_path):
    shared, locked = open_folder / "shared", open_folder / "locked"
    tests = {
        "train": arguments(shared, RUNS["best"], locked / "run"),
        "search": arguments(shared, SETTINGS["search"]["tpe"], locked / "run", "search"),
        "prepare": ["prepare", "--data", shared / "classify.jsonl", "--output", locked / "made"],
    }
    for asked in tests.values():
        ended = run(asked, tmp_path / "log", Limits(obeys_modes=True))
        assert_one_sentence(ended, "Permission denied")
        assert not list(locked.iterdir())
    shared.chmod(0o000)
    for asked in tests.values():  # nor what may not be read
        assert_one_sentence(
            run(asked, tmp_path / "log", Limits(obeys_modes=True)), "Permission denied"
        )
    shared.chmod(0o755)


@pytest.mark.parametrize("kills", [2, pytest.param(12, marks=pytest.mark.slow)])
def test_a_killed_search_goes_on(shared, home, tmp_path, kills):
    other, last = whole(home, shared, "tpe", "search")
    wanted = [(t["settings"], t["score"]) for t in read(other / "metrics.json")["trials"]]
    for at in moments(kills, last, seed=kills):
        output = tmp_path / str(at)
        asked = arguments(shared, SETTINGS["search"]["tpe"], output, "search")
        assert run(asked, tmp_path / "log", Limits(output, at)).process.exitcode == -9
        ended = run(going_on(asked, output), tmp_path / "log")
        assert ended.process.exitcode == 0, (at, ended.said)
        trials = read(output / "metrics.json")["trials"]
        assert [(t["settings"], t["score"]) for t in trials] == wanted, at
        best = read(output / "metrics.json")["best"]["trial"]
        assert [path.parent.name for path in output.glob("trials/*/model")] == [str(best)]
        assert (output / "best.yaml").is_file() and not list(output.glob("trials/*/checkpoints"))


def test_a_study_killed_inside_a_line_goes_on(shared, home, tmp_path):
    """As a process leaves it that was killed while it wrote."""
    other, last = whole(home, shared, "tpe", "search")
    output = tmp_path / "run"
    asked = arguments(shared, SETTINGS["search"]["tpe"], output, "search")
    assert run(asked, tmp_path / "log", Limits(output, last // 2)).process.exitcode == -9
    with open(output / "study.journal", "a") as journal:
        journal.write('{"op_code":5,"worker')
    ended = run([*asked, "--resume"], tmp_path / "log")
    assert ended.process.exitcode == 0, ended.said
    trials, wanted = (read(f / "metrics.json")["trials"] for f in (output, other))
    assert [t["score"] for t in trials] == [t["score"] for t in wanted]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("kills", [2, pytest.param(12, marks=pytest.mark.slow)])
def test_a_killed_prepare_is_there_or_not(shared, tmp_path, kills, number):
    def asked(name: str) -> list:
        return ["prepare", "--data", shared / "classify.jsonl", "--output", tmp_path / name]

    ended, left = run(asked("whole"), tmp_path / "log", Limits(under=tmp_path)), 0
    for at in moments(kills, ended.moments, seed=kills):
        killed = run(asked("made"), tmp_path / "log", Limits(tmp_path, at, number))
        assert killed.process.exitcode in (-number, 130, 0), killed.said
        found = list(tmp_path.glob(".partial-*/made/*"))
        left += len(found)
        assert number == signal.SIGKILL or not found  # SIGTERM's clears up behind it
        if not (tmp_path / "made").exists():
            assert run(asked("made"), tmp_path / "log").process.exitcode == 0
            assert not list(tmp_path.glob(".partial-*"))  # what was left has gone
        for file in ("train.jsonl", "test.jsonl", "validation.jsonl", "dropped.jsonl"):
            made, other = (tmp_path / name / file for name in ("made", "whole"))
            assert made.read_bytes() == other.read_bytes()
        shutil.rmtree(tmp_path / "made")
    assert left or number == signal.SIGTERM
