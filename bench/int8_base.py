"""What a frozen base in eight bits costs in quality, and the memory of a large model.

`python -m bench.int8_base` writes bench/results/int8-base.md; `--only NAME ...` some sections, and
what is not run anew stays there. alpaca and sentiment run `fastft train` with and without
`--base-weights int8`, everything else the same, for three seeds.
"""

import argparse
import platform
import re
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from bench import base_kinds, int8_large, int8_outliers, workflows
from bench.workflow_data import reviews, write
from bench.workflows import MINILM, ROOT, SMOLLM, fastft, table

RESULTS = ROOT / "bench/results/int8-base.md"
SEEDS = (0, 1, 2)


def _both(work: Path, name: str, read, **settings) -> list[list[float]]:
    """read(metrics) of each seed, for the float32 base and for the int8 one."""
    found = []
    for kind in ("none", "int8"):
        found.append([])
        for seed in SEEDS:
            metrics = fastft("train", work / f"{name}-{kind}-{seed}", base_weights=kind, seed=seed,
                             method="lora", validation=0, **settings)  # fmt: skip
            found[-1].append(read(metrics))
            print(f"{name}, base {kind}, seed {seed}: {found[-1][-1]:.4f}", flush=True)
    return found


def _compared(found: list[list[float]], what: str, change) -> str:
    rows = [("seed", f"{what}, float32 base", f"{what}, int8 base", "change")]
    for seed, before, after in zip(SEEDS, *found, strict=True):
        rows.append((seed, f"{before:.4f}", f"{after:.4f}", change(before, after)))
    means = [statistics.mean(values) for values in found]
    rows.append(("mean", *(f"{mean:.4f}" for mean in means), change(*means)))
    return table(rows)


def alpaca(work: Path) -> str:
    from fastft.finetune import assets, data

    records = data.read_alpaca(assets.dataset("alpaca"))
    records = [records[i] for i in data.shuffled(len(records), 0)][:350]
    write(work / "data/train.jsonl", records[50:])
    write(work / "data/test.jsonl", records[:50])
    found = _both(
        work, "alpaca", lambda metrics: metrics["test"]["loss"], model=SMOLLM, data=work / "data",
        task="sft", steps=200, batch_size=1, max_length=128,
    )  # fmt: skip
    return (
        f"{SMOLLM}, `fastft train --task sft --method lora --steps 200 --batch-size 1 "
        "--max-length 128`, 300 records of alpaca, 50 held out; goal: within 1 %.\n\n"
        + _compared(found, "held-out loss", lambda a, b: f"{100 * (b / a - 1):+.2f} %")
    )


def sentiment(work: Path) -> str:
    data = reviews(work / "data", train=600, test=1000)
    found = _both(
        work, "reviews", lambda metrics: metrics["test"]["accuracy"], model=MINILM, data=data,
        task="classify", epochs=2,
    )  # fmt: skip
    return (
        f"{MINILM}, `fastft train --task classify --method lora --epochs 2`, 600 reviews of "
        "Rotten Tomatoes for training, 1000 for the test; goal: within 1 point.\n\n"
        + _compared(found, "accuracy", lambda a, b: f"{100 * (b - a):+.1f} points")
    )


def large(work: Path) -> str:
    return int8_large.section(work, workflows.THREADS)


def outliers(work: Path) -> str:
    import torch

    torch.set_num_threads(workflows.THREADS)
    return int8_outliers.section(work)


def kinds(work: Path) -> str:
    import torch

    torch.set_num_threads(workflows.THREADS)
    return base_kinds.section(work)


SECTIONS = {
    "int8 and fp8": kinds,
    "Outliers of activations": outliers,
    "Fine-tuning on alpaca": alpaca,
    "Sentiment of reviews": sentiment,
    "A model of 1.1 billion parameters": large,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=[f.__name__ for f in SECTIONS.values()])
    parser.add_argument("--threads", type=int, default=2)
    settings = parser.parse_args()
    workflows.THREADS = settings.threads
    kept = {}
    if RESULTS.exists():
        parts = re.split(r"^## (.*)\n", RESULTS.read_text(), flags=re.M)
        kept = dict(zip(parts[1::2], (p.strip() for p in parts[2::2]), strict=True))
    for title, section in SECTIONS.items():
        if settings.only and section.__name__ not in settings.only:
            continue
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as work:
            text = section(Path(work))
        seconds = time.perf_counter() - start
        kept[title] = (
            f"{text}\n\n`python -m bench.int8_base --only {section.__name__}`, {seconds:.0f} s, "
            f"{settings.threads} threads, torch {version('torch')}, {platform.machine()}"
        )
        body = "".join(f"\n## {t}\n\n{kept[t]}\n" for t in SECTIONS if t in kept)
        RESULTS.write_text(f"# A frozen base in eight bits: what it costs\n{body}")
        print(f"\n## {title}\n\n{kept[title]}", flush=True)


if __name__ == "__main__":
    main()
