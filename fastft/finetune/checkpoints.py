"""Training that may end at any moment, and goes on as if it had not.

A checkpoint is whole, with all of it on the disk, or it does not count; older ones go once a newer
one is. Weights, optimizer, order of the data and random numbers are in it, so that what comes after
is bit for bit what would have come.
"""

import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainerState

from fastft.finetune.run_folder import WHOLE, RunFolder, processes, readable, sync


def fit(trainer: Trainer, folder: RunFolder, resume: bool) -> None:
    """Trains to the end, or to a Ctrl-C or SIGTERM: then the step is finished and kept for resume.

    Several processes end at once instead, and go on from their last checkpoint.
    Raises: KeyboardInterrupt after one; UserError for a full disk.
    """
    last = folder.last_checkpoint() if resume else None
    watch = _Interrupted()
    keeper = Keeper(folder, trainer)
    trainer.add_callback(watch)
    trainer.add_callback(keeper)  # after what asks for a checkpoint
    listening = watch.listening() if trainer.args.world_size == 1 else nullcontext()
    with readable(str(folder.path)), listening:
        if last is not None and keeper.ended(state := _state(last)):
            _load(trainer, keeper, last, state)
        else:
            trainer.train(resume_from_checkpoint=None if last is None else str(last))
    trainer.remove_callback(watch)
    trainer.remove_callback(keeper)
    if watch.asked:
        raise KeyboardInterrupt


def mean_loss(log: list[dict[str, Any]]) -> float | None:
    """The mean over all steps of a log; Trainer's own leaves out those before resuming."""
    total, before = 0.0, 0
    for entry in log:
        if "loss" in entry:
            total += entry["loss"] * (entry["step"] - before)
            before = entry["step"]
    return total / before if before else None


class Keeper(TrainerCallback):
    """Marks checkpoints that are whole, removes older ones, and gives back what Trainer forgets."""

    def __init__(self, folder: RunFolder, trainer: Trainer) -> None:
        self.folder = folder
        callbacks = trainer.callback_handler.callbacks
        self.stopping = next((c for c in callbacks if isinstance(c, EarlyStoppingCallback)), None)

    def ended(self, state: TrainerState) -> bool:
        """Whether training was through when this was saved."""
        if state.global_step >= state.max_steps:
            return True
        stopping = self.stopping
        return stopping is not None and (
            _without_improvement(state) >= stopping.early_stopping_patience
        )

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if not state.global_step:
            return
        if self.stopping is not None:
            # Trainer's own way restores its stop as well, and a Ctrl-C is one.
            self.stopping.early_stopping_patience_counter = _without_improvement(state)
        # The run's folder may have been moved.
        best = self.best(state)
        state.best_model_checkpoint = None if best is None else str(best)

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        # Losses that are summed but not logged yet are in no checkpoint.
        control.should_log |= control.should_save

    on_epoch_end = on_step_end

    def on_save(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        processes().wait_for_everyone()  # each has written its part
        if not state.is_world_process_zero:
            return
        newest = self.folder.checkpoints / f"checkpoint-{state.global_step}"
        sync(newest)
        (newest / WHOLE).touch()
        sync(self.folder.checkpoints)
        for other in self.folder.checkpoints.glob("checkpoint-*"):
            if other not in (newest, self.best(state)):
                (other / WHOLE).unlink(missing_ok=True)
                shutil.rmtree(other)

    def best(self, state: TrainerState) -> Path | None:
        best = self.folder.checkpoints / f"checkpoint-{state.best_global_step}"
        return best if state.best_global_step and (best / WHOLE).is_file() else None


class _Loaded(Exception):
    """Nothing is left to train."""


class _LoadOnly(TrainerCallback):
    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        raise _Loaded


def _load(trainer: Trainer, keeper: Keeper, last: Path, state: TrainerState) -> None:
    """What training ended with; resumed there, Trainer would make one step more."""
    best = keeper.best(state) if trainer.args.load_best_model_at_end else None
    stop = _LoadOnly()
    trainer.add_callback(stop)
    try:
        trainer.train(resume_from_checkpoint=str(best or last))
    except _Loaded:
        trainer.is_in_train = False
    trainer.remove_callback(stop)
    trainer.state = state


def _state(checkpoint: Path) -> TrainerState:
    out: TrainerState = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    return out


def _without_improvement(state: TrainerState) -> int:
    callbacks: Any = state.stateful_callbacks  # a dictionary, once it was saved
    attributes = callbacks.get("EarlyStoppingCallback", {}).get("attributes", {})
    return int(attributes.get("early_stopping_patience_counter", 0))


class _Interrupted(TrainerCallback):
    """Ctrl-C or SIGTERM ends training after the step, with a checkpoint; a second one at once."""

    asked = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread may listen
            return
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = [signal.signal(number, self._ask) for number in numbers]
        try:
            yield
        finally:
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if self.asked:
            control.should_save = control.should_training_stop = True
