"""What `make bench` keeps, compares and writes into the pages, on made-up ratios."""

import os
import subprocess
import sys

import pytest

from bench import compare, ratios, report
from bench.conftest import Row as Timed
from bench.conftest import Table
from bench.gpu.results import KEPT, ROOT
from bench.ratios import Ratios, Row, parse

RUN = {
    "date": "2026-01-01", "commit": "c0ffee", "processor": "A processor", "threads": 2,
    "versions": {"python": "3.11", "torch": "2.13.0"},
}  # fmt: skip


def found(*rows: Row, run="first", **changes) -> Ratios:
    kept = Ratios([], {})
    kept.add(rows, run, RUN | changes)
    return kept


def write(folder, name, kept):
    ratios.path_of(name, folder).write_text(kept.text())


@pytest.mark.parametrize(
    "before, now, falls", [(2.0, 1.78, 1), (2.0, 1.82, 0), (2.0, 3.0, 0), (3.2, 2.88, 0)]
)
def test_a_fall_is_more_than_a_tenth(tmp_path, before, now, falls, capsys):
    old, new = (found(Row("norm", "eager", ratio)) for ratio in (before, now))
    assert compare.compare(old, new)[1] == falls
    write(tmp_path, "old", old)
    write(tmp_path, "new", new)
    files = [str(ratios.path_of(name, tmp_path)) for name in ("old", "new")]
    assert compare.main(files) == falls
    assert ("FELL" in capsys.readouterr().out) == bool(falls)
    assert compare.main([*files, "--allowed", "0.2"]) == 0


def test_memory_is_a_ratio_too():
    old = found(Row("head", "eager", 2.0, memory=(1000.0, 50.0)))
    new = found(Row("head", "eager", 2.0, memory=(1000.0, 60.0)))
    lines, fallen = compare.compare(old, new)
    assert fallen == 1 and lines == [("head", "eager", "memory", "20.00", "16.67", "-17%", "FELL")]
    for pair in ((1000.0, 0.0), (1000.0, 31.0)), ((12.0, 50.0), (4.0, 50.0)):
        old, new = (found(Row("head", "a peer", 2.0, memory=memory)) for memory in pair)
        assert compare.compare(old, new) == ([], 0)  # a few MiB are chance


def test_what_is_missing_or_new_is_told_and_fails_nothing(capsys):
    both = Row("norm", "eager", 2.0)
    old = found(both, Row("gone", "eager", 3.0), Row("norm", "a peer", 1.0))
    new = found(both, Row("added", "eager", 0.5), processor="Another")
    assert compare.told("cpu", old, new) == 0
    text = capsys.readouterr().out
    told = [tuple(line.split()) for line in text.splitlines()]
    assert ("gone", "eager", "time", "3.00", "missing") in told
    assert ("norm", "a", "peer", "time", "1.00", "missing") in told
    assert ("added", "eager", "time", "0.50", "new") in told
    assert "cpu: 2 ratios, 3 not as before, 0 fell" in text
    assert "other processors: {'A processor'} before, {'Another'} now" in text


def test_files_are_held_against_the_committed_ones(monkeypatch, tmp_path, capsys):
    # In a hook of git these lead to the user's own repository; its settings may ask for a key.
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)

    def git(*command):
        subprocess.run(("git", "-c", "user.name=x", "-c", "user.email=x", *command),
                       cwd=tmp_path, check=True, capture_output=True)  # fmt: skip

    monkeypatch.setattr(compare, "ROOT", tmp_path)
    monkeypatch.setattr(compare, "KEPT", tmp_path)
    git("init")
    write(tmp_path, "cpu", found(Row("norm", "eager", 2.0)))
    git("add", ".")
    git("commit", "-m", "ratios")
    assert compare.main([]) == 0
    write(tmp_path, "cpu", found(Row("norm", "eager", 1.0)))
    write(tmp_path, "other", found(Row("norm", "eager", 1.0)))
    assert compare.main([]) == 1
    assert "ratios-other.json: not in HEAD" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        compare.main(["one"])


def test_a_run_replaces_what_it_measured_and_nothing_else():
    kept = found(Row("norm", "eager", 2.0), Row("rotary", "eager", 3.0, 1.5))
    again = Row("norm", "eager", 2.5, memory=(3.0, 1.0), at=("norms", "tokens", 8))
    kept.add([again, Row("norm", "a peer", 1.1)], "second", RUN | {"commit": "beef"})
    read = parse(kept.text())
    assert read == kept and kept.text().count("\n  {") == 3
    assert [(row.work, row.against, row.ratio, row.run) for row in read.rows] == [
        ("norm", "eager", 2.5, "second"),
        ("rotary", "eager", 3.0, "first"),
        ("norm", "a peer", 1.1, "second"),
    ]
    kept.add([Row("rotary", "eager", 3.0)], "second", RUN)
    assert list(kept.runs) == ["second"]


def test_no_time_is_kept_and_a_missing_peer_is_told():
    table = Table(
        [
            Timed("head", "eager", 2.0, 4.004, 400 << 20, 1.5, at=("head", "vocabulary", 8)),
            Timed("head", "fastft", 0.5, None, 100 << 20, note="1.20x its floor of 400.00 ms"),
            Timed("head", "a peer", note="not run: it is not installed"),
        ]
    )
    assert table.ratios() == [
        Row("head", "eager", 4.0, 1.5, (400.0, 100.0), ("head", "vocabulary", 8))
    ]
    lines = []
    table.print(lines.append)
    assert lines[1].split() == [
        "head",
        "eager",
        "2000.00",
        "ms",
        "4.00",
        "400.0",
        "MiB",
        "aim",
        "1.5",
    ]
    assert lines[3].split()[:4] == ["head", "a", "peer", "not"]


