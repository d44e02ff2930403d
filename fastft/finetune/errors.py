"""What the user can put right, and parts that are not installed."""

import importlib
from types import ModuleType


class UserError(Exception):
    """Something the user can put right; commands print it without a traceback, exit code 2."""


def need(module: str, what_for: str) -> ModuleType:
    """A module of the optional dependencies; UserError with what to install where it is missing."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as missing:
        if missing.name != module.partition(".")[0]:
            raise
        raise UserError(
            f"{what_for} needs {missing.name}: pip install 'fastft[finetune]'"
        ) from None
