"""fastft search on tiny models: spaces, samplers, pruning, resuming, the best settings."""

import json
from dataclasses import replace

import pytest
import yaml

from fastft import cli
from fastft.finetune import SearchConfig, TrainConfig, UserError, config, search, studying, train


@pytest.fixture
def asked(shared, tmp_path):
    """asked(*space, **settings): a search whose runs are two steps each."""

    def make(*space: str, **settings) -> SearchConfig:
        usual = {
            "model": str(shared / "encoder"),
            "data": str(shared / "classify.jsonl"),
            "task": "classify",
            "output": str(tmp_path / "search"),
            "validation": 0.5,
            "steps": 2,
            "evaluate_every": 1,
            "max_length": 16,
            "space": list(space),
        }
        return SearchConfig(**usual | settings)

    return make


RATE = "learning_rate: [1e-4, 1e-2, log]"


def test_a_search_gives_the_best_settings_to_train(asked, tmp_path, capsys):
    made = asked(RATE, "top_layers: [1, 2, linear]", "method: [top-layers, full]", trials=4)
    result = search(made)
    held = {path.name for path in result.folder.iterdir()}
    assert held >= {"settings.yaml", "study.journal", "best.yaml", "history.png", "metrics.json"}
    metrics = json.loads((result.folder / "metrics.json").read_text())
    trials = metrics["trials"]
    assert len(trials) == 4 and metrics["metric"] == "f1_macro"
    for trial in trials:
        assert 1e-4 <= trial["settings"]["learning_rate"] <= 1e-2
        assert trial["settings"]["top_layers"] in (1, 2)
        own = result.folder / "trials" / str(trial["trial"])
        kept = yaml.safe_load((own / "settings.yaml").read_text())
        assert kept["learning_rate"] == trial["settings"]["learning_rate"]
        assert (own / "model").is_dir() == (trial["trial"] == metrics["best"]["trial"])
    scores = [trial["score"] for trial in trials if trial["state"] == "complete"]
    assert result.score == max(scores) == metrics["best"]["score"]
    assert "f1_macro" in capsys.readouterr().out
    # The best trial again: the same numbers.
    again = config.read(TrainConfig, "train", [str(result.folder / "best.yaml")])
    assert again == result.best
    again = train(replace(again, output=str(tmp_path / "again")))
    assert again.metrics["validation"]["f1_macro"] == result.score


def test_a_grid_ends_when_it_is_done(asked):
    result = search(asked("rank: [2, 4]", "seed: [0, 1]", method="lora", sampler="grid"))
    seen = [tuple(trial["settings"].values()) for trial in result.metrics["trials"]]
    assert sorted(seen) == [(2, 0), (2, 1), (4, 0), (4, 1)]


class Stop(BaseException):
    pass


@pytest.mark.parametrize("sampler", ["tpe", "random", "grid"])
@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
def test_a_search_resumes_as_if_it_had_not_stopped(asked, tmp_path, monkeypatch, sampler, error):
    space = ["warmup: [0, 0.5]", "seed: [0, 1]"] if sampler == "grid" else [RATE]
    usual = {"sampler": sampler, "trials": 4, "startup": 2, "pruning": "none"}
    count = []

    def trained(trial, config):  # what is drawn matters here, not what it gives
        count.append(config)
        if len(count) == stops_at:
            raise error
        return config.rate * (1 + config.warmup)

    monkeypatch.setattr(studying, "_train", trained)
    stops_at = 0
    whole = search(asked(*space, **usual, output=str(tmp_path / "whole")))
    count.clear()
    stops_at, broken = 3, asked(*space, **usual, output=str(tmp_path / "broken"))
    with pytest.raises(error):
        search(broken)
    stops_at = 0
    with pytest.raises(UserError, match="exists already"):
        search(broken)
    with pytest.raises(UserError, match="was started with s(ampler|pace)"):
        other = "random" if sampler != "random" else "tpe"
        search(replace(broken, resume=True, sampler=other, space=[RATE]))
    resumed = search(replace(broken, resume=True))
    drawn = [
        [trial["settings"] for trial in result.metrics["trials"]] for result in (whole, resumed)
    ]
    assert len(count) == 3 + 2 and len(drawn[0]) == 4
    if sampler == "grid":
        drawn = [sorted(one, key=str) for one in drawn]
    assert drawn[0] == drawn[1]
    assert len({str(one) for one in drawn[1]}) == 4


