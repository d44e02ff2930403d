"""`fastft bench`: what patching gives on this machine, for the user's own model and data."""

import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from fastft.finetune import UserError, need, table
from fastft.finetune.config import Config, option
from fastft.finetune.train import Method

Work = Literal["train", "predict", "decode"]
SIDES = ("eager", "patched")


@dataclass(kw_only=True)
class BenchConfig(Config):
    """Times a model on this machine, as transformers and PEFT run it and patched by fastft.

    Both sides have the same weights and take turns on the same batches, after their results were
    compared. The ratio is the median of the turns'; memory is the peak of a process of its own.

    fastft bench
    fastft bench --model bert-base-uncased --data reviews.csv --task classify --method full
    fastft bench --model runs/chat --data chats.jsonl --work decode --decode-weights int8
    """

    model: str = option("SmolLM2-135M-Instruct", "hub name, local folder or adapter folder")
    data: str = option("alpaca", "a file, or a folder with a train file, as train reads it")
    task: Literal["classify", "ner", "lm", "sft"] = option("sft", "what the data is for")
    work: list[Work] | None = option(
        None, "what is timed: train (a step), predict (without gradients), decode (one row, "
        "greedy); default: train and, of lm and sft, decode, of the others predict"
    )  # fmt: skip
    method: Method = option("lora", "which weights are trained, as in train")
    rank: int = option(8, "lora, dora, qlora: rank of the update", least=1)
    batch_size: int = option(8, "examples of a step", least=1)
    max_length: int | None = option(
        None, "tokens per row; default: the model's, at most 256", least=4
    )
    packing: bool = option(False, "lm, sft: fill every row with several texts")
    text_column: str | None = option(None, "where texts are; default: text (ner: tokens)")
    label_column: str | None = option(None, "where labels are; default: label (ner: tags)")
    multi_label: bool = option(False, "classify: any number of labels per text")
    precision: Literal["float32", "bf16"] = option("float32", "bf16: mixed precision, as in train")
    base_weights: Literal["none", "int8", "fp8"] = option(
        "none", "the patched side holds frozen layers in eight bits, as in train"
    )
    decode_weights: Literal["none", "int8", "int4", "int4_g64"] = option(
        "none", "copies of the weights that the patched side decodes by, as in generate"
    )
    new_tokens: int = option(64, "decode: tokens of an answer", least=2)
    rounds: int = option(5, "turns that are timed, after one that warms up", least=1)
    memory: bool = option(True, "measure peak memory too, which loads the model anew for each")
    seed: int = option(0, "new weights and the choice of rows are drawn by it", least=0)
    threads: int | None = option(None, "of the CPU; default: PyTorch's choice", least=1)
    output: str | None = option(None, "a JSON file of all numbers; must not exist yet")

    def check(self) -> None:
        if self.task in ("classify", "ner"):
            if "decode" in self.works:
                raise UserError(f"work: decode is for language models, not for {self.task}")
            if self.packing:
                raise UserError("packing: only for the tasks lm and sft")
            if self.decode_weights != "none":
                raise UserError("decode_weights: only for the tasks lm and sft")
        if self.base_weights == "fp8" and self.decode_weights != "none":
            raise UserError("decode_weights: fastft does not decode over an fp8 base")

    @property
    def works(self) -> list[str]:
        """What is timed, each once."""
        usual = ["train", "decode" if self.task in ("lm", "sft") else "predict"]
        return list(dict.fromkeys(self.work or usual))


@dataclass(frozen=True)
class BenchResult:
    """metrics: by work the seconds of each side's turns, their ratio, memory and agreement."""

    metrics: dict[str, Any]
    output: Path | None = None


def bench(config: BenchConfig) -> BenchResult:
    """Compares both sides' results, then times them; prints a table.

    Raises: UserError, also where results differ by more than their type explains: then nothing is
    timed.
    """
    need("transformers", "bench")
    need("datasets", "bench")
    import torch

    from fastft.finetune import assets, bench_works, fresh

    target = None if config.output is None else Path(config.output).expanduser()
    if target is not None and target.exists():
        raise UserError(f"{target}: exists already; --output names another file")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    material = bench_works.load(config)
    assets.say("comparing results")
    agreement = bench_works.compare(material, config)
    models, report = bench_works.sides(material, config)
    metrics: dict[str, Any] = {
        "settings": asdict(config),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "tokens": [int(batch["attention_mask"].sum()) for batch in material.batches[1:]],
        "places": [batch["input_ids"].numel() for batch in material.batches[1:]],
        "patch": report,
        "agreement": agreement,
        "works": {},
    }
    # Training last: it changes the weights, on each side by other roundings.
    for work in sorted(config.works, key=lambda work: work == "train"):
        assets.say(f"timing {work}")
        metrics["works"][work] = bench_works.in_turns(models, material, config, work)
    del models, material
    if config.memory:
        for work, found in metrics["works"].items():
            assets.say(f"peak memory of {work}")
            order = {"settings": asdict(config), "work": work}
            found["memory"] = {
                side: fresh.run("fastft.finetune.bench_works", order | {"side": side})
                for side in SIDES
            }
    if target is not None:
        from fastft.finetune.run_folder import RunFolder

        target.parent.mkdir(parents=True, exist_ok=True)
        RunFolder(target.parent).write_json(target.name, metrics)
    print(text(metrics))
    return BenchResult(metrics, target)


def text(metrics: dict[str, Any]) -> str:
    """The table, and what was compared."""
    rows = [["", "eager", "fastft", "ratio", "MB, eager", "MB, fastft"]]
    for work, found in metrics["works"].items():
        seconds = [f"{statistics.median(found['seconds'][side]):.3g} s" for side in SIDES]
        memory = [found.get("memory", {}).get(side, {}).get("peak") for side in SIDES]
        megabytes = ["" if peak is None else f"{peak / 2**20:.0f}" for peak in memory]
        rows.append([work, *seconds, f"{found['ratio']:.2f}", *megabytes])
    settings, tokens, places = (metrics[name] for name in ("settings", "tokens", "places"))
    lines = [table.text(rows), ""]
    if {"train", "predict"} & metrics["works"].keys():
        lines.append(
            f"train, predict: {settings['method']}, {settings['batch_size']} rows, "
            f"{statistics.fmean(tokens):.0f} tokens padded to {statistics.fmean(places):.0f}"
        )
    if "decode" in metrics["works"]:
        lines.append(f"decode: {settings['new_tokens']} tokens, greedy, 1 row")
    lines += [f"{name}: {value:.1e}" for name, value in metrics["agreement"].items()]
    lines.append(
        f"torch {metrics['torch']}, {metrics['threads']} threads, {settings['rounds']} rounds"
    )
    return "\n".join(lines)
