"""evaluate: each task's numbers, models side by side, prompts, and what the user can put right."""

import json
import math
import shutil

import pytest
import torch
import transformers
import yaml
from finetune import tiny

from fastft import cli
from fastft.finetune import EvaluateConfig, UserError, evaluate

WORDS = "the film is good bad great awful John lives in Paris".split()
TRAINED = [("the film is good", "pos"), ("the film is bad", "neg"), ("great", "pos")]


def lines(path, rows) -> str:
    return str(tiny.save_rows(path, rows))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A run folder whose classifier says what the last layer's bias says, and its bare base."""
    folder = tmp_path_factory.mktemp("encoder")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(str.lower, WORDS)]
    tokenizer = transformers.BertTokenizerFast(vocab={w: i for i, w in enumerate(words)})
    tokenizer.model_max_length = 32
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, id2label={0: "neg", 1: "pos"}, label2id={"neg": 0, "pos": 1},
        problem_type="single_label_classification",
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config)
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor([0.0, math.log(3)]))
    model.save_pretrained(folder / "run" / "model")
    tokenizer.save_pretrained(folder / "run" / "model")
    (folder / "run" / "run.json").write_text("{}")
    settings = {"task": "classify", "text_column": "review", "label_column": "mood"}
    (folder / "run" / "settings.yaml").write_text(yaml.safe_dump(settings))
    model.bert.config.id2label = {0: "LABEL_0", 1: "LABEL_1"}
    model.bert.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    return folder


def biased(kind, encoder, folder, bias: dict[str, float]) -> str:
    """A model with the fixture's base whose head says its bias, by the class, of every text."""
    names = dict(enumerate(bias))
    model = kind.from_pretrained(
        encoder / "base", id2label=names, label2id={name: i for i, name in names.items()}
    )
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor(list(bias.values())))
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(encoder / "base").save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    return str(tiny.save_model(tmp_path_factory.mktemp("decoder")))


def losses_of(decoder: str, text: str) -> torch.Tensor:
    """-log p of every token of a text but its first, by transformers."""
    ids = torch.tensor([tiny.tokenizer()(text)["input_ids"]])
    model = transformers.AutoModelForCausalLM.from_pretrained(decoder)
    with torch.no_grad():
        logs = model(ids).logits[0, :-1].log_softmax(-1)
    return -logs.gather(1, ids[0, 1:, None])[:, 0]


