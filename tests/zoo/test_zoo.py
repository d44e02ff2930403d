"""Every architecture of the installed transformers: whatever is swapped in it must be right.

pytest tests/zoo -m slow        # all of them, some minutes
python -m tests.zoo             # the same, and writes docs/architectures.md
"""

import pytest

from tests.zoo.check import journey, time_limit
from tests.zoo.tiny import cases

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
        journey(case)


def test_skips_are_of_cases():
    from tests.zoo.tiny import OWN, SKIPPED

    known = {c.name for c in cases()} | {c.model_type for c in cases()}
    assert set(SKIPPED) | set(OWN) <= known
