"""Fine-tuning: thin glue over the libraries users know, with the models patched.

Every command is a function here: `fastft.finetune.train(TrainConfig(...))`.
"""

# A command's function has its module's name. Importing a submodule binds its name here once, when
# it is first imported, so importing the functions now settles it for good. That is cheap: the
# modules of commands import the libraries they need when they run.
from fastft.finetune.errors import UserError, need
from fastft.finetune.evaluate import EvaluateConfig, EvaluateResult, evaluate
from fastft.finetune.generating import GenerateConfig, GenerateResult, generate
from fastft.finetune.search import SearchConfig, SearchResult, search
from fastft.finetune.train import RunResult, TrainConfig, train

__all__ = [
    "EvaluateConfig",
    "EvaluateResult",
    "GenerateConfig",
    "GenerateResult",
    "RunResult",
    "SearchConfig",
    "SearchResult",
    "TrainConfig",
    "UserError",
    "evaluate",
    "generate",
    "need",
    "search",
    "train",
]