def test_a_run_beside_its_base(encoder, tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    rows = [{"review": text, "mood": mood} for text, mood in TRAINED]
    lines(data / "train.jsonl", rows[:1])
    lines(data / "test.jsonl", rows)
    run, base, out = str(encoder / "run"), str(encoder / "base"), tmp_path / "out"
    result = evaluate(EvaluateConfig(model=[run], data=[str(data)], base=base, output=str(out)))
    found = result.scores[run][str(data)]
    # It says pos to everything, surely by 3/4.
    assert found["accuracy"] == pytest.approx(2 / 3) and found["confusion"] == [[0, 1], [0, 2]]
    assert found["loss"] == pytest.approx(-(2 * math.log(0.75) + math.log(0.25)) / 3, abs=1e-5)
    assert found["brier"] == pytest.approx((2 * 0.125 + 1.125) / 3, abs=1e-5)
    held = json.loads((out / "metrics.json").read_text())
    assert held["scores"][run] == result.scores[run] and held["task"] == "classify"
    assert set(held["scores"]) == {base, run}
    own = next(out.glob("2-run/1-data"))
    told = [json.loads(line) for line in (own / "predictions.jsonl").read_text().splitlines()]
    assert [row["label"] for row in told] == ["pos", "neg", "pos"]
    assert told[1]["predicted"] == "pos"
    assert told[1]["probabilities"]["pos"] == pytest.approx(0.75)
    assert (own / "confusion.png").is_file() and "attention" in (own / "patch.txt").read_text()
    shown = capsys.readouterr().out
    assert "accuracy" in shown and run in shown and base in shown
    with pytest.raises(UserError, match="exists already"):
        evaluate(EvaluateConfig(model=[run], data=[str(data)], output=str(out)))


def test_several_models_on_several_data_are_a_matrix(encoder, tmp_path):
    old, new = (
        lines(tmp_path / f"{name}.jsonl", [{"review": t, "mood": m} for t, m in TRAINED[a:b]])
        for name, a, b in (("old", 0, 1), ("new", 1, 3))
    )
    run, out = str(encoder / "run"), tmp_path / "out"
    models = [run, str(encoder / "run" / "model")]
    result = evaluate(EvaluateConfig(model=models, data=[old, new], output=str(out)))
    assert result.metrics["matrix"] == [[1.0, pytest.approx(1 / 3)]] * 2
    assert (out / "forgetting.png").is_file()


@pytest.mark.parametrize("patch", [False, True])
def test_perplexity_is_of_tokens(decoder, tmp_path, patch):
    texts = ["word1 word2 word3 word4 word5 word6", "word7 word8"]
    data = lines(tmp_path / "data.jsonl", [{"text": text} for text in texts])
    asked = EvaluateConfig(
        model=[decoder], data=[data], task="lm", output=str(tmp_path / "out"), patch=patch,
        max_length=6, batch_size=1,
    )  # fmt: skip
    found = evaluate(asked).scores[decoder][data]
    # One stream, cut where a row is full.
    first, second = "word1 word2 word3 word4 word5 word6", "</s> word7 word8 </s>"
    loss = torch.cat([losses_of(decoder, part) for part in (first, second)]).mean().item()
    assert found["loss"] == pytest.approx(loss, abs=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)


def test_conversations(decoder, tmp_path):
    chats = [("word1 word2", "word3"), ("word4", "word5 word6 word7")]
    rows = [{"instruction": question, "output": answer} for question, answer in chats]
    data = lines(tmp_path / "d.jsonl", rows)
    asked = EvaluateConfig(model=[decoder], data=[data], task="sft", output=str(tmp_path / "out"))
    found = evaluate(asked).scores[decoder][data]
    answers = []
    for question, answer in chats:
        text = f"<s> user {question} </s> <s> assistant {answer} </s>"
        answers.append(losses_of(decoder, text)[-len(answer.split()) - 1 :])
    assert found["loss"] == pytest.approx(torch.cat(answers).mean().item(), abs=1e-5)


def test_several_labels(encoder, tmp_path):
    """Of a model that gives one label a chance of 1/4 and the other of 3/4."""
    kind = transformers.BertForSequenceClassification
    odds = {"neg": -math.log(3), "pos": math.log(3)}
    model = biased(kind, encoder, tmp_path / "model", odds)
    labels = [["pos"], ["pos", "neg"], []]
    rows = [{"text": text, "label": held} for (text, _), held in zip(TRAINED, labels, strict=True)]
    data, out = lines(tmp_path / "d.jsonl", rows), tmp_path / "out"
    asked = {"model": [model], "data": [data], "task": "classify", "multi_label": True}
    found = evaluate(EvaluateConfig(**asked, output=str(out))).scores[model][data]
    assert found["accuracy"] == pytest.approx(1 / 3)
    right, wrong = -math.log(0.75), -math.log(0.25)
    assert found["loss"] == pytest.approx((4 * right + 2 * wrong) / 6, abs=1e-5)
    assert found["per_class"]["pos"]["recall"] == 1 and found["per_class"]["neg"]["recall"] == 0
    told = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert [row["label"] for row in told] == [["pos"], ["neg", "pos"], []]
    assert all(row["predicted"] == ["pos"] for row in told)
    assert told[0]["probabilities"] == pytest.approx({"neg": 0.25, "pos": 0.75})


def test_entities(encoder, tmp_path):
    """Of a model that calls everything a name, by odds of three to one."""
    kind = transformers.BertForTokenClassification
    tagger = biased(kind, encoder, tmp_path / "tagger", {"O": 0.0, "B-PER": math.log(3)})
    data = lines(tmp_path / "d.jsonl", [{"tokens": ["John", "lives"], "tags": ["B-PER", "O"]}] * 2)
    asked = EvaluateConfig(model=[tagger], data=[data], task="ner", output=str(tmp_path / "out"))
    found = evaluate(asked).scores[tagger][data]
    assert found["loss"] == pytest.approx(-(math.log(0.75) + math.log(0.25)) / 2, abs=1e-5)
    person = found["per_class"]["PER"]
    assert (person["precision"], person["recall"], person["support"]) == (0.5, 1.0, 2)
    told = json.loads((tmp_path / "out" / "predictions.jsonl").read_text().splitlines()[0])
    assert told["tags"] == ["B-PER", "O"] and told["predicted"] == ["B-PER", "B-PER"]


def test_by_prompts(decoder, tmp_path):
    rows = [{"review": f"word{i} word{i + 1}", "mood": i % 2} for i in range(6)]
    data = lines(tmp_path / "d.jsonl", rows)
    shots = lines(tmp_path / "s.jsonl", [{"review": "word9", "mood": 1}] * 2)
    settings = {
        "model": [decoder], "data": [data], "task": "prompt", "template": "{{ text }} word20",
        "text_column": "review", "label_column": "mood", "labels": ["0", "1"],
        "label_words": ["word30", "word31 word32"], "chat": False, "separator": " ",
        "examples": shots, "shots": 1,
    }  # fmt: skip
    found = evaluate(EvaluateConfig(**settings, output=str(tmp_path / "a"))).scores[decoder][data]
    told = [json.loads(line) for line in (tmp_path / "a/predictions.jsonl").open()]
    assert told[3]["prompt"] == "word9 word20 word31 word32 word3 word4 word20"
    assert told[3]["label"] == "1" and found["examples"] == 6
    prompt = told[3]["prompt"]
    likelihoods = torch.stack(
        [
            -losses_of(decoder, f"{prompt} word30")[-1],
            -losses_of(decoder, f"{prompt} word31 word32")[-2:].sum(),
        ]
    )
    wanted = dict(zip("01", likelihoods.softmax(0).tolist(), strict=True))
    assert told[3]["probabilities"] == pytest.approx(wanted, abs=1e-5)
    free = EvaluateConfig(**settings, calibrate=True, output=str(tmp_path / "b"))
    evaluate(free)
    other = [json.loads(line) for line in (tmp_path / "b/predictions.jsonl").open()]
    # Calibration takes one constant out: by it the log odds of all rows change alike.
    odds = [
        [math.log(row["probabilities"]["1"] / row["probabilities"]["0"]) for row in held]
        for held in (told, other)
    ]
    moved = [b - a for a, b in zip(*odds, strict=True)]
    assert max(moved) - min(moved) < 1e-4 < abs(moved[0])


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"calibrate": True, "task": "lm"}, "calibrate: only for the task prompt"),
        ({"label_words": ["a"], "task": "prompt"}, "label_words: name the labels"),
        ({"base": "m"}, "model: every one once"),
        ({}, "no run folder that would know its task"),
    ],
)
def test_settings_that_do_not_belong_together(settings, said):
    with pytest.raises(UserError, match=said):
        evaluate(EvaluateConfig(model=["m"], data=["d"], output="nowhere", **settings))


