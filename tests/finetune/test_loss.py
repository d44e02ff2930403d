"""loss.make: the plain formulas in float64, and one gradient however a batch is divided."""

from types import SimpleNamespace

import pytest
import torch

from fastft.finetune import UserError
from fastft.finetune.loss import MultiLabelLoss, make

CLASSES = 4
COUNTS = [8, 4, 2, 2]  # items of each class, 16 in all
NAMES = ["a", "b", "c", "d"]


def config(task="classify", weights="none", smoothing=0.0, gamma=0.0):
    return SimpleNamespace(
        task=task, class_weights=weights, label_smoothing=smoothing, focal_gamma=gamma
    )


def rows():
    labels = torch.arange(CLASSES).repeat_interleave(torch.tensor(COUNTS))
    return torch.randn(16, CLASSES, dtype=torch.float64), labels[torch.randperm(16)]


def plain(logits, labels, weights, smoothing, gamma):
    """A sum over items and classes, written out."""
    total, weight_sum = 0.0, 0.0
    for logit, label in zip(logits.flatten(0, -2), labels.flatten(), strict=True):
        if label == -100:
            continue
        p = torch.exp(logit) / torch.exp(logit).sum()
        target = torch.full((CLASSES,), smoothing / CLASSES, dtype=p.dtype)
        target[label] += 1 - smoothing
        missed = (1 - p[label]) ** gamma
        total = total - missed * (target * weights * torch.log(p)).sum()
        weight_sum = weight_sum + weights[label]
    return total / weight_sum


def plain_multi_label(logits, labels, weights, smoothing, gamma):
    total = 0.0
    for logit, label in zip(logits, labels, strict=True):
        for x, y, w in zip(logit, label, weights, strict=True):
            p = 1 / (1 + torch.exp(-x))
            target = y * (1 - smoothing) + smoothing / 2
            missed = (1 - p if y else p) ** gamma
            loss = -w * target * torch.log(p) - (1 - target) * torch.log(1 - p)
            total = total + missed * loss
    return total / logits.numel()


FORMS = [(0.0, 0.0), (0.2, 0.0), (0.0, 2.0), (0.0, 0.5)]
# items / (classes * items of the class)
BALANCED = torch.tensor([16 / (4 * count) for count in COUNTS], dtype=torch.float64)


@pytest.mark.parametrize("weights", ["none", "balanced"])
@pytest.mark.parametrize("smoothing, gamma", FORMS)
def test_classes(weights, smoothing, gamma):
    logits, labels = rows()
    loss = make(config("classify", weights, smoothing, gamma), labels.tolist(), names=NAMES)
    by_class = BALANCED if weights == "balanced" else torch.ones(CLASSES, dtype=torch.float64)
    wanted = plain(logits, labels, by_class, smoothing, gamma)
    torch.testing.assert_close(loss({"logits": logits}, labels), wanted)


@pytest.mark.parametrize("smoothing, gamma", FORMS)
def test_tags(smoothing, gamma):
    logits, labels = rows()
    logits = torch.cat((logits, torch.randn(4, CLASSES, dtype=torch.float64))).view(4, 5, CLASSES)
    labels = torch.cat((labels, torch.full((4,), -100))).view(4, 5)  # ignored, the weights too
    loss = make(config("ner", "balanced", smoothing, gamma), [r.tolist() for r in labels])
    wanted = plain(logits, labels, BALANCED, smoothing, gamma)
    torch.testing.assert_close(loss({"logits": logits}, labels), wanted)


@pytest.mark.parametrize("weights", ["none", "balanced"])
@pytest.mark.parametrize("smoothing, gamma", FORMS)
def test_multi_label(weights, smoothing, gamma):
    logits = torch.randn(8, CLASSES, dtype=torch.float64)
    labels = torch.zeros(8, CLASSES)
    for i, count in enumerate((1, 4, 6, 2)):
        labels[:count, i] = 1.0
    loss = make(config("classify", weights, smoothing, gamma), labels.tolist(), multi_label=True)
    by_class = torch.tensor([7 / 1, 4 / 4, 2 / 6, 6 / 2], dtype=torch.float64)
    by_class = by_class if weights == "balanced" else torch.ones_like(by_class)
    wanted = plain_multi_label(logits, labels, by_class, smoothing, gamma)
    torch.testing.assert_close(loss({"logits": logits}, labels), wanted, check_dtype=False)


def test_next_tokens_with_smoothing():
    """As transformers' label smoother; the logits of virtual tokens, put before, are left out."""
    logits, labels = torch.randn(2, 6, 9), torch.randint(0, 9, (2, 6))
    labels[0, :3] = -100
    assert make(config("lm")) is None and make(config("sft")) is None
    loss = make(config("lm", smoothing=0.1))
    wanted = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=0.1
    )
    torch.testing.assert_close(loss({"logits": logits}, labels), wanted)
    virtual = torch.cat((torch.randn(2, 3, 9), logits), 1)
    torch.testing.assert_close(loss({"logits": virtual}, labels), wanted)


