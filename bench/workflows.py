"""What each workflow of the command line gives on real models and data, and what it costs.

`python -m bench.workflows` runs them all on the CPU, `--only NAME ...` some.
Every number comes from a command as a user would type it (`fastft train ...`), in a process of its
own, by the defaults of the settings wherever the section names no other. The tables go to
bench/results/workflows-cpu.md, each under its section, and what is not run anew stays there.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

from bench.workflow_data import news, reviews, small_gpt2, texts, write

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench/results/workflows-cpu.md"
THREADS = 2  # of each command; --threads 1 where others compute too: a team of two waits spinning
MINILM, SMOLLM = "all-MiniLM-L6-v2", "SmolLM2-135M-Instruct"


def fastft(command: str, output: Path, **settings) -> dict:
    """Runs `fastft command` with settings as flags; gives its metrics.json."""
    flags = ["--output", str(output), "--threads", str(THREADS)]
    for name, value in settings.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            flags.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            values = value if isinstance(value, list) else [value]
            flags += [flag, *map(str, values)]
    run = [sys.executable, "-m", "fastft", command, *flags]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(run)}\n{done.stderr[-3000:]}")
    beside = output.with_suffix(".metrics.json") if output.suffix else output / "metrics.json"
    return json.loads(beside.read_text())


def table(rows: Sequence[Sequence]) -> str:
    """Rows as a Markdown table, the first its head."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def sentiment(work: Path) -> str:
    data = reviews(work / "data", train=800, test=400)
    rows = [("method", "accuracy", "F1", "seconds", "peak memory", "trained parameters")]
    for method in ("full", "lora", "adapter", "prompt", "bitfit", "top-layers"):
        found = fastft(
            "train", work / method, model=MINILM, data=data, task="classify", method=method,
            epochs=2, validation=0,
        )  # fmt: skip
        test = found["test"]
        rows.append((
            method, f"{test['accuracy']:.3f}", f"{test['f1_macro']:.3f}",
            f"{found['seconds']:.0f}", f"{found['peak_memory_bytes'] / 2**20:.0f} MB",
            f"{found['parameters']['trainable']:,} of {found['parameters']['all']:,}",
        ))  # fmt: skip
    return (
        f"Rotten Tomatoes, {MINILM}: `fastft train --task classify --method ...`, 800 reviews for "
        "training, 400 for the test, 2 epochs; the learning rate is the default of the method. "
        "Guessing gives 0.5; one deviation of the test's sampling is 0.023.\n\n" + table(rows)
    )


def entities(work: Path) -> str:
    from fastft.finetune import assets, labelled

    source = Path(assets.dataset("conll2003"))
    for part, count in (("train", 1000), ("test", 500)):
        sentences = labelled.read_conll(source / f"{part}.txt")[:count]
        write(work / f"data/{part}.jsonl", ({"tokens": w, "tags": t} for w, t in sentences))
    found = fastft(
        "train", work / "full", model=MINILM, data=work / "data", task="ner", method="full",
        epochs=3, validation=0,
    )  # fmt: skip
    scores = (found["test"][f"{name}_micro"] for name in ("precision", "recall", "f1"))
    rows = [
        ("method", "precision", "recall", "entity F1", "seconds", "peak memory"),
        ("full", *(f"{score:.3f}" for score in scores), f"{found['seconds']:.0f}",
         f"{found['peak_memory_bytes'] / 2**20:.0f} MB"),
    ]  # fmt: skip
    return (
        f"CoNLL-2003, {MINILM} (uncased): `fastft train --task ner`, the first 1000 sentences for "
        "training, the first 500 of the test, 3 epochs; seqeval's scores.\n\n" + table(rows)
    )


