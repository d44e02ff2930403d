"""Continual learning: EWC and distillation by their formulas, replay, and what is forgotten."""

import json
from dataclasses import replace

import pytest
import torch
from finetune import tiny

from fastft.finetune import TrainConfig, UserError, continual, loading, train
from fastft.finetune.continual import Keeping, divergence, draw_from, fisher
from fastft.patch import patch


def counting(step: int, count: int = 24) -> list[dict]:
    """Texts that count forwards or backwards through the same words."""
    words = tiny.WORDS[:20]
    return [
        {"text": " ".join(words[(7 * i + step * j) % 20] for j in range(8 + i % 3))}
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    tiny.save_encoder(folder / "encoder")
    tiny.save_model(folder / "decoder")
    tiny.save_rows(folder / "old.jsonl", counting(1))
    tiny.save_rows(folder / "new.jsonl", counting(-1))
    tiny.save_rows(folder / "labelled.jsonl", tiny.labelled())
    return folder


@pytest.fixture(scope="module")
def settings(shared):
    def make(output, **own) -> TrainConfig:
        usual = {
            "task": "lm", "output": str(output), "validation": 0.0, "batch_size": 8,
            "packing": False, "schedule": "constant", "warmup": 0.0, "logging_steps": 1,
            "max_length": 16, "learning_rate": 3e-3,
        }  # fmt: skip
        return TrainConfig(**usual | own)

    return make


@pytest.fixture(scope="module")
def old(shared, settings):
    """A run that learned to count forwards."""
    return train(
        settings(shared / "old", model=str(shared / "decoder"), data=str(shared / "old.jsonl"),
                 steps=40)
    ).folder  # fmt: skip


def loss_on(folder, data, task="lm") -> float:
    tokenizer = loading.load_tokenizer(folder)
    model = loading.load_model(folder, task)
    total = tokens = 0.0
    for row in map(json.loads, data.read_text().splitlines()):
        ids = torch.tensor([tokenizer(row["text"])["input_ids"]])
        with torch.no_grad():
            total += model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    return total / tokens


@pytest.fixture(scope="module")
def plain(shared, old, settings):
    """(loss on the old, on the new) after plain training on the new."""
    run = train(
        settings(shared / "plain", model=str(old), data=str(shared / "new.jsonl"), steps=24)
    )
    return loss_on(run.folder, shared / "old.jsonl"), loss_on(run.folder, shared / "new.jsonl")


@pytest.mark.parametrize(
    "kept",
    [
        {"replay": 0.3},
        {"ewc": 3000.0, "ewc_rows": 24},
        {"distill": 1.0, "temperature": 2.0},
    ],
    ids=["replay", "ewc", "distill"],
)
def test_less_is_forgotten(shared, old, settings, plain, tmp_path, kept):
    before = loss_on(old, shared / "old.jsonl"), loss_on(old, shared / "new.jsonl")
    assert plain[0] > before[0] + 1  # there is something to forget
    if "distill" not in kept:
        kept = kept | {"old_data": [str(shared / "old.jsonl")]}
    run = train(
        settings(tmp_path / "run", model=str(old), data=str(shared / "new.jsonl"), steps=24, **kept)
    )
    after = loss_on(run.folder, shared / "old.jsonl"), loss_on(run.folder, shared / "new.jsonl")
    assert after[0] - before[0] < 0.7 * (plain[0] - before[0])
    assert after[1] < before[1] - 0.5  # and the new is learned
    if "replay" in kept:
        assert run.metrics["rows"]["train"] == 24 + 10


def test_a_new_adapter_forgets_nothing(shared, settings, tmp_path):
    usual = {"method": "lora", "steps": 12, "learning_rate": 1e-2}
    first = train(
        settings(tmp_path / "1", model=str(shared / "decoder"), data=str(shared / "old.jsonl"),
                 adapter_name="forwards", **usual)
    )  # fmt: skip
    assert first.model == tmp_path / "1" / "model" / "forwards"
    second = settings(
        tmp_path / "2", model=str(first.folder), data=str(shared / "new.jsonl"),
        adapter_name="backwards", **usual,
    )  # fmt: skip
    train(second)
    losses = {
        (name, data): loss_on(tmp_path / "2" / name, shared / f"{data}.jsonl")
        for name in ("forwards", "backwards")
        for data in ("old", "new")
    }
    assert losses["forwards", "old"] == loss_on(first.model, shared / "old.jsonl")
    assert losses["forwards", "old"] < losses["backwards", "old"] - 0.2
    assert losses["backwards", "new"] < losses["forwards", "new"] - 0.2
    with pytest.raises(UserError, match="holds the adapters backwards, forwards; name one"):
        loading.load_model(tmp_path / "2", "lm")
    again = replace(second, model=str(tmp_path / "2"), output=str(tmp_path / "3"))
    with pytest.raises(UserError, match="has an adapter 'backwards' already"):
        train(again)
    # PEFT itself chooses between them.
    from peft import PeftModel

    base = loading.load_model(shared / "decoder", "lm")
    model = PeftModel.from_pretrained(base, tmp_path / "2/model/forwards", "forwards")
    model.load_adapter(str(tmp_path / "2/model/backwards"), "backwards")
    ids = torch.tensor([[7, 8, 9, 10]])
    with torch.no_grad():
        seen = [(model.set_adapter(name), model(ids).logits)[1] for name in model.peft_config]
        alone = loading.load_model(tmp_path / "2/backwards", "lm")(ids).logits
    assert torch.allclose(seen[1], alone, atol=1e-6) and not torch.allclose(*seen, atol=1e-2)


def classifier(shared, labels=("bad", "good"), multi_label=False):
    torch.manual_seed(0)
    return loading.load_model(
        shared / "encoder", "classify", labels=labels, pad_id=2, multi_label=multi_label
    )


def rows_of(task: str, count: int = 5) -> list[dict]:
    """Encoded rows, one to a batch."""
    rows = []
    for i in range(count):
        ids = torch.tensor([[5 + (3 * i + j) % 40 for j in range(4 + i)]])
        labels = {
            "classify": torch.tensor([i % 2]),
            "multi": torch.tensor([[1.0, 0.0, float(i % 2)]]),
            "ner": torch.tensor([[-100, *[i % 2] * (3 + i)]]),
            "lm": torch.where(torch.arange(4 + i) < 2, -100, ids),
        }[task]
        rows.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return rows


def model_of(shared, task: str):
    if task == "lm":
        return loading.load_model(shared / "decoder", "lm")
    if task == "ner":
        torch.manual_seed(0)
        return loading.load_model(shared / "encoder", "ner", labels=["O", "B-PER"], pad_id=2)
    names = ["a", "b", "c"] if task == "multi" else ["bad", "good"]
    return classifier(shared, names, task == "multi")


def keeping_of(task: str, **own) -> Keeping:
    return Keeping("classify" if task == "multi" else task, task == "multi", **own)


def plain_items(task: str, logits, labels):
    """The logits of labelled items, one after another in plain Python."""
    if task == "classify":
        return [logits[0]]
    if task == "multi":
        return [torch.stack([torch.zeros_like(z), z]) for z in logits[0]]
    shift = 1 if task == "lm" else 0
    places = [j for j in range(shift, labels.shape[1]) if labels[0, j] != -100]
    return [logits[0, j - shift] for j in places]


def test_fisher_is_the_formula(shared):
    for task in ("classify", "multi", "ner", "lm"):
        rows = rows_of(task)
        truth, model = model_of(shared, task).double(), model_of(shared, task)
        patch(model)
        for one in (truth, model):
            one.get_input_embeddings().requires_grad_(False)
        keeping = keeping_of(task)

        def draw(scores):  # what the model finds least likely: a gradient that is not small
            return scores.argmin(-1)

        found = fisher(model, rows, keeping.scores, draw)
        named = {id(w): name for name, w in model.named_parameters()}
        trained = {name: w for name, w in truth.named_parameters() if w.requires_grad}
        wanted = {name: torch.zeros_like(w) for name, w in trained.items()}
        items = 0
        for row in rows:
            logits = truth.eval()(row["input_ids"], row["attention_mask"]).logits
            own = plain_items(task, logits, row["labels"])
            items += len(own)
            likelihood = sum(torch.log(z.softmax(0)[z.argmin()]) for z in own)
            gradients = torch.autograd.grad(likelihood, trained.values(), allow_unused=True)
            for name, gradient in zip(trained, gradients, strict=True):
                if gradient is not None:
                    wanted[name] += gradient**2
        assert [named[id(w)] for w, _ in found] == list(trained)
        assert model.training is False and all(w.grad is None for w in model.parameters())
        largest = max(w.norm() for w in wanted.values())
        for (_, own), name in zip(found, trained, strict=True):
            off = (own.double() * items - wanted[name]).norm()
            # What is zero but for rounding, as of a bias that softmax takes out, has no share.
            assert off < 1e-3 * wanted[name].norm() + 1e-8 * largest, (task, name)


def test_drawn_labels_give_the_fisher_of_the_model():
    """A linear model, where F = mean of p (1 - p) x^2 is known."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(2, 3))
    rows = torch.randn(4, 3)

    class Linear(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = weight

        def forward(self, x):
            return {"logits": x @ self.weight.T}

    draw = draw_from(torch.Generator().manual_seed(0))
    many = ({"x": rows[i % 4, None], "labels": torch.zeros(1).long()} for i in range(4_000))
    ((_, found),) = fisher(Linear(), many, keeping_of("classify").scores, draw)
    p = (rows @ weight.T).softmax(-1)  # (rows, classes)
    wanted = torch.einsum("rc,rx->cx", p * (1 - p), rows**2) / 4
    assert torch.allclose(found, wanted.detach(), rtol=0.15)


def test_the_pull_is_the_formula():
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(3, 2)), torch.nn.Parameter(torch.randn(4))]
    olds, own = ([torch.rand_like(w) for w in weights] for _ in range(2))
    keeping = keeping_of("classify", ewc=3.0, pulls=list(zip(weights, olds, own, strict=True)))
    labels = torch.zeros(4).long()
    loss = keeping({}, {"labels": labels})
    loss.backward()
    wanted = 0.0
    for w, old, f in zip(weights, olds, own, strict=True):
        w, old, f = w.detach().double(), old.double(), f.double()
        wanted += (
            3.0
            / 2
            * sum(
                (a * (b - c) ** 2).item()
                for a, b, c in zip(f.flatten(), w.flatten(), old.flatten(), strict=True)
            )
        )
    assert loss.item() == pytest.approx(wanted, rel=1e-6)
    for w, old, f in zip(weights, olds, own, strict=True):
        assert torch.allclose(w.grad, 3.0 * f * (w.detach() - old))
    # Of a step of ten items, these four have four tenths of the pull.
    assert keeping({}, {"labels": labels}, 10).item() == pytest.approx(0.4 * wanted, rel=1e-6)
    nothing = keeping({}, {"labels": torch.full((4,), -100)}, torch.tensor(0))
    assert nothing.item() == 0


@pytest.mark.parametrize("task", ["classify", "multi", "ner", "lm"])
def test_distillation_is_the_formula(shared, task):
    row, model, teacher = rows_of(task, 4)[-1], model_of(shared, task), model_of(shared, task)
    torch.manual_seed(1)
    with torch.no_grad():
        for w in teacher.parameters():
            w.add_(torch.randn_like(w))  # so far off that rounding does not matter
    patch(model), patch(teacher)
    keeping = keeping_of(task, distill=0.7, temperature=3.0, teacher=teacher.eval())
    given = {name: value for name, value in row.items() if name != "labels"}
    logits = model.eval()(**given).logits.detach().requires_grad_()
    loss = keeping({"logits": logits}, row, 8)
    loss.backward()
    with torch.no_grad():
        before = plain_items(task, teacher(**given).logits.double(), row["labels"])
        exact = logits.detach().double().requires_grad_()
    now = plain_items(task, exact, row["labels"])
    total = 0.0
    for z, t in zip(now, before, strict=True):
        p = (t / 3.0).softmax(0)
        total = total + 9.0 * (p * (p.log() - (z / 3.0).softmax(0).log())).sum()
    (0.7 * total / 8).backward()
    assert loss.item() == pytest.approx(0.7 * total.item() / 8, rel=1e-4)
    assert torch.allclose(logits.grad.double(), exact.grad, atol=1e-6)
    assert exact.grad.abs().max() > 1e-2
    # Its gradient, in closed form.
    scores, old = torch.randn(5, 7, requires_grad=True), torch.randn(5, 7)
    divergence(scores, old, 3.0).backward()
    wanted = 3.0 * ((scores / 3.0).softmax(-1) - (old / 3.0).softmax(-1))
    assert torch.allclose(scores.grad, wanted, atol=1e-6)


def test_lazy_logits_distil_as_well(shared):
    """A patched model that was given labels has logits that are computed when they are read."""
    row, teacher = rows_of("lm")[0], model_of(shared, "lm").eval()
    with torch.no_grad():
        teacher.get_output_embeddings().weight.mul_(2)
    gradients = []
    for patched in (False, True):
        model = model_of(shared, "lm").train()
        if patched:
            patch(model)
        keeping = keeping_of("lm", distill=1.0, teacher=teacher)
        outputs = model(**row)
        (outputs.loss + keeping(outputs, row)).backward()
        gradients.append({name: w.grad for name, w in model.named_parameters()})
    for name, wanted in gradients[0].items():
        assert torch.allclose(gradients[1][name], wanted, atol=1e-5), name


@pytest.mark.parametrize(("task", "patched"), [("lm", True), ("lm", False), ("classify", True)])
def test_accumulated_batches_are_one_batch(shared, old, settings, tmp_path, task, patched):
    """The same weights however many batches a step has, and patched or not."""
    data, model = shared / "new.jsonl", old
    if task == "classify":
        data = shared / "labelled.jsonl"
        first = settings(tmp_path / "0", model=str(shared / "encoder"), data=str(data), steps=2,
                         task=task)  # fmt: skip
        model = train(first).folder
    kept = {
        "old_data": [str(shared / "old.jsonl" if task == "lm" else data)], "ewc": 50.0,
        "ewc_rows": 4, "distill": 0.5, "dropout": 0.0,
    }  # fmt: skip
    seen = []
    for name, parts in {"whole": (24, 1), "parts": (6, 4)}.items():
        batch, accumulation = parts
        run = train(
            settings(tmp_path / name, model=str(model), data=str(data), steps=3, task=task,
                     batch_size=batch, gradient_accumulation=accumulation, patch=patched, **kept)
        )  # fmt: skip
        log = json.loads((run.folder / "log.json").read_text())
        seen.append([[e["loss"], e["grad_norm"]] for e in log if "loss" in e])
    assert torch.allclose(*map(torch.tensor, seen), atol=1e-4, rtol=1e-3)


def test_replay_has_its_share_of_old_rows():
    from datasets import Dataset

    new = Dataset.from_dict({"input_ids": [[i] for i in range(60)]})
    old = Dataset.from_dict({"input_ids": [[-1 - i] for i in range(30)]})
    for share, count in ((0.25, 20), (0.5, 60), (0.01, 1)):
        mixed = [ids for (ids,) in continual.replayed(new, old, share, 0)["input_ids"]]
        assert mixed[:60] == list(range(60)) and len(mixed) == 60 + count
        times = [mixed.count(-1 - i) for i in range(30)]
        assert sum(times) == count and max(times) - min(times) <= 1
    first, again, other = (
        continual.replayed(new, old, 0.25, seed)["input_ids"][60:] for seed in (0, 0, 1)
    )
    assert first == again != other


def test_mistakes_are_one_sentence(shared, old, settings, tmp_path):
    def asked(**own):
        usual = {"model": str(old), "data": str(shared / "new.jsonl"), "steps": 1}
        return settings(tmp_path / "run", **usual | own)

    for own, words in [
        ({"replay": 0.5}, "old_data names"),
        ({"ewc": 1.0}, "old_data names"),
        ({"old_data": ["x"]}, "what for"),
        ({"distill": 1.0, "fsdp": True}, "whole weights"),
        ({"adapter_name": "a"}, "the method full trains no adapter"),
        ({"adapter_name": "../a", "method": "lora"}, "no folder's name"),
        ({"adapter_name": "a", "method": "lora", "distill": 1.0}, "forgets nothing"),
    ]:
        with pytest.raises(UserError, match=words) as raised:
            asked(**own)
        assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match="none.jsonl: no such file"):
        train(asked(replay=0.5, old_data=[str(tmp_path / "none.jsonl")]))
    with pytest.raises(UserError, match="old_data: .*labelled.jsonl"):
        tiny.save_rows(tmp_path / "labelled.jsonl", [{"words": "a"}])
        train(asked(replay=0.5, old_data=[str(tmp_path / "labelled.jsonl")]))
    data = str(shared / "labelled.jsonl")
    with pytest.raises(UserError, match="was not trained for the classes bad, good"):
        train(asked(task="classify", model=str(shared / "encoder"), data=data, distill=1.0))
    assert not (tmp_path / "run").exists()


def test_what_is_evaluated_is_the_task_alone(shared, old, settings, tmp_path):
    new = str(shared / "new.jsonl")
    run = train(
        settings(tmp_path / "run", model=str(old), data=new, validation_data=new, steps=8,
                 distill=100.0)
    )  # fmt: skip
    assert max(tiny.losses(run.folder)) > 20
    held = loss_on(run.folder, shared / "new.jsonl")
    assert run.metrics["validation"]["loss"] == pytest.approx(held, rel=0.05)
