"""`fastft train`: a model, data, a task and a method, from the settings to a run folder."""

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fastft.finetune import UserError, need
from fastft.finetune.config import LARGEST_SEED, Config, option

# Learning rates that people start from: the fewer weights a method trains, the larger. How six of
# them do on MiniLM and 800 reviews: `python -m bench.workflows --only sentiment`. There prompt had
# an accuracy of 0.675 at 3e-3, 0.663 at 1e-2 and 0.538 at 3e-2; lora 0.740 at 3e-4 and 0.788 at
# 1e-3; dora 0.730 at 3e-4, 0.790 at 1e-3 and 0.783 at 3e-3; ia3 0.703 at 5e-3, 0.728 at 1e-2, 0.695
# at 2e-2 and 0.723 at 5e-2; prefix 0.663 at 1e-3, 0.645 at 3e-3 and 0.690 at 1e-2.
Method = Literal[
    "full", "top-layers", "bitfit", "lora", "dora", "qlora", "adapter", "ia3", "prefix", "prompt"
]
LEARNING_RATES: dict[Method, float] = {
    "full": 5e-5,
    "top-layers": 1e-4,
    "bitfit": 1e-3,
    "lora": 3e-4,
    "dora": 3e-4,
    "qlora": 3e-4,
    "adapter": 5e-4,
    "ia3": 5e-3,
    "prefix": 1e-2,
    "prompt": 1e-2,
}