def parts(kind):
    if kind == "multi-label":
        return torch.randn(8, CLASSES), (torch.rand(8, CLASSES) > 0.5).float()
    shape = (8,) if kind == "classify" else (8, 5)
    labels = torch.randint(0, 9 if kind == "lm" else CLASSES, shape)
    if kind != "classify":
        labels[torch.rand(shape) > 0.6] = -100
    return torch.randn(*shape, 9 if kind == "lm" else CLASSES), labels


# A language model without smoothing has a loss of its own.
KINDS = [("lm", 0.2, 0.0)]
KINDS += [(kind, *form) for kind in ("classify", "ner", "multi-label") for form in FORMS]


@pytest.mark.parametrize("kind, smoothing, gamma", KINDS)
def test_accumulated_gradients_are_the_whole_batch_s(kind, smoothing, gamma):
    logits, labels = parts(kind)
    task = "classify" if kind == "multi-label" else kind
    loss = make(config(task, "none", smoothing, gamma), multi_label=kind == "multi-label")
    whole = logits.clone().requires_grad_()
    loss({"logits": whole}, labels).backward()
    divided = logits.clone().requires_grad_()
    counted = labels[:, 1:] if kind == "lm" else labels
    count = (counted != -100).sum()  # what Trainer counts over the batches of a step
    for i, j in ((0, 3), (3, 4), (4, 8)):
        loss({"logits": divided[i:j]}, labels[i:j], num_items_in_batch=count).backward()
    torch.testing.assert_close(divided.grad, whole.grad)


@pytest.mark.parametrize("multi_label", [False, True])
def test_trainer_steps_alike_however_a_batch_is_accumulated(tmp_path, multi_label):
    import encoders
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    ids = torch.randint(3, 90, (8, 6)).tolist()
    shape = (8, encoders.CLASSES)
    labels = (torch.rand(shape) > 0.5).float() if multi_label else torch.arange(8) % 5
    kind = "multi" if multi_label else "single"
    logged = []
    for size in (8, 2):
        model = encoders.encoder("bert", "SequenceClassification", classifier_dropout=0.0)
        model.config.problem_type = f"{kind}_label_classification"
        arguments = TrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=size, max_steps=1,
            gradient_accumulation_steps=8 // size, use_cpu=True, report_to="none",
            logging_steps=1, save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(
            model, arguments,
            train_dataset=Dataset.from_dict({"input_ids": ids, "labels": labels.tolist()}),
            compute_loss_func=make(config(), multi_label=multi_label),
        )  # fmt: skip
        trainer.train()
        logged.append(trainer.state.log_history[0])
    for name in ("loss", "grad_norm"):
        assert logged[0][name] == pytest.approx(logged[1][name], rel=1e-4)


def test_certain_predictions_have_finite_gradients():
    logits = torch.tensor([[200.0, -200.0]], requires_grad=True)
    labels = torch.tensor([[1.0, 0.0]])
    for gamma in (0.0, 0.5, 2.0):
        loss = MultiLabelLoss(focal_gamma=gamma)({"logits": logits}, labels)
        (grad,) = torch.autograd.grad(loss, logits)
        assert loss == 0 and grad.isfinite().all()


@pytest.mark.parametrize(
    "asked, labels, options, message",
    [
        (config(smoothing=0.1, gamma=1.0), None, {}, "do not go together"),
        (config("lm", gamma=1.0), None, {}, "are for classes, not for lm"),
        (config("sft", "balanced"), None, {}, "are for classes, not for sft"),
        (config(weights="balanced"), None, {}, "needs the labels"),
        (config(weights="balanced"), [0, 1, 3], {"names": NAMES}, "no training example of class c"),
        (config(weights="balanced"), [0, 1], {"names": NAMES}, "of class c"),
        (config(weights="balanced"), [0, 2], {}, "of class 1"),
        (config(weights="balanced"), [], {}, "no labelled training example"),
        (config(weights="balanced"), [[1, 0], [1, 1]], {"multi_label": True}, "without class 0"),
        (config(weights="balanced"), [[1, 0], [0, 0]], {"multi_label": True}, "of class 1"),
    ],
)
def test_what_cannot_be_made(asked, labels, options, message):
    with pytest.raises(UserError, match=message):
        make(asked, labels, **options)


def test_another_number_of_labels_than_classes():
    with pytest.raises(ValueError, match="labels: expected shape"):
        MultiLabelLoss()(torch.zeros(2, 3), torch.zeros(2, 4))