def instructions(work: Path) -> str:
    from fastft.finetune import assets, data

    records = data.read_alpaca(assets.dataset("alpaca"))
    records = [records[i] for i in data.shuffled(len(records), 0)][:300]
    write(work / "data/train.jsonl", records[50:])
    held = write(work / "data/test.jsonl", records[:50])
    trained = fastft(
        "train", work / "lora", model=SMOLLM, data=work / "data", task="sft", method="lora",
        epochs=1, batch_size=2, max_length=512, validation=0,
    )  # fmt: skip
    scores = fastft(
        "evaluate", work / "scores", model=work / "lora", base=SMOLLM, data=held, batch_size=8,
    )["scores"]  # fmt: skip
    asked = [record for record in records[:50] if not record.get("input")][:3]
    prompts = write(work / "asked.jsonl", asked)
    rows = [("question", "before", "after")]
    answers = []
    for name, model in (("before", SMOLLM), ("after", work / "lora")):
        output = work / f"{name}.jsonl"
        fastft("generate", output, model=model, prompts=prompts, max_new_tokens=40)
        answers.append([json.loads(line)["completion"] for line in output.open()])
    for record, *both in zip(asked, *answers, strict=True):
        rows.append(tuple(cell(text) for text in (record["instruction"], *both)))
    before, after = (found[str(held)] for found in scores.values())
    numbers = [
        ("", "before", "after"),
        *((f"held-out {n}", f"{before[n]:.3f}", f"{after[n]:.3f}") for n in ("loss", "perplexity")),
    ]
    return (
        f"Alpaca, {SMOLLM}: `fastft train --task sft --method lora`, {len(records) - 50} "
        f"conversations, one epoch of {trained['steps']} steps in {trained['seconds']:.0f} s, "
        f"{trained['peak_memory_bytes'] / 2**20:.0f} MB; the loss is of the answers of 50 others "
        "(`fastft evaluate --base`). Answers: greedy, 40 tokens at most.\n\n"
        f"{table(numbers)}\n\n{table(rows)}"
    )


def cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def language(work: Path) -> str:
    text = texts(work / "data")
    model = small_gpt2(work / "gpt2", text / "train.txt")
    found = fastft("train", work / "run", model=model, data=text, task="lm", **FROM_SCRATCH)
    scores = fastft(
        "evaluate", work / "scores", model=work / "run", base=model, data=text, task="lm",
        max_length=128,
    )["scores"]  # fmt: skip
    before, after = (own[str(text)]["perplexity"] for own in scores.values())
    size = (text / "train.txt").stat().st_size / 1e6
    return (
        f"A text file of {size:.1f} MB (reviews), a random GPT-2 of {found['parameters']['all']:,} "
        "parameters with a byte-level BPE tokenizer of its own (4096 tokens): `fastft train --task "
        f"lm`, {found['steps']} steps in {found['seconds']:.0f} s. Perplexity of a token of other "
        "reviews; a uniform guess has 4096.\n\n"
        + table([("", "before", "after"), ("perplexity", f"{before:.0f}", f"{after:.0f}")])
    )


FROM_SCRATCH = dict(
    epochs=3, batch_size=16, max_length=128, learning_rate=1e-3, validation=0.05
)  # fmt: skip


def prompting(work: Path) -> str:
    data = reviews(work / "data", train=200, test=200)
    rows = [("examples", "calibrated", "accuracy", "F1", "expected calibration error")]
    for shots in (0, 5):
        for calibrate in (False, True):
            few = {"shots": shots, "examples": data / "train.jsonl"} if shots else {}
            found = fastft(
                "evaluate", work / f"{shots}-{calibrate}", model=SMOLLM, data=data, task="prompt",
                template="sentiment", chat=False, calibrate=calibrate, **few,
            )  # fmt: skip
            score = found["scores"][SMOLLM][str(data)]
            numbers = (f"{score[name]:.3f}" for name in ("accuracy", "f1_macro", "ece"))
            rows.append((shots, "yes" if calibrate else "no", *numbers))
    return (
        f"Rotten Tomatoes, {SMOLLM}, no training: `fastft evaluate --task prompt --template "
        "sentiment --no-chat`, 200 reviews, labels by likelihood; the examples are the first five "
        "of another file. Guessing gives 0.5; one deviation of the sampling is 0.035.\n\n"
        + table(rows)
    )