def test_what_the_user_can_put_right(encoder, decoder, tmp_path, capsys):
    data = lines(tmp_path / "d.jsonl", [{"review": "good", "mood": "fine"}])
    out, run = str(tmp_path / "out"), str(encoder / "run")
    start = ["evaluate", "--output", out, "--data", data]
    assert cli.main([*start, "--model", run]) == 2
    assert "the label 'fine' is not one of neg, pos" in capsys.readouterr().err
    asked = [*start, "--model", decoder, "--task", "prompt", "--labels", "good", "bad"]
    asked += ["--label-column", "mood", "--no-chat", "--text-column", "review"]
    assert cli.main(asked) == 2
    assert "row 0: the label 'fine' is none of good, bad" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_prompts_need(decoder, tmp_path):
    rows = [{"review": "word1", "mood": "word2"}, {"review": "word3", "mood": "word4"}]
    shots = lines(tmp_path / "s.jsonl", [{"text": "word1", "mood": "word2"}])
    wide = str(shutil.copytree(decoder, tmp_path / "wide"))
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens("<turn>")
    tokenizer.save_pretrained(wide)
    usual = {
        "model": [decoder], "data": [lines(tmp_path / "d.jsonl", rows)], "task": "prompt",
        "text_column": "review", "label_column": "mood", "chat": False,
        "output": str(tmp_path / "out"),
    }  # fmt: skip
    for own, said in [
        ({"text_column": "reviews"}, "data: no column 'reviews'; did you mean 'review'"),
        ({"label_column": "moods"}, "data: no column 'moods'; did you mean 'mood'"),
        ({"examples": shots, "shots": 1}, "s.jsonl: no column 'review'; it has 'text', 'mood'"),
        (
            {"model": [wide], "template": "{{ text }} <turn>"},
            "row 0: the token '<turn>' is none of the model's 65",
        ),
        ({"answer": " good"}, "answer: the template writes two labels alike, ' good'"),
        ({"labels": ["word2", "word4"], "label_words": ["a"]}, "label_words: 1 for the 2 labels"),
        (
            {"labels": ["word2", "word4"], "label_words": ["a", "a"]},
            "label_words: one of its own for each label",
        ),
    ]:
        with pytest.raises(UserError, match=said):
            evaluate(EvaluateConfig(**usual | own))
    assert not (tmp_path / "out").exists()
