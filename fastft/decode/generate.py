"""fastft.generate: what `model.generate` does, by a fused decode step, drafts and a fast cache.

transformers prepares the call (prepare.py), one loop serves greedy decoding and sampling, one row
or many, with or without drafts (loop.py), and what it does not serve goes to `model.generate`.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastft.decode.cache_name import own_name, renamed
from fastft.decode.cuda_graph import fused_step
from fastft.decode.exit_head import ExitHead
from fastft.decode.linears import Unfit
from fastft.decode.loop import Run
from fastft.decode.modules import ModuleStep
from fastft.decode.output import GenerateOutput, Stats
from fastft.decode.prepare import HandOver, Prepared, inner_model, own_generate, prepare
from fastft.foreign import ForeignModule

_EXACT = "the bits of every row are those of the row alone, token by token"
_TIES = "tokens are those of the row alone up to ties: widths and masks change roundings"


def _merged(inputs: Any, kwargs: dict[str, Any]) -> tuple[Tensor | None, dict[str, Any]]:
    """A tokenizer's output is keywords too."""
    if isinstance(inputs, Mapping):
        kwargs, inputs = {**inputs, **kwargs}, None
    return inputs, renamed(kwargs, own_name())


def _begin(
    model: nn.Module,
    inputs: Any,
    generation_config: Any,
    speculation: Any,
    seed: int | None,
    adapter_names: Sequence[str] | None,
    kwargs: dict[str, Any],
) -> Run:
    """Raises HandOver where transformers must serve the call."""
    if not isinstance(model, nn.Module) or not hasattr(model, "generate"):
        raise TypeError(f"model: expected a transformers model, got {type(model).__name__}")
    _check_speculation(speculation)
    _check_seed(seed)
    inner = inner_model(model)
    if kwargs.get("return_dict_in_generate") is None and (
        kwargs.get("output_scores") or kwargs.get("output_logits")
    ):
        kwargs = kwargs | {"return_dict_in_generate": True}  # our output always is one
    prepared = prepare(inner, inputs, generation_config, kwargs)
    stats = Stats(exact=_EXACT)
    if adapter_names is not None:
        adapter_names = _per_row(inner, adapter_names, prepared)
    try:
        with torch.no_grad():
            # A model is confirmed as it is: rows of several adapters have nothing to compare with.
            step: Any = fused_step(inner)
            step = step if adapter_names is None else fused_step(inner, adapter_names)
        if not step.bit_exact:
            stats.exact = _TIES
    except Unfit as unfit:
        if speculation is None or adapter_names is not None:
            raise HandOver(str(unfit)) from unfit
        try:
            step = ModuleStep(inner)
        except Unfit as other:
            raise HandOver(f"{unfit}; {other}") from other
        if prepared.cache is not None:
            raise HandOver(str(unfit)) from unfit
        stats.path, stats.reason, stats.exact = "modules", str(unfit), _TIES
    if speculation is not None:
        stateful = [type(p).__name__ for p in prepared.processors if type(p).__name__ in _STATEFUL]
        if stateful:
            stats.speculation = f"none: {', '.join(stateful)} keeps a state of its own"
            speculation = None
    return Run(inner, prepared, step, stats, speculation, seed)


# Processors whose scores depend on more than the tokens so far: a draft would leave its mark.
_STATEFUL = {
    "UnbatchedClassifierFreeGuidanceLogitsProcessor",
    "SynthIDTextWatermarkLogitsProcessor",
}


def _check_speculation(speculation: Any) -> None:
    wanted = "expected 'prompt_lookup', a draft model, an ExitHead or None"
    if isinstance(speculation, str):
        if speculation != "prompt_lookup":
            raise ValueError(f"speculation: {wanted}, got {speculation!r}")
    elif isinstance(speculation, nn.Module):
        if not isinstance(speculation, ExitHead) and not hasattr(speculation, "generate"):
            raise TypeError(f"speculation: {wanted}, got {type(speculation).__name__}")
    elif speculation is not None:
        raise TypeError(f"speculation: {wanted}, got {type(speculation).__name__}")


def _check_seed(seed: Any) -> None:
    if seed is None:
        return
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed: expected an int or None, got {seed!r}")
    if not -(2**63) <= seed < 2**64:  # what PyTorch's generators take
        raise ValueError(f"seed: expected -2**63 to 2**64 - 1, got {seed}")


def _per_row(model: ForeignModule, names: Any, prepared: Prepared) -> list[str]:
    copies = prepared.config.num_return_sequences
    rows = len(prepared.input_ids) // copies
    if isinstance(names, str):
        raise TypeError(f"adapter_names: expected a list of names, got {names!r}")
    if len(names) != rows:
        raise ValueError(f"adapter_names: expected one for each of {rows} rows, got {len(names)}")
    names = [name for name in names for _ in range(copies)]
    known = {n for m in model.modules() if hasattr(m, "lora_A") for n in m.lora_A}
    unknown = sorted(set(names) - known - {"__base__"})
    if unknown:
        raise ValueError(f"adapter_names: no adapter {unknown}, the model has {sorted(known)}")
    out: list[str] = names
    return out


