"""The Trainer of a run: transformers' own, from our settings, with the task's collator and loss."""

from collections.abc import Callable


def build_trainer(config, model, tokenizer, datasets: dict, loss: Callable | None = None, **more):
    """A transformers.Trainer, ready for `.train()`; nothing is written before that.

    Args:
        config: a TrainConfig.
        model: from loading.load_model and methods.apply; patched or not.
        tokenizer: from loading.load_tokenizer.
        datasets: {"train": ..., "validation": ... or absent}, encoded by the task.
        loss: (outputs, labels, num_items_in_batch=None) -> scalar instead of the task's own.
        more: given to Trainer's constructor over what is chosen here (callbacks, args, ...).
    """
    raise NotImplementedError
