"""Work in a process of its own, whose peak memory is that work's alone."""

import json
import subprocess
import sys
from typing import Any


def run(module: str, order: dict[str, Any]) -> dict[str, Any]:
    """`python -m module ORDER`, order as JSON; gives its last line of stdout, which is JSON too.

    Raises: RuntimeError with what it said, where it failed.
    """
    done = subprocess.run(
        [sys.executable, "-m", module, json.dumps(order)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        # Ctrl-C reaches this process alone, which then ends the other.
        start_new_session=True,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{module} {order} failed:\n{done.stderr}")
    out: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return out