@dataclass(kw_only=True)
class TrainConfig(Config):
    """Fine-tunes a model on a file, or on a folder that `fastft prepare` wrote.

    fastft train --model all-MiniLM-L6-v2 --data reviews/ --task classify --method lora
    """

    model: str = option(help="hub name, local folder, run folder or adapter folder")
    data: str = option(help="a file, or a folder with train, validation and test files")
    task: Literal["classify", "ner", "lm", "sft"] = option(
        help="classify: a label a text; ner: a tag a word; lm: to continue texts; sft: to answer"
    )
    output: str = option("runs/train", help="the run's folder; must not exist yet")
    validation_data: str | None = option(None, help="a file to validate on")
    validation: float = option(
        0.1, least=0, most=0.9, help="share of the data held out where it has no validation file"
    )
    text_column: str | None = option(None, help="where texts are; default: text (ner: tokens)")
    label_column: str | None = option(None, help="where labels are; default: label (ner: tags)")
    multi_label: bool = option(False, help="classify: any number of labels per text")
    learn: Literal["completion", "assistant", "all"] = option(
        "completion", help="sft: what is learned: the last answer, every answer, or every token"
    )
    max_length: int | None = option(
        None, least=4, help="tokens per example; default: the model's, at most 512 (lm, sft: 1024)"
    )
    packing: bool | None = option(
        None, help="lm, sft: fill every row with several texts; default: where the method allows it"
    )

    method: Method = option(
        "full", help="which weights are trained: all, a part, or an adapter beside them"
    )
    rank: int = option(8, least=1, help="lora, dora, qlora: rank of the low-rank update")
    lora_alpha: float = option(
        16.0, above=0, help="lora, dora, qlora: the update is scaled by alpha / rank"
    )
    lora_dropout: float = option(
        0.0, least=0, most=0.95, help="lora, dora, qlora: dropout before the update"
    )
    target_modules: list[str] | None = option(
        None,
        help="lora, dora, qlora, ia3, adapter: names of the layers; default: the method's choice",
    )
    top_layers: int = option(2, least=0, help="top-layers: how many are trained, beside the head")
    virtual_tokens: int = option(20, least=1, help="prompt, prefix: how many are learned")
    bottleneck: int = option(64, least=1, help="adapter: width of its hidden layer")

    epochs: float = option(3.0, above=0, help="passes over the data")
    steps: int | None = option(None, least=1, help="optimizer steps, instead of epochs")
    batch_size: int = option(16, least=1, help="examples per device and forward pass")
    gradient_accumulation: int = option(1, least=1, help="forward passes per optimizer step")
    learning_rate: float | None = option(
        None, above=0, help="of the optimizer; default: by method, 5e-5 (full) to 1e-2 (prompt)"
    )
    schedule: Literal["linear", "cosine", "constant", "constant_with_warmup"] = option(
        "linear", help="how the learning rate goes on after the warmup"
    )
    warmup: float = option(
        0.1, least=0, help="steps in which the learning rate rises; below 1, their share of all"
    )
    weight_decay: float = option(
        0.0, least=0, help="of AdamW: how strongly weights are pulled to zero"
    )
    max_grad_norm: float = option(
        1.0, least=0, help="gradients of a larger norm are scaled down to it; 0: never"
    )
    dropout: float | None = option(
        None, least=0, most=0.95, help="all dropout probabilities of the model; default: its own"
    )
    class_weights: Literal["none", "balanced"] = option(
        "none", help="classify, ner: balanced gives rare classes more weight"
    )
    label_smoothing: float = option(
        0.0, least=0, most=0.95, help="share of an example that counts for all labels"
    )
    focal_gamma: float = option(
        0.0, least=0, help="classify, ner: easy examples count less; 0: all alike"
    )

    old_data: list[str] | None = option(
        None, help="what the model was trained on before: files or folders, for replay and ewc"
    )
    replay: float = option(
        0.0, least=0, most=0.95, help="share of the rows trained on that are old ones"
    )
    ewc: float = option(
        # Tried on the language model of bench/workflows.py: of what plain training forgets, 30
        # keeps half, and 1e4 nearly all, but learns little of the new.
        0.0,
        least=0,
        help="pull to the old weights, each by how much the old data needs it; try 100 to 1000",
    )
    ewc_rows: int = option(200, least=1, help="ewc: old rows by which the need is measured")
    distill: float = option(0.0, least=0, help="pull to what the model said before; try 1")
    temperature: float = option(2.0, above=0, help="distill: above 1, unlikely classes count more")
    adapter_name: str | None = option(
        None, help="a new adapter of this name, beside those that the model's folder has"
    )

    precision: Literal["float32", "bf16", "fp16"] = option(
        "float32", help="bf16, fp16: mixed precision, by autocast"
    )
    gradient_checkpointing: bool = option(
        False, help="compute activations twice: slower, less memory"
    )

    evaluate_every: int | None = option(
        None, least=1, help="in optimizer steps; default: every epoch"
    )
    early_stopping: int = option(
        0, least=0, help="evaluations without improvement before it stops; 0: never"
    )
    best: bool = option(True, help="end with the best checkpoint rather than the last")
    folds: int = option(0, least=0, help="k-fold cross-validation; 0: none")
    seed: int = option(
        0, least=0, most=LARGEST_SEED, help="new weights, dropout and order are drawn by it"
    )
    seeds: list[int] | None = option(
        None, least=0, most=LARGEST_SEED, help="one run for each, with mean and deviation"
    )
    resume: bool = option(False, help="go on with the run in the output folder")
    dry_run: bool = option(False, help="show settings, examples and estimates; train nothing")
    patch: bool = option(True, help="train with fastft's kernels")
    base_weights: Literal["none", "int8", "fp8"] = option(
        "none", help="frozen layers hold eight bits, fp8 on GPUs (lora, prompt, prefix and ia3)"
    )
    threads: int | None = option(None, least=1, help="of the CPU; default: PyTorch's choice")
    logging_steps: int = option(10, least=1, help="steps between two points of the curves")
    report_to: list[str] = option(
        ["none"], help="where curves are sent, as in Trainer: tensorboard, …"
    )
    fsdp: bool = option(False, help="shard over the processes of torchrun (FSDP2)")
    deepspeed: str | None = option(None, help="a DeepSpeed configuration file")

    def check(self) -> None:
        if self.folds == 1:
            raise UserError("folds: expected at least 2, or 0 for none")
        if self.folds and self.seeds:
            raise UserError("folds and seeds: one of them at a time")
        if self.seeds is not None and len(set(self.seeds)) != len(self.seeds):
            raise UserError("seeds: every one once")
        labelled = self.task in ("classify", "ner")
        for name in ("class_weights", "focal_gamma"):
            if not labelled and getattr(self, name) not in ("none", 0.0):
                raise UserError(f"{name}: only for the tasks classify and ner")
        if self.multi_label and self.task != "classify":
            raise UserError("multi_label: only for the task classify")
        if self.base_weights != "none" and not self.patch:
            raise UserError("base_weights: fastft's kernels are needed, but patch is off")
        if self.base_weights != "none" and self.method not in ("lora", "prompt", "prefix", "ia3"):
            raise UserError(f"base_weights: not with the method {self.method}")
        self._check_continual()
        if self.fsdp and self.deepspeed:
            raise UserError("fsdp and deepspeed: one of them at a time")

    def _check_continual(self) -> None:
        if (self.replay or self.ewc) and not self.old_data:
            raise UserError("replay and ewc: old_data names what the model was trained on before")
        if self.old_data and not (self.replay or self.ewc):
            raise UserError("old_data: what for? set replay or ewc")
        if (self.ewc or self.distill) and (self.fsdp or self.deepspeed):
            raise UserError("ewc and distill need whole weights: not with fsdp or deepspeed")
        if self.adapter_name is None:
            return
        if Path(self.adapter_name).name != self.adapter_name or self.adapter_name == "..":
            raise UserError(f"adapter_name: {self.adapter_name!r} is no folder's name")
        if self.method in ("full", "top-layers", "bitfit"):
            raise UserError(f"adapter_name: the method {self.method} trains no adapter")
        if self.fsdp:
            raise UserError("adapter_name: not with fsdp")
        if self.ewc or self.distill:
            raise UserError("adapter_name: a new adapter forgets nothing; leave ewc and distill")

    @property
    def continues(self) -> bool:
        """Whether what the model was trained for before is to be kept, its classes too."""
        return bool(self.replay or self.ewc or self.distill)

    @property
    def rate(self) -> float:
        """The learning rate, the method's own where none was given."""
        return self.learning_rate or LEARNING_RATES[self.method]


