"""Takes every architecture through its journey and writes docs/architectures.md.

python -m tests.zoo                      # all, some minutes
python -m tests.zoo --only llama gpt2    # prints those, writes nothing
"""

import argparse
import logging
import traceback
import warnings
from collections import Counter
from pathlib import Path

import torch
import transformers

from tests.zoo.check import Journey, Wrong, journey, time_limit
from tests.zoo.tiny import Case, cases

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
# Of the report's operators; `linear` is PyTorch's product by another library, and not counted.
SHOWN = (
    "norm", "gated_mlp", "rotary", "attention", "padding", "linear_cross_entropy", "cross_entropy",
    "decoder_layer",
)  # fmt: skip
_HEAD = """\
# Architectures

Every architecture of transformers {transformers} that has a class for causal language modelling,
for sequence or for token classification, built tiny with random weights, and what `fastft.patch`
did to it. Each went the same way: loss, logits and gradients of a step without padding, with right
and with left padding, compared with the model before (float32, relative difference at most 1e-3);
`fastft.verify`; for causal models greedy decoding by `fastft.generate`, alone and with
`"prompt_lookup"`, and by the patched model's own `generate`, token by token; `unpatch`, after which
loss and logits have their first bits again. Written by `python -m tests.zoo`; the numbers count the
modules that run an operator.

{summary}

| architecture | class | """


def told(found: Journey) -> str:
    """The remark on a class that is right."""
    return f"decodes by {found.decoding}" if found.decoding else ""


def run(case: Case) -> tuple[str, Counter, str]:
    """Result ("right", "skipped" or "WRONG"), operators, and a remark."""
    if case.skipped:
        return "skipped", Counter(), case.skipped
    try:
        with time_limit(120):
            found = journey(case)
    except Wrong as wrong:
        return "WRONG", Counter(), str(wrong)
    except Exception as error:
        traceback.print_exc()
        return "FAILED", Counter(), f"{type(error).__name__}: {error}"
    return "right", found.operators, told(found)


def summary(results: list[tuple[Case, str, Counter, str]]) -> str:
    def types(keep) -> int:
        return len({case.model_type for case, result, done, _ in results if keep(result, done)})

    counts = Counter(result for _, result, _, _ in results)
    lines = [
        f"{types(lambda result, _: True)} architectures, {len(results)} classes: "
        + ", ".join(f"{counts[name]} {name}" for name in sorted(counts)) + ".",
        "Architectures that run at least one operator: "
        f"{types(lambda _, done: any(done[name] for name in SHOWN))}; attention: "
        f"{types(lambda _, done: done['attention'])}; padding left out: "
        f"{types(lambda _, done: done['padding'])}; decoding layer by layer: "
        f"{types(lambda _, done: done['decoder_layer'])}.",
    ]  # fmt: skip
    return "\n".join(lines)


def row(case: Case, result: str, done: Counter, remark: str) -> str:
    cells = [case.model_type, case.class_name, *(str(done[n] or "") for n in SHOWN), result, remark]
    return "| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in cells) + " |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", help="architectures, or classes such as llama-causal")
    only = parser.parse_args().only
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    results = []
    for case in cases():
        if not only or case.model_type in only or case.name in only:
            results.append((case, *run(case)))
            print(row(*results[-1]), flush=True)
    print(summary(results))
    if not only:
        top = _HEAD.format(transformers=transformers.__version__, summary=summary(results))
        columns = [*SHOWN, "result", "remark"]
        rule = "|" + "---|" * (len(columns) + 2)
        table = "\n".join(row(*each) for each in results)
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(f"{top}{' | '.join(columns)} |\n{rule}\n{table}\n")
    return int(any(result in ("WRONG", "FAILED") for _, result, _, _ in results))


if __name__ == "__main__":
    raise SystemExit(main())
