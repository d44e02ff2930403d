"""Metrics of every task as plain numbers, ready for metrics.json: scikit-learn's and seqeval's.

Where a ratio has no denominator (a class that is never predicted, or never there) it is 0.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from fastft.finetune import UserError, need

AVERAGES = ("macro", "micro", "weighted")


def classification(labels: Any, probabilities: Any, names: Sequence[str]) -> dict[str, Any]:
    """How well one label of several is predicted: the most probable one counts.

    Args:
        labels: (examples,) integers, positions in names.
        probabilities: (examples, classes), each row sums to 1.
        names: of the classes.
    Returns: accuracy; {precision,recall,f1}_{macro,micro,weighted}, of classes that are there or
        predicted; per_class: name -> precision, recall, f1, support; confusion: rows are true,
        columns predicted classes; brier: the mean of sum_c (p_c - y_c)^2, 0 to 2 (Brier 1950);
        ece: `calibration_error`.
    Raises: UserError for no examples, labels outside names, and values that are not finite.
    """
    labels, probabilities = np.asarray(labels), np.asarray(probabilities, dtype=np.float64)
    _check(probabilities, (len(labels), len(names)))
    if labels.min() < 0 or labels.max() >= len(names):
        wrong = int(labels.max() if labels.max() >= len(names) else labels.min())
        raise UserError(f"label {wrong} is none of the {len(names)} classes")
    scores = need("sklearn.metrics", "evaluation")
    predicted, classes = probabilities.argmax(1), range(len(names))
    return {
        "accuracy": float(scores.accuracy_score(labels, predicted)),
        **_averages(labels, predicted, classes),
        "per_class": _per_class(labels, predicted, classes, names),
        "confusion": scores.confusion_matrix(labels, predicted, labels=list(classes)).tolist(),
        "brier": float(((probabilities - np.eye(len(names))[labels]) ** 2).sum(1).mean()),
        "ece": calibration_error(probabilities.max(1), predicted == labels),
        "examples": len(labels),
    }


def multi_label(
    labels: Any, probabilities: Any, names: Sequence[str], threshold: float = 0.5
) -> dict[str, Any]:
    """How well any number of labels is predicted: those of at least threshold count.

    Args:
        labels: (examples, classes) of 0 and 1.
        probabilities: (examples, classes), each of its own.
    Returns: accuracy: share of the examples with every label right; {precision,recall,f1}_{macro,
        micro,weighted}; per_class; brier: mean of (p - y)^2 over examples and classes, 0 to 1; ece
        over the same.
    Raises: as `classification`.
    """
    labels, probabilities = np.asarray(labels), np.asarray(probabilities, dtype=np.float64)
    _check(probabilities, (len(labels), len(names)))
    if labels.shape != probabilities.shape or not np.isin(labels, (0, 1)).all():
        raise UserError(f"labels: expected 0 or 1 for each of {len(names)} classes of every row")
    labels, predicted = labels.astype(int), (probabilities >= threshold).astype(int)
    classes, sure = range(len(names)), np.maximum(probabilities, 1 - probabilities)
    return {
        "accuracy": float((predicted == labels).all(1).mean()),
        **_averages(labels, predicted, classes),
        "per_class": _per_class(labels, predicted, classes, names),
        "brier": float(((probabilities - labels) ** 2).mean()),
        "ece": calibration_error(sure.ravel(), ((probabilities >= 0.5) == labels).ravel()),
        "threshold": threshold,
        "examples": len(labels),
    }


def entities(true: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> dict[str, Any]:
    """How well whole entities are found, type and both ends right, as conlleval counts (seqeval).

    Args:
        true, predicted: the tags (B-PER, I-PER, O…) of each sentence's words; PER counts as I-PER.
    Returns: {precision,recall,f1}_{macro,micro,weighted} of entities; accuracy of tags; per_class:
        type -> precision, recall, f1, support; report: seqeval's table.
    """
    if not true:
        raise UserError("nothing to evaluate: no sentences")
    for i, (a, b) in enumerate(zip(true, predicted, strict=True)):
        if len(a) != len(b):
            raise UserError(f"sentence {i}: {len(a)} words and {len(b)} predicted tags")
    scores = need("seqeval.metrics", "evaluation of entities")
    # seqeval takes lists alone, cuts the first letter off every tag, whatever it is, and warns
    # where zero_division is not given.
    true, predicted = ([[_begun(t) for t in tags] for tags in side] for side in (true, predicted))
    if not any(tag != "O" for tags in [*true, *predicted] for tag in tags):
        averages = {f"{m}_{a}": 0.0 for a in AVERAGES for m in ("precision", "recall", "f1")}
        return averages | {"accuracy": 1.0, "per_class": {}, "report": "", "examples": len(true)}
    report = scores.classification_report(true, predicted, output_dict=True, zero_division=0)
    rows = {name: _row(report.pop(f"{name} avg")) for name in AVERAGES}
    return {
        "accuracy": float(scores.accuracy_score(true, predicted)),
        **{
            f"{metric}_{name}": rows[name][metric]
            for name in AVERAGES
            for metric in ("precision", "recall", "f1")
        },
        "per_class": {name: _row(values) for name, values in report.items()},
        "report": scores.classification_report(true, predicted, digits=4, zero_division=0),
        "examples": len(true),
    }


def _begun(tag: str) -> str:
    return tag if tag == "O" or tag[1:2] == "-" else f"I-{tag}"


def perplexity(loss: float) -> float:
    """exp(loss) of a mean cross entropy in nats per token; inf where that is no number."""
    return math.exp(loss) if loss < 709 else math.inf


def calibration_error(confidence: Any, correct: Any, bins: int = 15) -> float:
    """Expected calibration error: sum over bins of |share correct - mean confidence| * share.

    confidence (n,) between 0 and 1 is sorted into bins of equal width, (i/bins, (i+1)/bins]; Guo et
    al. 2017, "On Calibration of Modern Neural Networks".
    """
    confidence, correct = np.asarray(confidence, dtype=np.float64), np.asarray(correct)
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gaps = [abs((correct[place == i] - confidence[place == i]).sum()) for i in np.unique(place)]
    return float(sum(gaps) / len(confidence))


def _check(probabilities: np.ndarray, shape: tuple[int, int]) -> None:
    if shape[0] == 0:
        raise UserError("nothing to evaluate: no examples")
    if probabilities.shape != shape:
        raise UserError(f"probabilities: expected {shape}, got {probabilities.shape}")
    if not np.isfinite(probabilities).all():
        row = int(np.argwhere(~np.isfinite(probabilities))[0][0])
        raise UserError(f"the model's probabilities of example {row} are not finite")


def _averages(labels: Any, predicted: Any, classes: Sequence[int]) -> dict[str, float]:
    from sklearn.metrics import precision_recall_fscore_support as scores

    found = {}
    # Of classes that are neither there nor predicted nothing can be said, as in scikit-learn.
    labels, predicted, classes = np.asarray(labels), np.asarray(predicted), list(classes)
    if labels.ndim > 1:
        there = [c for c in classes if labels[:, c].any() or predicted[:, c].any()]
    else:
        there = sorted({*labels.tolist(), *predicted.tolist()})
    for average in AVERAGES:
        options = {"labels": there or classes, "average": average, "zero_division": 0}
        values = scores(labels, predicted, **options)
        for name, value in zip(("precision", "recall", "f1"), values, strict=False):
            found[f"{name}_{average}"] = float(value)
    return found


def _per_class(
    labels: Any, predicted: Any, classes: Sequence[int], names: Sequence[str]
) -> dict[str, dict[str, Any]]:
    from sklearn.metrics import precision_recall_fscore_support as scores

    columns = scores(labels, predicted, labels=list(classes), zero_division=0)
    keys = ("precision", "recall", "f1", "support")
    return {
        name: _row(dict(zip(keys, values, strict=True)))
        for name, values in zip(names, zip(*columns, strict=True), strict=True)
    }


def _row(values: dict[str, Any]) -> dict[str, Any]:
    """Plain numbers; scikit-learn and seqeval call f1 by two names."""
    f1 = values["f1"] if "f1" in values else values["f1-score"]
    return {
        "precision": float(values["precision"]),
        "recall": float(values["recall"]),
        "f1": float(f1),
        "support": int(values["support"]),
    }
