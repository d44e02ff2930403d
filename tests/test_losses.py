"""ClassificationLoss: PyTorch's definitions, and one mean over the batches of a step."""

import pytest
import torch
from truth import assert_as_exact

import fastft.losses
from fastft.losses import ClassificationLoss

F = torch.nn.functional
WEIGHTS = [0.5, 2.0, 1.0, 0.0, 3.0]


def items(*shape):
    labels = torch.randint(0, 5, shape)
    labels[..., 1::3] = -100
    return torch.randn(*shape, 5, requires_grad=True), labels


def focal(logits, labels, gamma, weights):
    """The definition, from the probabilities."""
    kept = labels != -100
    log_p = logits.log_softmax(-1)[kept].gather(-1, labels[kept][..., None])[..., 0]
    weight = torch.ones(5) if weights is None else torch.tensor(weights)
    weight = weight.to(log_p.dtype)[labels[kept]]
    return (-weight * (1 - log_p.exp()) ** gamma * log_p).sum() / weight.sum()


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("settings", [{}, {"label_smoothing": 0.2}, {"focal_gamma": 2.0}], ids=str)
@pytest.mark.parametrize("shape", [(7,), (3, 6)])
def test_definition(shape, settings, weights):
    logits, labels = items(*shape)
    loss = ClassificationLoss(weights, **settings)

    def eager(logits):
        if "focal_gamma" in settings:
            return focal(logits, labels, 2.0, weights)
        weight = None if weights is None else torch.tensor(weights).to(logits.dtype)
        return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), weight, **settings)

    assert_as_exact(lambda logits: loss({"logits": logits}, labels), eager, [logits])


@pytest.mark.parametrize("settings", [{}, {"label_smoothing": 0.2}, {"focal_gamma": 0.5}], ids=str)
def test_parts_of_a_step_add_up(settings):
    logits, labels = items(8, 5)
    loss, count = ClassificationLoss(WEIGHTS, **settings), (labels != -100).sum()
    whole = loss(logits, labels, count)
    parts = sum(loss(logits[i : i + 2], labels[i : i + 2], count) for i in range(0, 8, 2))
    torch.testing.assert_close(whole, parts)
    (wanted,) = torch.autograd.grad(whole, logits)
    (got,) = torch.autograd.grad(parts, logits)
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_certain_predictions_and_no_items(gamma):
    logits = torch.tensor([[100.0, 0.0, 0.0, 0.0, 0.0]], requires_grad=True)
    for labels in (torch.tensor([0]), torch.tensor([-100])):
        loss = ClassificationLoss(focal_gamma=gamma)(logits, labels)
        (grad,) = torch.autograd.grad(loss, logits)
        assert loss == 0 and grad.abs().max() < 1e-30


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"class_weights": [[1.0]]}, "class_weights: expected one number"),
        ({"class_weights": [1.0, -1.0]}, "class_weights: expected one number"),
        ({"label_smoothing": 1.5}, "label_smoothing: expected 0 to 1"),
        ({"focal_gamma": -1.0}, "focal_gamma: expected 0 or more"),
        ({"focal_gamma": 1.0, "label_smoothing": 0.1}, "focal_gamma: expected 0 with"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        ClassificationLoss(**settings)


def test_wrong_number_of_weights():
    logits, labels = items(4)
    with pytest.raises(ValueError, match="weight: expected shape"):
        fastft.losses.ClassificationLoss([1.0, 2.0])(logits, labels)
