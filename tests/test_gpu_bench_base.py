"""bench/gpu/base.py without a GPU: which sides run over which base, their bytes, the goals."""

import copy

import pytest

import fastft
from bench.gpu import base as bench_base
from bench.gpu import measure, peers, products
from bench.gpu.base import NAMES, PLAIN, base_bytes
from bench.gpu.case import Here, Row, Skip
from bench.gpu.measure import Session
from bench.gpu.shapes import LLAMA_1B
from bench.gpu.steps import causal_lm, with_lora

HERE = Here("cpu", toy=True)
RATES = {"copy": 1e9, "bfloat16": 1e12, "float32": 1e12}
SHAPE = LLAMA_1B.here(HERE)
SESSION = Session(HERE, measure.CpuTimer(), RATES)


def test_fp8_is_a_side_where_it_can_be(monkeypatch):
    report = bench_base.step(SESSION, LLAMA_1B)
    assert [row.side for row in report.rows] == ["eager", PLAIN, "fastft"]
    assert report.skipped == {"fastft fp8": "the layers lie on cpu"}
    assert [verdict is None for _, verdict in report.goals] == [False, True]
    monkeypatch.setattr("fastft.ops.fp8_linear.why_not", lambda device: None)
    report = bench_base.step(SESSION, LLAMA_1B)
    assert [row.side for row in report.rows] == ["eager", PLAIN, "fastft", "fastft fp8"]
    assert not report.skipped and not report.failed
    told = " ".join(report.notes)
    assert "14 layers of int8" in told and "14 layers of fp8" in told
    assert "fastft fp8 0.1" in told and "eager 0.1" in told


def test_a_layer_of_each_kind(base):
    """Where fp8 is not refused (on the CPU by the fixture), both are measured."""
    report = products.frozen_layer(SESSION, LLAMA_1B)
    assert [row.side for row in report.rows][:2] == ["eager", "fastft"]
    assert ("fastft fp8" in report.skipped) == (base == "int8")
    assert len(report.rows) == (2 if base == "int8" else 3)


def test_bytes_of_the_base(base):
    model = with_lora(causal_lm(HERE, SHAPE))
    plain = base_bytes(model)
    layers = [m for n, m in model.named_modules() if n.endswith(".base_layer")]
    assert plain == 2 * sum(m.weight.numel() for m in layers)
    smaller = copy.deepcopy(model)
    fastft.patch(smaller, base_weights=base)
    outs = sum(m.weight.shape[0] for m in layers)
    assert base_bytes(smaller) == plain // 2 + 4 * outs


@pytest.mark.parametrize("kind", NAMES)
def test_goals_are_of_time_and_bytes(kind):
    held = {PLAIN: 2000, NAMES[kind]: 1004}

    def verdict(ms, held):
        rows = {PLAIN: Row(PLAIN, 1.3), NAMES[kind]: Row(NAMES[kind], ms)}
        return bench_base._goal(kind, held).verdict(rows)

    assert verdict(0.99, held) is True
    assert verdict(1.01, held) is False
    assert verdict(0.99, held | {NAMES[kind]: 1030}) is False
    assert bench_base._goal(kind, held).verdict({}) is None


def test_bitsandbytes_is_told_where_it_is_missing():
    with pytest.raises(Skip, match="not installed|needs a GPU"):
        bench_base.step_beside_bitsandbytes(SESSION, LLAMA_1B)
    with pytest.raises(Skip, match="not installed|needs a GPU"):
        peers.bitsandbytes(HERE, four_bits=True)


def test_sides_over_bitsandbytes(monkeypatch):
    """On the CPU, where it is installed: it computes there too."""
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(peers, "need", lambda here, distribution: None)
    report = bench_base.step_beside_bitsandbytes(SESSION, LLAMA_1B)
    names = [PLAIN, "fastft", "bitsandbytes 8-bit", "bitsandbytes NF4"]
    assert [row.side for row in report.rows] == names, report.skipped
    assert len(report.goals) == 2