@dataclass(frozen=True)
class RunResult:
    """What a run gave. model: the trained weights, as load_model and from_pretrained read them."""

    folder: Path
    metrics: dict[str, Any]
    model: Path | None = None
    runs: list["RunResult"] = field(default_factory=list)  # of each fold or seed


def train(config: TrainConfig) -> RunResult:
    """Fine-tunes as config says; prints a final table and fills the folder config.output.

    With folds or seeds one run each, and their mean and deviation. With dry_run nothing is trained
    or written: settings, three examples with their label mask, and estimates are printed.

    Raises: UserError for what the user can put right, before anything is written; KeyboardInterrupt
        after Ctrl-C, once the step is finished and kept for resume.
    """
    need("transformers", "fine-tuning")
    need("datasets", "fine-tuning")
    need("accelerate", "fine-tuning")
    import torch

    from fastft.finetune import assets, dry_run, examples, repeats, run_folder, running

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if not config.dry_run:
        run_folder.check(config)
    rows = examples.read(config)
    if config.dry_run:
        return dry_run.show(config, rows)
    try:
        if config.folds or config.seeds:
            return repeats.run(config, rows)
        prepared = running.prepare(config, rows)
        return running.run(prepared, run_folder.start(config, examples.files(config)))
    except KeyboardInterrupt:
        kept = run_folder.RunFolder(config.output).settings
        if kept.is_file():
            assets.say(f"kept: `fastft train {shlex.quote(str(kept))} --resume` goes on")
        raise
