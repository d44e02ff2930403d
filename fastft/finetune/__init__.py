"""Fine-tuning: thin glue over the libraries users know, with the models patched.

Every command is a function here: `fastft.finetune.train(TrainConfig(...))`.
"""

# What all of them import from here.
from fastft.finetune.errors import UserError, need

# isort: split
# A command's function has its module's name. Importing a submodule binds its name here once, when
# it is first imported, so importing the functions now settles it for good. That is cheap: the
# modules of commands import the libraries they need when they run.
from fastft.finetune.bench import BenchConfig, BenchResult, bench
from fastft.finetune.evaluate import EvaluateConfig, EvaluateResult, evaluate
from fastft.finetune.generating import GenerateConfig, GenerateResult, generate
from fastft.finetune.merge import MergeConfig, MergeResult, merge
from fastft.finetune.prepare import PrepareConfig, PrepareResult, prepare
from fastft.finetune.search import SearchConfig, SearchResult, search
from fastft.finetune.train import RunResult, TrainConfig, train

__all__ = [
    "BenchConfig",
    "BenchResult",
    "EvaluateConfig",
    "EvaluateResult",
    "GenerateConfig",
    "GenerateResult",
    "MergeConfig",
    "MergeResult",
    "PrepareConfig",
    "PrepareResult",
    "RunResult",
    "SearchConfig",
    "SearchResult",
    "TrainConfig",
    "UserError",
    "bench",
    "evaluate",
    "generate",
    "merge",
    "need",
    "prepare",
    "search",
    "train",
]
