"""What a model learns, one module per task.

Each has encode, collator, names (of the classes, or None), metrics (for Trainer, or None), BEST
(the metric that chooses the best checkpoint) and TEXT, LABEL (the columns it reads by default).
"""

import importlib
from types import ModuleType

TASKS = ("classify", "ner", "lm", "sft")


def of(name: str) -> ModuleType:
    """The module of the task called name."""
    return importlib.import_module(f"fastft.finetune.tasks.{name}")
