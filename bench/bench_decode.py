"""Decoding SmolLM2-135M-Instruct: model.generate, llama.cpp where it is installed, and fastft.

128 new tokens after a prompt of about 40, greedy, end of text switched off so that all sides do the
same work; the drafts' benches decode as a user would, to the end of the answer. The floor: the
time in which memory gives the weights that a token needs, at the rate at which a sum reads it.
"""

import contextlib
import statistics
import time

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import fastft
from bench.conftest import THREADS
from bench.decode_prompts import OPEN, REWRITING, chat
from bench.gpu.case import Skip
from bench.gpu.peers import installed
from bench.llama_cpp import Peer, gguf_of
from fastft.finetune import assets

NEW = 128
ROUNDS = 7


@pytest.fixture(scope="module")
def folder():
    return assets.model("SmolLM2-135M-Instruct")


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder, padding_side="left")


def load(folder, endless: bool = True, dtype=torch.float32):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    if endless:
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
    return model


def with_adapter(model):
    """LoRA r8 on all linears, B far from zero so that it changes every token."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(
        model, LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False)
    )
    return model.eval()


def read_bandwidth() -> float:
    """Bytes per second that summing a large tensor reads."""
    x = torch.randn(2**26)
    seconds = []
    for _ in range(7):
        start = time.perf_counter()
        x.sum()
        seconds.append(time.perf_counter() - start)
    return x.numel() * 4 / statistics.median(seconds)


def weight_bytes(model) -> int:
    """What a token reads: every linear weight once, the tied embedding as the head."""
    total = 0
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            held = vars(module).get("_fastft_decode_weight")
            parts = [module.weight] if held is None else [held.stored.values, held.stored.scale]
            total += sum(part.numel() * part.element_size() for part in parts)
    return total


def same_tokens(results):
    first, *rest = (name for name in results if not name.startswith("llama"))
    for name in rest:
        assert torch.equal(results[first], results[name]), name


def theirs(model, **inputs):
    return lambda: model.generate(**inputs, max_new_tokens=NEW, do_sample=False)


def ours(model, **inputs):
    return lambda: fastft.generate(model, inputs, max_new_tokens=NEW, do_sample=False).sequences


def prompt(tokenizer, text=OPEN[0]):
    ids = torch.tensor([chat(tokenizer, text)])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.fixture
def llama_cpp(folder, tmp_path):
    """llama_cpp(kind, ids): llama.cpp as a side, until the bench ends."""

    def make(kind, ids):
        if not installed("llama-cpp-python"):
            raise Skip("llama-cpp-python is not installed")
        peer = Peer(gguf_of(folder, kind, tmp_path / f"{kind}.gguf"), THREADS)
        opened.callback(peer.close)
        return lambda: peer.generate(ids[0].tolist(), NEW)

    with contextlib.ExitStack() as opened:
        yield make


@pytest.mark.parametrize(
    "weights, kind, aim", [(None, "F32", 2.5), ("int8", "Q8_0", 6), ("int4", "Q4_0", 7)]
)
def bench_one_row(versus, folder, tokenizer, llama_cpp, weights, kind, aim):
    eager, model, inputs = load(folder), load(folder), prompt(tokenizer)
    if weights is not None:
        fastft.patch(model, decode_weights=weights)
    versus(
        f"greedy, 1 row, {weights or 'float32'}",
        {"eager": theirs(eager, **inputs), "fastft": ours(model, **inputs)},
        peers={f"llama.cpp {kind}": lambda: llama_cpp(kind, inputs["input_ids"])},
        at_least=aim,
        floor=NEW * weight_bytes(model) / read_bandwidth(),
        check=same_tokens if weights is None else None,
        rounds=ROUNDS,
    )


def bench_half(versus, folder, tokenizer, llama_cpp):
    """bfloat16 weights against llama.cpp's F16; float32 eager, which is the faster one here."""
    eager, inputs = load(folder), prompt(tokenizer)
    model = load(folder, dtype=torch.bfloat16)
    versus(
        "greedy, 1 row, bfloat16",
        {"eager": theirs(eager, **inputs), "fastft": ours(model, **inputs)},
        peers={"llama.cpp F16": lambda: llama_cpp("F16", inputs["input_ids"])},
        floor=NEW * weight_bytes(model) / read_bandwidth(),
        rounds=ROUNDS,
    )


def bench_adapter(versus, folder, tokenizer):
    model, inputs = with_adapter(load(folder)), prompt(tokenizer)
    versus(
        "greedy, 1 row, LoRA r8 unmerged",
        {"eager": theirs(model, **inputs), "fastft": ours(model, **inputs)},
        at_least=3.3,
        floor=NEW * weight_bytes(model) / read_bandwidth(),
        check=same_tokens,
        rounds=ROUNDS,
    )


def bench_batch(versus, folder, tokenizer):
    model = load(folder)
    texts = [[{"role": "user", "content": text}] for text in OPEN[:8]]
    inputs = tokenizer.apply_chat_template(
        texts, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    versus(
        "greedy, 8 ragged rows, float32",
        {"eager": theirs(model, **inputs), "fastft": ours(model, **inputs)},
        at_least=2.0,
        check=same_tokens,
        rounds=ROUNDS,
    )


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("kind, aim", [("rewriting", 1.6), ("open", 0.97)])
def bench_prompt_lookup(versus, told, folder, tokenizer, kind, rows, aim):
    """Each prompt, or group of rows, alternating; the aim is of the median (least, if open)."""
    model = load(folder, endless=False)
    prompts = [chat(tokenizer, text) for text in (REWRITING if kind == "rewriting" else OPEN)]
    starts = range(0, len(prompts) - rows + 1, 1 if rows == 1 else 3)
    batches = [
        tokenizer.pad({"input_ids": prompts[i : i + rows]}, return_tensors="pt") for i in starts
    ]
    seconds: dict[tuple[str, int], list[float]] = {}

    def side(name, speculation):
        def run():
            tokens = []
            for i, inputs in enumerate(batches):
                start = time.perf_counter()
                out = fastft.generate(
                    model,
                    inputs,
                    max_new_tokens=NEW,
                    do_sample=False,
                    speculation=speculation,
                )
                seconds.setdefault((name, i), []).append(time.perf_counter() - start)
                tokens += [row for batch in out.sequences for row in batch.tolist()]
            return torch.tensor(tokens)

        return run

    sides = {"eager": side("without", None), "fastft": side("with", "prompt_lookup")}
    names = {"eager": "without drafts", "fastft": "fastft"}
    versus(
        f"prompt lookup, {kind}, {rows} rows",
        {names[name]: function for name, function in sides.items()},
        check=same_tokens,
        rounds=3,
    )
    ratios = [
        statistics.median(
            a / b for a, b in zip(seconds["without", i], seconds["with", i], strict=True)
        )
        for i in range(len(batches))
    ]
    print(f"\nprompt lookup, {kind}, {rows} rows: {' '.join(f'{r:.2f}' for r in ratios)}")
    which, ratio = ("median", statistics.median) if kind == "rewriting" else ("least", min)
    work = f"prompt lookup, {kind}, {rows} rows, the {which}"
    told(work, "without drafts", ratio(ratios), aim)