def test_a_processor_has_one_file(tmp_path, monkeypatch):
    first = ratios.machine(tmp_path)
    assert first.startswith("cpu-")
    write(tmp_path, "mine", found(Row("norm", "eager", 2.0), processor=ratios.processor()))
    assert ratios.machine(tmp_path) == "mine"
    write(tmp_path, "mine", found(Row("norm", "eager", 2.0)))
    write(tmp_path, first, found(Row("norm", "eager", 2.0)))
    with pytest.raises(ValueError, match=f"ratios-{first}.json is not of this processor"):
        ratios.machine(tmp_path)


def test_a_run_says_versions_and_threads_and_no_host(tmp_path):
    import platform

    path = tmp_path / "ratios-x.json"
    ratios.record([Row("norm", "eager", 2.0)], 2, path)
    (run,) = parse(path.read_text()).runs.values()
    assert run["threads"] == 2 and {"torch", "python"} <= set(run["versions"])
    assert platform.node() not in path.read_text()


PAGE = """# A page

<!-- bench:table cpu
norm*
*head*
-->
anything
<!-- /bench -->

The end.
"""
TABLE = """
| work | time, eager / fastft | time, others / fastft | peak extra memory, eager and fastft |
| --- | --- | --- | --- |
| norm | 2.0 |  |  |
| a head | 1.94 | a peer 0.96 (12 MiB) | 1,000 and 51 MiB |

<sub>A processor, 2 threads; torch 2.13.0; 2026-01-01 at c0ffee.</sub>

"""
ROWS = (
    Row("a head", "eager", 1.94, memory=(1000.0, 50.6)),
    Row("a head", "a peer", 0.96, memory=(12.0, 50.6)),
    Row("norm", "eager", 2.04),
    Row("rotary", "eager", 3.0),
)


def test_regions_are_rewritten_and_the_rest_stays(tmp_path):
    write(tmp_path, "cpu", found(*ROWS))
    page = tmp_path / "page.md"
    new = report.rewritten(PAGE, page, tmp_path)
    assert new == PAGE.replace("anything\n", TABLE)
    assert report.rewritten(new, page, tmp_path) == new


@pytest.mark.parametrize(
    "old, new, error",
    [
        ("norm*", "gone*", "no work is called 'gone"),
        ("norm*", "*", "no work is called '.*head.', or another pattern has it"),
        ("<!-- /bench -->", "", "1 regions begin and 0 end"),
        ("bench:table cpu", "bench:tables cpu", "bench:tables is none of table, speed, memory"),
        ("bench:table cpu\n", "bench:table\n", "of 1 regions 0 are written as"),
        ("bench:table", "bench:memory", "'norm' is no point of a plot of memory"),
    ],
)
def test_a_region_that_cannot_be_written_is_an_error(tmp_path, old, new, error):
    write(tmp_path, "cpu", found(*ROWS))
    with pytest.raises(ValueError, match=error):
        report.rewritten(PAGE.replace(old, new), tmp_path / "page.md", tmp_path, plots=True)


def test_plots_are_drawn_alike_each_time_and_linked_from_where_the_page_is(tmp_path):
    points = [Row(f"head {v}", "eager", 2.0, memory=(v / 8, v / 64), at=("head", "vocabulary", v))
              for v in (1024, 2048)]  # fmt: skip
    write(tmp_path, "cpu", found(*points, Row("norm", "eager", 12.5)))
    (tmp_path / "docs").mkdir()
    for kind in ("speed", "memory"):
        text = f"<!-- bench:{kind} cpu\nhead*\n-->\n<!-- /bench -->\n"
        page = tmp_path / "docs" / "page.md"
        new = report.rewritten(text, page, tmp_path, plots=True)
        assert f"](../{kind}-cpu.svg)" in new
        first = (tmp_path / f"{kind}-cpu.svg").read_text()
        report.rewritten(new, page, tmp_path, plots=True)
        assert (tmp_path / f"{kind}-cpu.svg").read_text() == first
        assert "12.5" not in first and (">2,048<" in first) == (kind == "memory")


@pytest.mark.parametrize("page", report.pages(), ids=lambda page: page.name)
def test_the_pages_say_what_is_committed(page):
    """If not, `python -m bench.report` writes them."""
    text = page.read_text()
    assert report.rewritten(text, page) == text
    for kind in report.PLOTS:
        for machine in (found["machine"] for found in report.REGION.finditer(text)
                        if found["kind"] == kind):  # fmt: skip
            assert (KEPT / f"{kind}-{machine}.svg").exists()


BENCH = """
from bench.gpu.case import Skip

def absent():
    raise Skip("it is not installed")

def bench_it(versus, told):
    calls = []
    sides = {name: lambda name=name: calls.append(name) for name in ("eager", "fastft")}
    versus("a work", sides, peers={"a peer": absent, "another": lambda: sides["eager"]})
    told("a work, the median", "eager", 1.5, 1.2)
    print("calls", *calls)
"""


@pytest.mark.slow
def test_a_bench_runs_without_its_peers(tmp_path):
    (tmp_path / "bench_it.py").write_text(BENCH)
    options = ("-s", "-p", "bench.conftest", "-c", "pyproject.toml", "--rootdir", ".", "--smoke")
    command = (sys.executable, "-m", "pytest", *options, tmp_path / "bench_it.py")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "calls eager fastft eager eager eager fastft" in done.stdout
    assert "not run: it is not installed" in done.stdout
    refused = subprocess.run((*command, "--record"), cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 4 and "--record would keep nothing true" in refused.stderr
