"""`fastft generate`: prompts from a file, a pipe or the command line, completions as jsonl."""

import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from fastft.finetune import UserError, assets, loading, reading, table
from fastft.finetune.config import option
from fastft.finetune.data import pad_id
from fastft.finetune.prompting import PromptConfig
from fastft.finetune.serving import prompts_of, serving
from fastft.foreign import ForeignModule

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(kw_only=True)
class GenerateConfig(PromptConfig):
    """Continues prompts with a model, and writes a line of JSON for each completion.

    fastft generate --model runs/train --prompt "Name three colours."
    fastft generate --model gpt2 --prompts asked.jsonl --template question --output told.jsonl
    """

    model: str = option(help="hub name, local folder, run folder or adapter folder")
    prompt: str | None = option(None, "one prompt")
    prompts: str | None = option(
        None, "file with a prompt a row (.txt: a line); - or nothing: standard input"
    )
    output: str | None = option(None, "jsonl file; must not exist yet; default: standard output")
    max_new_tokens: int = option(128, "tokens of a completion, at most", least=1)
    temperature: float = option(0.0, "how freely tokens are sampled; 0: the likeliest", least=0)
    top_p: float = option(1.0, "sample from the likeliest tokens of this share", above=0, most=1)
    top_k: int = option(0, "sample from so many likeliest tokens; 0: from all", least=0)
    repetition_penalty: float = option(1.0, "above 1: tokens seen before are less likely", above=0)
    num_return_sequences: int = option(1, "completions of each prompt", least=1)
    stop: list[str] | None = option(None, "texts at which a completion ends; they are left out")
    batch_size: int = option(8, "prompts at a time", least=1)
    speculation: str | None = option(
        None, "prompt_lookup, or a smaller model of the same vocabulary that drafts"
    )
    decode_weights: Literal["none", "int8", "int4", "int4_g64"] = option(
        "none", "quantised copies of the weights for decoding"
    )
    stream: bool | None = option(
        None, "show tokens as they come; default: for one prompt on a terminal"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = option("float32", "type of the weights")
    patch: bool = option(True, "decode with fastft's kernels")
    threads: int | None = option(None, "of the CPU; default: PyTorch's choice", least=1)

    def check(self) -> None:
        super().check()
        if self.prompt is not None and self.prompts is not None:
            raise UserError("prompt and prompts: one of them at a time")
        if self.num_return_sequences > 1 and self.temperature == 0:
            raise UserError(
                "num_return_sequences: without sampling they would all be the same; set temperature"
            )
        for name in ("top_p", "top_k"):
            if self.temperature == 0 and getattr(self, name) not in (0, 1.0):
                raise UserError(f"{name}: only for sampling; set temperature")
        if self.stream and self.num_return_sequences > 1:
            raise UserError("stream: one completion at a time, set num_return_sequences to 1")
        if self.decode_weights != "none" and not self.patch:
            raise UserError("decode_weights: fastft's own, and patch is off")


@dataclass(frozen=True)
class GenerateResult:
    """completions: index (of the prompt), sequence, prompt, completion; metrics: what it cost."""

    completions: list[dict[str, Any]]
    metrics: dict[str, Any]
    output: Path | None = None


def generate(config: GenerateConfig) -> GenerateResult:
    """Completes every prompt, in order, by `fastft.generate`, and writes each batch as it is done.

    With sampling, batch i draws by seed + i. Raises: UserError.
    """
    target = None if config.output is None else Path(config.output).expanduser()
    beside = None if target is None else target.with_suffix(".metrics.json")
    for path in (target, beside):
        if path is not None and path.exists():
            raise UserError(f"{path}: exists already; --output names another file")
    rows = _rows(config)
    model, tokenizer, report = serving(config.model, config)
    prompts = prompts_of(config, rows, tokenizer)
    encoded = [prompts.prompter.ids(text) for text in prompts.texts]
    _check_lengths(model, encoded, config.max_new_tokens)
    stream = config.stream
    if stream is None:
        stream = target is None and len(rows) == 1 and sys.stdout.isatty()
        stream = stream and config.num_return_sequences == 1
    options = _options(config, tokenizer)
    found, stats = [], []
    try:
        if target is not None:
            target.parent.mkdir(parents=True, exist_ok=True)
        with open(target, "x", encoding="utf-8") if target else nullcontext(sys.stdout) as out:
            for done, batch in _complete(model, tokenizer, encoded, config, options, stream):
                stats.append(done)
                for index, sequence, text in batch:
                    row = {"index": index, "sequence": sequence}
                    row |= {"prompt": prompts.texts[index], "completion": text}
                    if target is not None or not stream:
                        print(json.dumps(row, ensure_ascii=False), file=out, flush=True)
                    found.append(row)
        metrics = _summary(stats) | {"settings": asdict(config), "patch": report}
        if beside is not None:
            beside.write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
    except BrokenPipeError:
        raise  # whoever read has had enough
    except BaseException as stopped:
        if target is not None and not found:
            target.unlink(missing_ok=True)
        if not isinstance(stopped, OSError):
            raise
        raise UserError(f"{target or 'standard output'}: {stopped.strerror}") from None
    # The completions have standard output to themselves.
    assets.say(_table(metrics))
    return GenerateResult(found, metrics, target)


def _rows(config: GenerateConfig) -> list[dict[str, Any]]:
    """The rows that the prompts are made of."""
    if config.prompt is not None:
        return [{"text": config.prompt}]
    if config.prompts not in (None, "-"):
        rows = [dict(row) for row in reading.rows(config.prompts)]
        where = config.prompts
    else:
        if sys.stdin.isatty():
            raise UserError("give a prompt, or a file of prompts, or pipe them in")
        rows, where = list(_piped(sys.stdin)), "standard input"
    rows = [row for row in rows if row.keys() != {"text"} or str(row["text"]).strip()]
    if not rows:
        raise UserError(f"{where}: no prompts in it")
    return rows


def _piped(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Each line: an object of JSON is a row, anything else a text."""
    try:
        for line in lines:
            line = line.rstrip("\n")
            try:
                held = json.loads(line)
            except ValueError:
                held = None
            yield held if isinstance(held, dict) else {"text": line}
    except UnicodeDecodeError as error:
        raise UserError(f"standard input: not UTF-8 (byte {error.start})") from None


def _options(config: GenerateConfig, tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    """Keywords of fastft.generate, which has them from transformers."""
    options: dict[str, Any] = {
        "max_new_tokens": config.max_new_tokens,
        "num_return_sequences": config.num_return_sequences,
        "repetition_penalty": config.repetition_penalty,
        "pad_token_id": pad_id(tokenizer),
    }
    if config.temperature > 0:
        options |= {"do_sample": True, "temperature": config.temperature}
        options |= {"top_p": config.top_p, "top_k": config.top_k}
    else:
        # None, as a model may come with settings of its own, of which transformers then warns.
        options |= {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if config.stop:
        options |= {"stop_strings": config.stop, "tokenizer": tokenizer}
    if config.speculation == "prompt_lookup":
        options["speculation"] = "prompt_lookup"
    elif config.speculation is not None:
        draft = loading.load_model(config.speculation, "lm", dtype=config.dtype).eval()
        options["speculation"] = draft.to("cuda" if torch.cuda.is_available() else "cpu")
    return options


def _check_lengths(model: nn.Module, encoded: list[list[int]], more: int) -> None:
    most = getattr(model.config, "max_position_embeddings", None)
    for number, ids in enumerate(encoded):
        if not ids:
            raise UserError(f"prompt {number} is empty")
        if most is not None and len(ids) + more > most:
            raise UserError(
                f"prompt {number} has {len(ids)} tokens, which with {more} new ones are more than "
                f"the model's {most}; lower max_new_tokens or shorten it"
            )


def _complete(
    model: ForeignModule,
    tokenizer: "PreTrainedTokenizerBase",
    encoded: Any,
    config: GenerateConfig,
    options: dict[str, Any],
    stream: bool,
) -> Any:
    """Yields for each batch its stats, and (prompt, sequence, completion) of what it gave."""
    from tqdm import tqdm
    from transformers import TextStreamer

    from fastft.decode.generate import generate as decode

    size = 1 if stream else config.batch_size
    # No bar where the tokens themselves are seen.
    with tqdm(total=len(encoded), desc="prompts", disable=True if stream else None) as bar:
        for start in range(0, len(encoded), size):
            batch = encoded[start : start + size]
            inputs = _left_padded(batch, options["pad_token_id"], model.device)
            more: dict[str, Any] = (
                {"seed": config.seed + start // size} if config.temperature > 0 else {}
            )
            if stream:
                more["streamer"] = TextStreamer(
                    tokenizer, skip_prompt=True, skip_special_tokens=True
                )
            try:
                out = decode(model, inputs, **options, **more)
            except ValueError as error:
                if not str(error).startswith("speculation:"):  # of another vocabulary
                    raise
                raise UserError(str(error)) from None
            new = out.sequences[:, inputs["input_ids"].shape[1] :]
            texts = tokenizer.batch_decode(new, skip_special_tokens=True)
            copies = config.num_return_sequences
            yield (
                out.stats,
                [
                    (start + i // copies, i % copies, _cut(text, config.stop))
                    for i, text in enumerate(texts)
                ],
            )
            bar.update(len(batch))


def _left_padded(rows: list[list[int]], pad: int, device: torch.device | None) -> dict[str, Tensor]:
    longest = max(map(len, rows))
    ids = [[pad] * (longest - len(row)) + row for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    held = {"input_ids": ids, "attention_mask": mask}  # (rows, longest) each
    return {name: torch.tensor(values, device=device) for name, values in held.items()}


def _cut(text: str, stop: list[str] | None) -> str:
    places = [text.find(one) for one in stop or () if one in text]
    return text[: min(places)] if places else text


def _summary(stats: list[Any]) -> dict[str, Any]:
    first = stats[0]
    seconds = sum(s.decode_seconds for s in stats)
    decoded = sum(max(s.new_tokens - s.rows, 0) for s in stats)
    drafted, accepted = (sum(sum(getattr(s, n)) for s in stats) for n in ("drafted", "accepted"))
    return {
        "completions": sum(s.rows for s in stats),
        "prompt_tokens": sum(s.prompt_tokens for s in stats),
        "new_tokens": sum(s.new_tokens for s in stats),
        "prefill_seconds": sum(s.prefill_seconds for s in stats),
        "decode_seconds": seconds,
        "tokens_per_second": decoded / seconds if seconds else 0.0,
        "path": first.path,
        "reason": first.reason,
        "speculation": first.speculation,
        "acceptance": accepted / drafted if drafted else None,
    }


def _table(metrics: dict[str, Any]) -> str:
    rows = [("completions", metrics["completions"]), ("new tokens", metrics["new_tokens"])]
    rows.append(("tokens/s", f"{metrics['tokens_per_second']:.1f}"))
    if metrics["acceptance"] is not None:
        rows.append(("drafts accepted", f"{metrics['acceptance']:.0%}"))
    reason = f" ({metrics['reason']})" if metrics["reason"] else ""
    rows.append(("decoded by", metrics["path"] + reason))
    return table.text(rows)