def forgetting(work: Path) -> str:
    old = texts(work / "reviews")
    new = news(work / "news")
    model = small_gpt2(work / "gpt2", old / "train.txt")
    fastft("train", work / "first", model=model, data=old, task="lm", **FROM_SCRATCH)
    ways = {
        "plain": {},
        "replay": {"old_data": old, "replay": 0.5},
        # Of 30, 300, 1000 and 1e4 tried, the one in the middle: more keeps more and learns less.
        "ewc": {"old_data": old, "ewc": 300.0, "ewc_rows": 100},
        "distill": {"distill": 1.0},
        "adapter": {"method": "lora", "adapter_name": "news", "learning_rate": 3e-3},
    }
    second = {"model": work / "first", "data": new, "task": "lm"}
    seconds = {
        name: fastft("train", work / name, **second | FROM_SCRATCH | settings)["seconds"]
        for name, settings in ways.items()
    }
    models = [work / name for name in ("first", *ways)]
    models[-1] = work / "adapter/news"
    scores = fastft(
        "evaluate", work / "scores", model=models, data=[old, new], task="lm", max_length=128
    )["scores"]
    rows = [("second training", "reviews (old)", "news (new)", "seconds")]
    for name, found in zip(("none", *ways), scores.values(), strict=True):
        numbers = [f"{found[str(data)]['perplexity']:.0f}" for data in (old, new)]
        if name == "adapter":  # the old task is answered without it
            numbers[0] = rows[1][1] + " (adapter off)"
        rows.append((name, *numbers, f"{seconds[name]:.0f}" if name in seconds else ""))
    return (
        "The GPT-2 of the text file's section learns 3000 reviews, then 3000 sentences of news "
        "(CoNLL-2003's text) by `fastft train --model first ...`: plainly, with `--replay 0.5`, "
        "`--ewc 300`, `--distill 1`, and as a LoRA adapter beside the first model "
        "(`--adapter-name`). Test perplexity of both texts afterwards (`fastft evaluate`); the "
        "first row is before the news.\n\n" + table(rows)
    )


def search(work: Path) -> str:
    data = reviews(work / "data", train=400, test=1)
    started = time.perf_counter()
    found = fastft(
        "search", work / "search", model=MINILM, data=data, task="classify", trials=8,
        validation=0.4, epochs=2, startup=3,
        space=["method: [lora, bitfit, full]", "learning_rate: [1e-5, 1e-2, log]"],
    )  # fmt: skip
    rows = [("trial", "state", "method", "learning rate", f"validation {found['metric']}")]
    for trial in found["trials"]:
        score = "" if trial["score"] is None else f"{trial['score']:.3f}"
        rate = f"{trial['settings']['learning_rate']:.1e}"
        rows.append((trial["trial"], trial["state"], trial["settings"]["method"], rate, score))
    importance = ", ".join(f"{name} {share:.2f}" for name, share in found["importance"].items())
    return (
        f"Rotten Tomatoes, {MINILM}: `fastft search --trials 8 --startup 3 --space 'method: [lora, "
        "bitfit, full]' 'learning_rate: [1e-5, 1e-2, log]'`, 240 reviews for training, 160 for "
        f"validation (one deviation: 0.04), 2 epochs; {time.perf_counter() - started:.0f} s. Best: "
        f"trial {found['best']['trial']}. Importance: {importance}.\n\n" + table(rows)
    )


SECTIONS: dict[str, tuple[str, Callable[[Path], str]]] = {
    "sentiment": ("Sentiment by every method", sentiment),
    "entities": ("Named entities", entities),
    "instructions": ("Following instructions", instructions),
    "language": ("A language model on a text file", language),
    "prompting": ("Sentiment by prompts", prompting),
    "forgetting": ("Learning something new without losing the old", forgetting),
    "search": ("Searching settings", search),
}


def machine() -> str:
    import torch

    cpu = torch.backends.cpu.get_cpu_capability()
    names = ("transformers", "peft", "trl", "datasets")
    return (
        f"{platform.machine()}, {cpu}, threads: {THREADS}; Python "
        f"{platform.python_version()}, torch {torch.__version__}, "
        + ", ".join(f"{name} {version(name)}" for name in names)
    )


def kept() -> dict[str, str]:
    """The sections that the file of results holds, by their titles."""
    if not RESULTS.exists():
        return {}
    parts = RESULTS.read_text().split("\n## ")[1:]
    return {part.partition("\n")[0]: part.partition("\n")[2].strip() for part in parts}


def save(sections: dict[str, str]) -> None:
    known = [title for title, _ in SECTIONS.values() if title in sections]
    parts = [f"## {title}\n\n{sections[title]}\n" for title in known]
    head = (
        "# The workflows of the command line on the CPU\n\n"
        f"`python -m bench.workflows`; {machine()}. The machine is shared: times are no benchmark. "
        "Subsets of the data, sizes stated; one seed.\n"
    )
    RESULTS.write_text("\n".join([head, *parts]))


def main() -> None:
    global THREADS
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--threads", type=int, default=THREADS, help="of each command")
    args = parser.parse_args()
    THREADS = args.threads
    for name in args.only:
        title, run = SECTIONS[name]
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as work:
            text = run(Path(work))
        text += f"\n\n{time.perf_counter() - started:.0f} s in all."
        print(f"## {title}\n\n{text}\n", flush=True)
        save(kept() | {title: text})


if __name__ == "__main__":
    main()
