"""Fine-tuning: thin glue over the libraries users know, with the models patched.

Every command is a function here: `fastft.finetune.train(TrainConfig(...))`.
"""

# A command's function has its module's name. Importing a submodule binds its name here once, when
# it is first imported, so importing the functions now settles it for good. That is cheap: the
# modules of commands import the libraries they need when they run.
from fastft.finetune.errors import UserError, need
from fastft.finetune.merge import MergeConfig, merge
from fastft.finetune.prepare import PrepareConfig, prepare
from fastft.finetune.train import RunResult, TrainConfig, train

__all__ = [
    "MergeConfig",
    "PrepareConfig",
    "RunResult",
    "TrainConfig",
    "UserError",
    "merge",
    "need",
    "prepare",
    "train",
]
