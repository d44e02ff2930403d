"""make gpu without a GPU: what it measures, keeps, skips, resumes and prints, at toy sizes."""

import dataclasses
import json
import subprocess
import sys
import time

import pytest
import torch

from bench.gpu import command, decode, measure, peers, products, runner, sections
from bench.gpu.case import BANDWIDTH, Case, Floor, Goal, Here, Report, Row, Skip, at_most
from bench.gpu.measure import Session, Side, passes
from bench.gpu.results import KEPT, ROOT, Results, folder_for
from bench.gpu.shapes import LLAMA_1B

HERE = Here("cpu", toy=True)
RATES = {"copy": 1e9, "bfloat16": 1e12, "float32": 1e12}
RUN = {
    "id": "abc torch 2", "machine": "A GPU", "commit": "c0ffee", "source": "abc",
    "date": "2026-01-01", "versions": {"torch": "2"},
}  # fmt: skip


class FakeTimer:
    """Each side takes the seconds that its result says, and grows with every round."""

    def __init__(self):
        self.order = []

    def time(self, side, pause=0.0):
        value = side.run(*side.prepare())
        self.order.append(float(value[0]))
        return float(value[0]) * (1 + len(self.order) // 4), 1e-4

    def peak(self, side):
        return int(float(side.run()[0]) * 1000)


def constant(value, **settings):
    return Side(lambda: (torch.tensor(value),), **settings)


def results(folder, invocation="first", **changes):
    return Results(folder, {**RUN, **changes}, invocation)


def run_all(cases, kept, monkeypatch, seconds=60.0, fresh=False):
    monkeypatch.setattr(runner, "cases_of", lambda section, here, only: cases)
    runner.run_section("build", HERE, kept, time.time() + seconds, fresh)


def test_sides_alternate_and_the_median_of_their_ratios_is_told():
    timer = FakeTimer()
    sides = {"eager": constant(2.0), "fastft": constant(1.0, compare=False)}
    floor = Floor(bytes=5e8)
    report = measure.measure(timer, sides, rates=RATES, floor=floor, tokens=10)
    eager, ours = report.rows
    assert timer.order[4:] == [2.0, 1.0] * measure.ROUNDS
    assert eager.ratio == pytest.approx(2.0, rel=0.1) and ours.ratio is None
    assert (eager.memory, ours.memory) == (2000, 1000)
    assert ours.floor_ms == pytest.approx(500) and ours.share == 500 / ours.ms
    assert ours.tokens_per_second == pytest.approx(1e4 / ours.ms)


def test_our_wrong_result_is_an_error_and_a_peers_is_told():
    right, wrong = constant(1.0), constant(1.2)
    with pytest.raises(AssertionError, match="0.2 from eager, allowed is 0.05"):
        measure.measure(FakeTimer(), {"eager": right, "fastft": wrong}, rates=RATES)
    nan = constant(float("nan"))
    with pytest.raises(AssertionError, match="nan from eager"):
        measure.measure(FakeTimer(), {"eager": right, "fastft": nan}, rates=RATES)
    sides = {"eager": right, "fastft": right, "peer": wrong}
    report = measure.measure(FakeTimer(), sides, rates=RATES)
    assert report.rows[2].difference == pytest.approx(0.2, rel=1e-3)


def test_a_further_form_of_ours_that_is_wrong_fails_the_case_and_the_rest_is_told():
    sides = {"eager": constant(1.0), "fastft": constant(1.0), "fastft other": constant(2.0)}
    report = measure.measure(FakeTimer(), sides, rates=RATES)
    assert [row.side for row in report.rows] == ["eager", "fastft"]
    assert report.failed.startswith("fastft other raised AssertionError: 1 from eager")


def test_what_is_missing_too_large_or_broken_is_skipped_by_name():
    def absent():
        raise Skip("not installed")

    def huge():
        raise torch.OutOfMemoryError("no")

    def broken():
        raise RuntimeError("illegal")

    sides = {
        "eager": Side(huge), "fastft": constant(1.0), "absent": absent, "broken": Side(broken),
    }  # fmt: skip
    report = measure.measure(FakeTimer(), sides, rates=RATES)
    assert [row.side for row in report.rows] == ["fastft"]
    assert report.skipped == {
        "absent": "not installed",
        "eager": "does not fit in free memory",
        "broken": "raised RuntimeError: illegal",
    }
    with pytest.raises(torch.OutOfMemoryError):
        measure.measure(FakeTimer(), {"eager": Side(huge)}, rates=RATES)
    with pytest.raises(RuntimeError, match="illegal"):
        measure.measure(FakeTimer(), {"fastft": Side(broken)}, rates=RATES)


def test_a_side_that_writes_over_its_arguments_gets_fresh_ones():
    x = torch.ones(3, requires_grad=True)

    def destructive(t):
        return t.data.mul_(2) * t

    side = passes(destructive, (x,), torch.ones(3), fresh=True)
    assert [float(side.run(*side.prepare())[0].sum()) for _ in range(2)] == [12.0, 12.0]
    assert torch.equal(x, torch.ones(3))


def test_peers_that_are_not_there_say_so(monkeypatch):
    for distribution in peers.DISTRIBUTIONS:
        with pytest.raises(Skip, match="not installed|needs a GPU"):
            peers.need(HERE, distribution)
    monkeypatch.delattr(torch.nn.functional, "linear_cross_entropy", raising=False)
    with pytest.raises(Skip, match="came with 2.13"):
        peers.torch_linear_cross_entropy()


def test_goals_speak_only_of_what_ran():
    fast, slow = Row("fastft", 1.0, floor_ms=0.9), Row("frozen", 0.8)
    report = Report(rows=[fast, slow]).judge(
        BANDWIDTH,
        at_most("frozen", 1.1, "a"),
        at_most("peer", 1.0, "b"),
        Goal("c", lambda rows: True),
    )
    assert [reached for _, reached in report.goals] == [True, False, None, True]


def test_a_run_goes_on_where_it_was(tmp_path, monkeypatch):
    ran = []

    def works(name):
        return Case(name, lambda session: ran.append(name) or Report(rows=[Row("fastft", 1.0)]))

    def fails(session):
        ran.append("build/b")
        raise ValueError("wrong shape")

    def too_large(session):
        raise torch.OutOfMemoryError("no")

    cases = [works("build/a"), Case("build/b", fails), Case("build/c", too_large)]
    half = Case("build/d", lambda session: Report(rows=[Row("x", 1.0)], failed="y raised Z"))
    run_all(cases[:2], results(tmp_path), monkeypatch)
    run_all(cases, results(tmp_path), monkeypatch)
    found = json.loads((tmp_path / "a-gpu.json").read_text())
    assert ran == ["build/a", "build/b"] and found["running"] is None
    states = {name: (entry["status"], entry["why"]) for name, entry in found["cases"].items()}
    assert states == {
        "build/a": ("done", ""),
        "build/b": ("failed", "ValueError: wrong shape"),
        "build/c": ("skipped", "does not fit in memory"),
    }
    other = results(tmp_path / "other")
    run_all([half], other, monkeypatch)
    entry = other.load()["cases"]["build/d"]
    assert (entry["status"], entry["why"], len(entry["rows"])) == ("failed", "y raised Z", 1)
    run_all(cases, results(tmp_path, "second"), monkeypatch)  # what failed, once more
    assert ran[2:] == ["build/b"]
    run_all(cases, results(tmp_path, "third", id="other sources"), monkeypatch)
    assert ran[3:] == ["build/a", "build/b"]
    run_all(cases[:1], results(tmp_path, "fourth", id="other sources"), monkeypatch, fresh=True)
    assert ran[5:] == ["build/a"]


def test_a_case_that_takes_too_long_fails_and_one_without_time_waits(tmp_path, monkeypatch):
    def endless(session):
        try:
            time.sleep(30)
        except Exception:  # as a side's failure is caught
            return Report()

    kept = results(tmp_path)
    run_all([Case("build/slow", endless, limit=0.2)], kept, monkeypatch)
    assert kept.load()["cases"]["build/slow"]["why"] == "TooLong: took longer than 0 s"
    run_all([Case("build/late", endless)], kept, monkeypatch, seconds=0.3)
    assert kept.pending(["build/late"]) == ["build/late"] and kept.running() is None


def test_a_case_that_changes_the_process_runs_alone(tmp_path, monkeypatch):
    def case(name, alone):
        return Case(name, lambda session: Report(), alone=alone)

    cases = [
        case("build/a", "no such thing"), case("build/b", "torch"), case("build/c", ""),
    ]  # fmt: skip
    kept = results(tmp_path)
    for left in (["build/b", "build/c"], ["build/c"], []):
        run_all(cases, kept, monkeypatch)
        assert kept.pending([c.name for c in cases]) == left


def test_nothing_is_written_that_was_not_printed(tmp_path, capsys):
    kept = results(tmp_path)
    row = Row("fastft", 1.23456, ratio=1.5, memory=3 << 20, difference=0.02, floor_ms=1.0)
    report = Report([row], {"liger-kernel": "not installed"}, notes=["loss 2.01"])
    kept.record("bench-ops/x", "done", report.judge(BANDWIDTH), 2.0)
    printed = capsys.readouterr().out
    page = kept.path.with_suffix(".md").read_text()
    for cell in ("1.235", "1.50", "81%", "2.0e-02", "not run: liger-kernel: not installed",
                 "goal: 85% of copy bandwidth: missed", "loss 2.01"):  # fmt: skip
        assert cell in printed and cell in page
    assert "# A GPU" in page and "commit c0ffee" in page and "torch 2" in page
    kept.record("bench-ops/y", "skipped", Report(), 0.0, "not installed")
    results(tmp_path, id="newer", commit="beef").record("bench-ops/z", "done", Report(), 0.0)
    page = kept.path.with_suffix(".md").read_text()
    assert "Skipped, not installed (at c0ffee): y" in page and "**z** (at beef): done" in page


def test_without_a_gpu_nothing_goes_among_the_results():
    assert folder_for("cpu", None) == ROOT / "build" / "gpu"
    assert folder_for("cuda", None) == KEPT
    with pytest.raises(ValueError, match="without a GPU"):
        folder_for("cpu", str(KEPT / "deeper"))


def test_a_process_that_dies_costs_one_case(tmp_path, monkeypatch):
    """The parent's loop, with processes that run one case each and die in the second."""
    options = command.parser().parse_args(["--device=cpu", "--toy", "--minutes=1"])
    kept = results(tmp_path)
    names = ["build/a", "build/b", "build/c"]
    monkeypatch.setattr(command, "cases_of", lambda *a: [Case(n, None) for n in names])

    class Child:
        def __init__(self, arguments, cwd):
            name = kept.pending(names)[0]
            kept.begin(name)
            if name != "build/b":
                kept.record(name, "done", Report(), 0.0)

        def wait(self, timeout):
            return -11

    monkeypatch.setattr(command.subprocess, "Popen", Child)
    assert command.section_in_processes("build", options, kept) == []
    assert kept.failed(names) == ["build/b"]
    assert kept.load()["cases"]["build/b"]["why"] == "its process ended with -11"
    monkeypatch.setattr(Child, "__init__", lambda *a, **k: None)  # cannot even start
    other = results(tmp_path, id="other")
    assert command.section_in_processes("build", options, other) == names[1:]
    assert other.failed(names) == ["build/a"]


def test_a_section_from_end_to_end(tmp_path):
    arguments = ["--device=cpu", "--toy", "--section=bench-decode", f"--results={tmp_path}",
                 "--only=generate Llama-3-8B, 1 rows, LoRA", "--commit=c0ffee"]  # fmt: skip
    program = [sys.executable, "-m", "bench.gpu", *arguments]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("*.json")
    cases = json.loads(path.read_text())["cases"]
    assert list(cases) == ["bench-decode/rates", "bench-decode/generate Llama-3-8B, 1 rows, LoRA"]
    assert all(entry["status"] == "done" for entry in cases.values())
    again = subprocess.run(program, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0 and "== bench-decode" not in again.stdout


def test_the_floor_of_decoding_counts_what_a_pass_reads():
    for tied in (False, True):
        shape = dataclasses.replace(LLAMA_1B.here(HERE), tied=tied)
        work = decode.Decoding.of(HERE, shape, rows=3)
        layers = sum(m.weight.numel() for m in work.model.modules()
                     if isinstance(m, torch.nn.Linear)) - 320 * 64  # fmt: skip
        norms = 5 * 64
        assert decode.stored_bytes(work.model) == 2 * (layers + norms + 320 * 64)
        smaller = decode.quantized(4)(work.model)
        assert decode.stored_bytes(smaller) == layers * 9 // 16 + 2 * (norms + 320 * 64)
        # 3 rows that see 8, 9, 10 and 11 tokens; 2 layers of 2 key heads of 16, and the values.
        cache = 3 * 38 * 2 * 2 * 2 * 16 * 2
        assert work.floor(work.model).bytes == 4 * decode.stored_bytes(work.model) + cache


def test_every_case_has_its_own_name():
    for section in sections.SECTIONS:
        names = [case.name for case in sections.cases_of(section, HERE)]
        assert names and len(set(names)) == len(names)


def test_the_head_is_a_trained_models():
    """About 2 nats, and some tiles of the gradient that count and some that do not."""
    shape = dataclasses.replace(LLAMA_1B, tokens=512, hidden=1024, vocab=32_000)
    x, weight, labels = products.trained(Here("cpu", dtype=torch.float32), shape)
    loss = torch.nn.functional.cross_entropy(x @ weight.t(), labels)
    assert 1.5 <= loss <= 3.0
    told = products.told(x, weight, labels, None)
    assert 5 <= int(told.split("; ")[1].split("%")[0]) <= 95, told


def test_a_wrong_operator_is_found_before_it_is_timed(monkeypatch):
    right = products.lora
    monkeypatch.setattr(products, "lora", lambda x, layer: 1.2 * right(x, layer))
    session = Session(HERE, measure.CpuTimer(), RATES)
    with pytest.raises(AssertionError, match="from eager, allowed is 0.05"):
        products.lora_layer(session, LLAMA_1B, False)


def test_a_report_of_pytest_is_read(tmp_path):
    path = tmp_path / "report.xml"
    path.write_text(
        "<testsuites><testsuite><testcase name='a'/>"
        "<testcase name='b'><failure message='off by 2&#10;more'/></testcase>"
        "<testcase name='c'><skipped message='no expecttest'/></testcase></testsuite></testsuites>"
    )
    report, failures = sections.read_report(path)
    assert failures == ["b: off by 2"] and report.skipped == {"c": "no expecttest"}
    assert report.notes == ["1 of 3 passed, 1 skipped"]
