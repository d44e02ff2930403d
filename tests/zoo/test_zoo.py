"""Every architecture of the installed transformers: whatever is swapped in it must be right, and
docs/architectures.md tell what was.

pytest tests/zoo -m slow        # all of them, some minutes
python -m tests.zoo             # the same, and writes the page
"""

import pytest
import transformers

from tests.zoo.__main__ import PAGE, row, told
from tests.zoo.check import journey, time_limit
from tests.zoo.tiny import OWN, SKIPPED, cases

# One of every way to go: what is packed, declined, decoded layer by layer or by modules.
QUICK = {
    "llama-causal", "gpt2-causal", "gemma2-causal", "mixtral-causal", "bert-causal", "phi-causal",
    "deepseek_v3-causal", "lfm2-causal", "bert-sequence", "modernbert-token", "bart-sequence",
    "hy_v4-causal",
}  # fmt: skip


def _marks(case):
    return [] if case.name in QUICK else [pytest.mark.slow]


@pytest.mark.parametrize("case", [pytest.param(c, id=c.name, marks=_marks(c)) for c in cases()])
def test_patched_is_the_same(case):
    if case.skipped:
        pytest.skip(case.skipped)
    with time_limit(60):
        found = journey(case)
    page = PAGE.read_text()
    if f"of transformers {transformers.__version__} " in page:
        assert row(case, "right", found.operators, told(found)) in page.splitlines()


def test_names_are_of_cases():
    known = {c.name for c in cases()}
    assert known >= QUICK
    assert set(SKIPPED) | set(OWN) <= known | {c.model_type for c in cases()}