def generate(
    model: nn.Module,
    inputs: Tensor | Mapping[str, Tensor] | None = None,
    generation_config: Any = None,
    *,
    speculation: Any = None,
    streamer: Any = None,
    seed: int | None = None,
    adapter_names: Sequence[str] | None = None,
    **kwargs: Any,
) -> GenerateOutput:
    """Decodes as `model.generate` does, faster; returns transformers' output and its `stats`.

    Takes what `model.generate` takes: token ids (rows, length) or a tokenizer's output, a
    GenerationConfig and its fields as keywords, processors, criteria, `num_return_sequences`,
    `tokenizer` for stop strings. Greedy decoding and sampling run here, beams and whatever else
    this loop does not do run in `model.generate`, and `stats.path` and `stats.reason` say so.
    Masked tokens are left out wherever they stand, so every row decodes as it would alone; only
    processors see the padding, as they do in transformers. Behind its end, for whatever reason it
    ended, a row is padded, and its scores are zeros.

    Args:
        speculation: "prompt_lookup" drafts from the row's own text, a model of the same vocabulary
            drafts token by token, an `ExitHead` (of `train_draft` in `fastft.decode.train_draft`)
            from the model's own first layers. The tokens, and when sampling their distribution,
            stay the same.
            Processors and criteria must be functions of a row's tokens: with drafts they are asked
            about tokens that may not stay, one row at a time.
        streamer: of transformers; gets the tokens as they come.
        seed: of a random generator of this call's own; None: PyTorch's. With drafts the draws
            depend on how much is drafted, which follows measured times: not on the seed alone.
        cache: a KVCache, new or of an earlier call, whose tokens that the inputs begin with are
            not computed again. Also taken as past_key_values, its name before transformers 5.24.
        adapter_names: the LoRA adapter of each row, "__base__" for none, unmerged.
    Raises: ValueError or TypeError that names the argument.
    """
    inputs, kwargs = _merged(inputs, kwargs)
    try:
        run = _begin(model, inputs, generation_config, speculation, seed, adapter_names, kwargs)
    except HandOver as reason:
        kwargs = kwargs | {"generation_config": generation_config, "streamer": streamer}
        if adapter_names is not None:
            kwargs["adapter_names"] = adapter_names
        return _handed_over(model, inputs, speculation, seed, kwargs, str(reason))
    if streamer is not None:
        streamer.put(run.given.input_ids.cpu())
    shown = run.width
    for _ in run.rounds():
        if streamer is not None:
            shown = _show(run, streamer, shown)
    if streamer is not None:
        streamer.end()
    return run.output()


def stream(
    model: nn.Module, inputs: Any = None, generation_config: Any = None, **kwargs: Any
) -> Iterator[list[list[int]]]:
    """`generate` as an iterator: yields each round's new tokens, a list of ids for every row.

    Takes the arguments of `generate` but streamer.
    Raises: at the call, as generate, and ValueError for what only `model.generate` does.
    """
    if kwargs.get("streamer") is not None:
        raise TypeError("streamer: expected none, as the tokens are what this yields")
    kwargs.pop("streamer", None)
    own = {name: kwargs.pop(name, None) for name in ("speculation", "seed", "adapter_names")}
    inputs, kwargs = _merged(inputs, kwargs)
    try:
        run = _begin(model, inputs, generation_config, **own, kwargs=kwargs)
    except HandOver as reason:
        raise ValueError(f"model.generate has no iterator, and serves {reason}") from reason
    return run.rounds()


def _show(run: Run, streamer: Any, shown: int) -> int:
    """Gives the streamer the columns that all unfinished rows have reached, one by one."""
    last = min((run.ends[row] for row in run.active), default=max(run.ends))
    for column in range(shown, last):
        streamer.put(run.ids[:, column].cpu())
    return max(shown, last)


def _handed_over(
    model: ForeignModule,
    inputs: Any,
    speculation: Any,
    seed: int | None,
    kwargs: dict[str, Any],
    reason: str,
) -> GenerateOutput:
    """transformers' own output, whatever its class, with our stats."""
    stats = Stats(path="model.generate", reason=reason, exact="transformers' own")
    if speculation is not None:
        stats.speculation = f"none: {reason}"
    if inputs is not None:
        kwargs = kwargs | {"inputs": inputs}
    serve = own_generate(model)
    devices = [model.device] if model.device.type == "cuda" else []
    started = time.perf_counter()
    with torch.random.fork_rng(devices, enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        out = serve(**(kwargs | {"return_dict_in_generate": True}))
    stats.decode_seconds = time.perf_counter() - started
    if isinstance(out, Tensor):  # a custom_generate may return no more
        out = GenerateOutput(sequences=cast(torch.LongTensor, out))
    stats.rows = len(out.sequences)
    stats.prompt_tokens, stats.new_tokens = _counted(model, out.sequences, kwargs)
    out.stats = stats
    found: GenerateOutput = out
    return found


def _counted(model: ForeignModule, sequences: Tensor, kwargs: dict[str, Any]) -> tuple[int, int]:
    """How many tokens were given and how many came of them, in a call that transformers served.

    A row counts up to its end of text; one that a criterion ended, with the padding behind it.
    """
    given = kwargs.get("input_ids")
    given = kwargs.get("inputs") if given is None else given
    prompt, width = 0, 0  # of embeddings transformers gives the new tokens alone
    if isinstance(given, Tensor) and not given.is_floating_point():
        mask = kwargs.get("attention_mask")
        prompt = int(mask.sum()) if isinstance(mask, Tensor) else given.numel()
        prompt *= len(sequences) // max(len(given), 1)
        width = given.shape[1]
    if model.config.is_encoder_decoder:
        width = 1  # the token that the decoder starts with
    settings = kwargs.get("generation_config") or model.generation_config
    own = getattr(model.generation_config, "eos_token_id", None)
    asked = kwargs.get("eos_token_id", getattr(settings, "eos_token_id", None) or own)
    ends = torch.as_tensor([] if asked is None else asked).flatten().tolist()
    rows = sequences[:, width:].tolist()
    lengths = (next((i + 1 for i, t in enumerate(row) if t in ends), len(row)) for row in rows)
    return prompt, sum(lengths)
