"""Random calls of every operator: some in each run of the tests, 100,000 in the long one."""

import pytest
from fuzz.operators import OPERATORS, run


@pytest.mark.parametrize("calls", [19 * 20, pytest.param(100_000, marks=pytest.mark.slow)])
def test_no_call_is_wrong_or_crashes(calls):
    failures = run(calls, 0, list(OPERATORS))
    assert not failures, "\n".join(f"{place}: {what}" for place, what in failures.items())
    for name in OPERATORS:  # all kinds of calls were made
        assert run.kinds[name, "exact"] and run.kinds[name, "refused"]
