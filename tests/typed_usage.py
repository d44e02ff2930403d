"""The public functions as a program calls them. `make lint` checks it by mypy; nothing runs it."""

from collections.abc import Iterator
from pathlib import Path
from typing import assert_type

import torch
from torch import Tensor, nn

import fastft
from fastft.finetune import train
from fastft.finetune.train import RunResult, TrainConfig
from fastft.ops.lora import LoraLinear, lora
from fastft.ops.norm import layer_norm, rms_norm
from fastft.patch.report import Entry, Report
from fastft.patch.verify import Verification


def patching(model: nn.Module, batch: dict[str, Tensor]) -> None:
    report = fastft.patch(model)
    assert_type(report, Report)
    assert_type(report.swapped, list[Entry])
    assert_type(fastft.verify(model, batch), Verification)
    assert_type(fastft.load(Path("folder"), base_weights="int8"), nn.Module)
    with fastft.patched(model) as inside:
        assert_type(inside, Report)
    fastft.unpatch(model)


def decoding(model: nn.Module, ids: Tensor) -> Iterator[list[int]]:
    out = fastft.generate(model, ids, max_new_tokens=8, speculation="prompt_lookup", seed=1)
    assert_type(out.sequences, torch.LongTensor)
    print(out.stats)
    for tokens in fastft.stream(model, ids, max_new_tokens=8):
        yield tokens[0]


def operators(x: Tensor, weight: Tensor, residual: Tensor) -> None:
    assert_type(rms_norm(x, weight), Tensor)
    assert_type(rms_norm(x, weight, residual=residual), tuple[Tensor, Tensor])
    assert_type(layer_norm(x, weight, weight, residual=residual), tuple[Tensor, Tensor])
    assert_type(lora(x, LoraLinear(weight)), Tensor)
    loss = fastft.losses.ClassificationLoss(class_weights=[1.0, 2.0])
    assert_type(loss(x, weight), Tensor)


def training() -> None:
    config = TrainConfig(model="bert-base-uncased", data="reviews.csv", task="classify")
    assert_type(train(config), RunResult)