def test_what_is_worse_than_the_median_is_pruned(asked, monkeypatch):
    """Rates from good to nothing at all: the later trials end at their first evaluation."""
    made = asked("learning_rate: [2e-2, 1e-2, 5e-3, 1e-9]", startup=2, steps=6, sampler="grid")
    order = [2e-2, 1e-2, 5e-3, 1e-9]
    monkeypatch.setattr(studying.random.Random, "shuffle", lambda self, grid: None)
    # By the loss: whatever the rate, scores of so few rows are often equal.
    monkeypatch.setattr("fastft.finetune.tasks.classify.BEST", "loss")
    trials = search(made).metrics["trials"]
    assert [trial["settings"]["learning_rate"] for trial in trials] == order
    last = trials[-1]
    assert last["state"] == "pruned" and len(last["evaluations"]) < 6
    assert trials[0]["state"] == trials[1]["state"] == "complete"
    assert len(trials[0]["evaluations"]) == 6
    own = made.output + f"/trials/{last['trial']}"
    assert not list(studying.RunFolder(own).path.glob("checkpoints"))
    kept = search(replace(made, pruning="none", output=made.output + "2")).metrics["trials"]
    assert all(trial["state"] == "complete" for trial in kept)


def test_a_trial_that_cannot_be_run_is_told_and_the_others_are(asked, capsys):
    made = asked("label_smoothing: [0.0, 0.1]", focal_gamma=2.0, sampler="grid")
    trials = search(made).metrics["trials"]
    assert sorted(trial["state"] for trial in trials) == ["complete", "fail"]
    assert any("do not go together" in trial.get("reason", "") for trial in trials)
    with pytest.raises(UserError, match="no trial came to its end: .*do not go together"):
        search(replace(made, space=["label_smoothing: [0.1, 0.2]"], output=made.output + "2"))


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("learning_rat: [1, 2]", "no such setting"),
        ("learning_rate: [1e-3, 1e-5, log]", r"expected \[lowest, highest, log\]"),
        ("learning_rate: [0, 1e-5, log]", "above 0"),
        ("learning_rate: [1e-3]", "at least two"),
        ("learning_rate: [-1.0, 1.0]", "learning_rate: expected more than 0"),
        ("learning_rate: 1", "expected a list of values"),
        ("rank: [1.5, 2]", "expected ints"),
        ("method: [lora, lara]", "method: expected"),
        ("packing: [1, 2]", "expected bools"),
        ("task: [lm, sft]", "the same in all trials"),
        ("target_modules: [a, b]", "the same in all trials"),
        ("nothing", "expected `key:"),
    ],
)
def test_spaces_that_are_none(asked, entry, words):
    with pytest.raises(UserError, match=words) as raised:
        asked(entry)
    assert "\n" not in str(raised.value)


def test_settings_that_do_not_make_a_search(asked):
    with pytest.raises(UserError, match="there twice"):
        asked(RATE, RATE)
    with pytest.raises(UserError, match="is a range"):
        asked(RATE, sampler="grid")
    with pytest.raises(UserError, match="not in a search"):
        asked(RATE, seeds=[1, 2])
    for wrong, words in [
        (asked(), "space: nothing to search"),
        (asked(RATE, validation=0.0), "trials are compared by validation data"),
    ]:
        with pytest.raises(UserError, match=words):
            search(wrong)


def test_the_command_reads_lists_as_a_space(shared, tmp_path, capsys):
    settings = tmp_path / "settings.yaml"
    settings.write_text(
        f"model: {shared / 'encoder'}\ndata: {shared / 'classify.jsonl'}\ntask: classify\n"
        "learning_rate: [1e-4, 1e-3, log]\nbatch_size: [8, 16]\ngradient_checkpointing: "
        "[true, false]\nsteps: 1\nvalidation: 0.5\nmax_length: 16\nspace: ['seed: [1, 2]']\n"
    )
    read = config.read(SearchConfig, "search", [str(settings)])
    assert read.searched() == {
        "seed": [1, 2],
        "learning_rate": [1e-4, 1e-3, "log"],
        "batch_size": [8, 16],
        "gradient_checkpointing": [True, False],
    }
    output = str(tmp_path / "out")
    flags = ["--output", output, "--trials", "2", "--space", "warmup: [0, 0.5, linear]"]
    assert cli.main(["search", str(settings), *flags, "--dry-run"]) == 0
    assert "warmup" in capsys.readouterr().out and not (tmp_path / "out").exists()
    assert cli.main(["search", str(settings), *flags]) == 0
    assert "best: trial" in capsys.readouterr().out
    assert cli.main(["search", str(settings), *flags]) == 2
    assert "exists already" in capsys.readouterr().err
    assert cli.main(["train", str(settings)]) == 2  # a list is no value there
    assert "expected" in capsys.readouterr().err
