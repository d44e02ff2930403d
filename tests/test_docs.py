"""README.md and docs/: blocks run, links lead somewhere, formulas are those of the operators."""

import re
import shutil
import tomllib
from collections import Counter

import docs_pages as docs
import pytest
from docs_pages import NAMES, PAGES, ROOT, blocks

# Reasons for which blocks are not run, and how many: one more is to be seen here.
NOT_RUN = Counter(
    {
        "needs a GPU": 3,
        "it fetches a model of 98 MB": 1,
        "tests/test_gpu_bench.py runs it": 1,
    }
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    docs.tiny_models(folder)
    return folder


@pytest.fixture
def here(tiny, tmp_path, monkeypatch):
    """A folder of its own with the models that the pages name."""
    shutil.copytree(tiny, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_page(page, slow: bool):
    namespace = {"__name__": "__main__"}
    for block in blocks(page):
        if (block.runs or block.file) and (slow or not block.slow):
            docs.run(block, namespace)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_blocks_run(page, here):
    run_page(page, slow=False)


SLOW = [page for page in PAGES if any(block.slow for block in blocks(page))]


@pytest.mark.slow
@pytest.mark.parametrize("page", SLOW, ids=lambda page: page.name)
def test_blocks_run_with_the_slow_ones(page, here):
    run_page(page, slow=True)


def test_no_block_is_left_out():
    found = [block for page in PAGES for block in blocks(page)]
    for block in found:
        where = f"{block.page}:{block.line}"
        assert block.language in docs.LANGUAGES, f"{where}: {block.language!r}"
        data = block.language in ("csv", "json", "yaml")
        assert bool(block.file) == data, f"{where}: data is a file that other blocks read"
    assert Counter(block.not_run for block in found if block.not_run) == NOT_RUN


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_code_stands_in_fences(page):
    """Code that is only indented would escape the run."""
    before = ""
    for line in without_fences(page).splitlines():
        assert before or not line.startswith("    "), f"{page.name}: {line}"
        before = line.strip()


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    text = re.sub(r"[^\w\- ]", "", heading.lower().replace("`", ""))
    return text.strip().replace(" ", "-")


def without_fences(page) -> str:
    """The page's prose: no blocks of code, and no comments."""
    return re.sub(r"^```.*?^```$|<!--.*?-->", "", page.read_text(), flags=re.S | re.M)


def anchors(page) -> set[str]:
    return {slug(found) for found in re.findall(r"^#+ (.+)$", without_fences(page), re.M)}


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", without_fences(page)):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(file), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_files_that_are_named_exist(page):
    named = r"`((?:bench|csrc|docs|fastft|kernels|tests)/[\w/.-]+)`"
    for path in re.findall(named, without_fences(page)):
        assert (ROOT / path).exists(), f"{page.name}: {path}"


def test_every_page_is_reached_from_the_readme():
    text = (ROOT / "README.md").read_text()
    missing = [name for name in NAMES[1:] if f"({name})" not in text]
    assert not missing


KERNELS = ROOT / "docs" / "kernels.md"


def sections(page) -> dict[str, str]:
    """Heading -> what stands below it, up to the next heading."""
    parts = re.split(r"^#+ (.+)$", page.read_text(), flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def one_line(text: str) -> str:
    return " ".join(text.split())


def test_every_operator_has_a_section_and_every_kernel_a_link():
    operators = {path.stem for path in ROOT.glob("fastft/ops/*.py")} - {"__init__"}
    assert operators <= sections(KERNELS).keys()
    kernels = [
        *ROOT.glob("csrc/cpu/*.cpp"),
        *ROOT.glob("kernels/*/*.py"),
        *ROOT.glob("kernels/*/*.cu"),
    ]
    for path in kernels:
        if path.stem not in ("__init__", "common"):
            assert f"](../{path.relative_to(ROOT)})" in KERNELS.read_text(), path.name


def test_formulas_are_those_of_the_operators():
    found = 0
    for name, text in sections(KERNELS).items():
        for block in re.findall(r"^```text\n(.*?)^```$", text, re.S | re.M):
            source = one_line((ROOT / "fastft" / "ops" / f"{name}.py").read_text())
            for line in block.splitlines():
                assert one_line(line) in source, f"{name}: {line}"
                found += 1
    assert found > 40


def test_every_command_has_a_section():
    parser = docs.cli._parser()
    commands = next(a for a in parser._actions if a.dest == "command").choices
    assert commands.keys() <= sections(ROOT / "docs" / "command-line.md").keys()


def test_versions_are_those_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
    text = sections(ROOT / "docs" / "compatibility.md")["Versions"]
    rows = re.findall(r"^\| (\w+) \| ([\d.]*) ?\| ([\d.]*) ?\|", text, re.M)
    assert len(rows) >= 8
    for name, oldest, tested in rows:
        if name == "Python":
            assert project["requires-python"] == f">={oldest}"
        elif name == "torch":
            assert f"\nTORCH ?= torch=={tested}\n" in (ROOT / "Makefile").read_text()
        if name != "Python" and oldest:
            assert f"{name}>={oldest}" in listed
        if name not in ("Python", "torch", "triton"):
            assert f"{name}=={tested}" in listed


def test_numbers_stand_where_they_are_written_anew():
    """In regions of bench/report.py, which test_bench_compare.py holds to the files of results."""
    for name in ("README.md", "docs/results.md"):
        assert "<!-- bench:table" in (ROOT / name).read_text(), name


def test_pages_know_whether_a_gpu_has_been_measured():
    results = {path.name for path in ROOT.glob("bench/results/*.json")}
    measured = any(not name.startswith("ratios-") for name in results)  # only `make gpu` writes it
    for name in ("README.md", "docs/gpu.md"):
        text = one_line((ROOT / name).read_text())
        assert ("No GPU result is in here yet" in text) != measured, name
