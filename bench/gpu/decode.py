"""Decoding: fastft.generate against transformers' ways, and the operators made for it."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.gpu.case import BANDWIDTH, Case, Floor, Goal, Here, Report, Skip, at_most, randn
from bench.gpu.measure import Session, Side
from bench.gpu.shapes import LLAMA_1B, LLAMA_8B, RANK, Shape
from bench.gpu.steps import causal_lm, patched, sharing, with_lora
from fastft import generate as fastft_generate
from fastft.decode.linears import DECODE_WEIGHT
from fastft.decode.output import Stats
from fastft.decode.weights import DecodeWeight
from fastft.ops import quantized_linear as storage
from fastft.ops.decode_attention import decode_attention as fused_attention

PROMPT, NEW = 512, 64
# Settings with which a pass of the model is more than one token, so that it has no floor.
DRAFTING = {"prompt_lookup_num_tokens", "assistant_model", "speculation"}


@dataclass
class Decoding:
    """One model of random weights and its prompts, the sides that decode with it, their floors.

    Greedy, to the same number of new tokens. Random weights choose between nearly equal logits, so
    tokens are not compared: fastft compares its logits with the model's own before it decodes, and
    a side of ours that takes another path fails.
    """

    here: Here
    model: nn.Module
    ids: Tensor  # (rows, prompt)
    new: int
    sides: dict[str, Callable[[], Side]] = field(default_factory=dict)
    floors: dict[str, Floor] = field(default_factory=dict)
    stats: dict[str, Stats] = field(default_factory=dict)  # of the last run

    @staticmethod
    def of(here: Here, shape: Shape, rows: int, lora: bool = False) -> "Decoding":
        prompt, new = (8, 4) if here.toy else (PROMPT, NEW)
        model = causal_lm(here, shape)
        model.generation_config.eos_token_id = None  # every row gets all its new tokens
        model = (with_lora(model) if lora else model).eval()
        ids = torch.randint(1, shape.vocab, (rows, prompt), device=here.device)
        return Decoding(here, model, ids, new)

    @property
    def settings(self) -> dict:
        return {
            "attention_mask": torch.ones_like(self.ids), "do_sample": False, "use_cache": True,
            "max_new_tokens": self.new, "pad_token_id": 0,
        }  # fmt: skip

    def floor(self, model: nn.Module) -> Floor:
        """Every weight read once per pass, and the keys and values seen so far."""
        config = self.model.config
        rows, prompt = self.ids.shape
        seen = self.new * prompt + self.new * (self.new - 1) // 2
        slot = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        cache = rows * seen * slot * self.here.dtype.itemsize
        return Floor(bytes=self.new * stored_bytes(model) + cache)

    def theirs(self, name: str, model: nn.Module | None = None, **settings) -> None:
        """transformers' generate."""
        model = self.model if model is None else model
        settings = self.settings | settings
        if not DRAFTING & settings.keys():
            self.floors[name] = self.floor(self.model)
        self.sides[name] = Side(lambda: (model.generate(self.ids, **settings),), compare=False)

    def ours(self, name: str, make: Callable[[nn.Module], nn.Module] = lambda m: m, **more) -> None:
        """fastft.generate of what `make` makes of the model."""

        def side() -> Side:
            model = make(self.model)
            if not DRAFTING & more.keys():
                self.floors[name] = self.floor(model)

            def run() -> tuple[Tensor]:
                out = fastft_generate(model, self.ids, **self.settings, **more)
                if out.stats.path != "decoder_layer":
                    raise AssertionError(f"{out.stats.path}: {out.stats.reason}")
                if out.sequences.shape[1] != self.ids.shape[1] + self.new:
                    raise AssertionError(f"{out.stats.new_tokens} new tokens")
                self.stats[name] = out.stats
                return (out.sequences,)

            return Side(run, compare=False)

        self.sides[name] = side

    def measure(self, session: Session) -> Report:
        made = self.ids.shape[0] * self.new
        # The floors of sides that are made are known only when they are.
        report = session.measure(self.sides, floor=self.floors, tokens=made, queued=False)
        for name, stats in self.stats.items():
            told = f"{name}, without the prompt: {stats.tokens_per_second:.0f} tokens/s"
            if name in self.floors:
                moved = self.floors[name].bytes / self.new * stats.steps
                share = moved / max(stats.decode_seconds, 1e-9) / session.rates["copy"]
                told += f", {share:.0%} of copy bandwidth"
            else:
                told += f", {stats.acceptance:.0%} of the drafts accepted"
            report.notes.append(told + (f", {stats.cuda_graphs}" if stats.cuda_graphs else ""))
        return report


def stored_bytes(model: nn.Module) -> int:
    """Of what a pass reads: all weights as they are stored for it, but a table of embeddings."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    tables.discard(id(model.get_output_embeddings().weight))
    held = {id(m.weight): vars(m)[DECODE_WEIGHT] for m in model.modules()
            if DECODE_WEIGHT in vars(m)}  # fmt: skip
    total = 0
    for parameter in model.parameters():
        weight = held.get(id(parameter))
        if weight is not None:
            total += weight.stored.values.nbytes + weight.stored.scale.nbytes
        elif id(parameter) not in tables:
            total += parameter.nbytes
    return total


def quantized(bits: int) -> Callable[[nn.Module], nn.Module]:
    """Makes a model that shares the weights, those of its layers also stored in so many bits."""

    def make(model: nn.Module) -> nn.Module:
        model = sharing(model)
        head = model.get_output_embeddings()
        try:
            for module in model.modules():
                if isinstance(module, nn.Linear) and module is not head:
                    weight = module.weight.detach()
                    setattr(module, DECODE_WEIGHT, DecodeWeight.of(weight, f"int{bits}"))
        except torch.OutOfMemoryError as error:
            raise Skip("does not fit in free memory") from error
        return model

    return make


LESS_THAN_EAGER = at_most("eager", 1.0, "not slower than transformers' generate")
FEWER_BITS = Goal("fewer bits, less time", lambda rows: rows["fastft int8"].ms < rows["fastft"].ms)


def generate(session: Session, shape: Shape, rows: int) -> Report:
    """The weights as they are, and in 8 and 4 bits; the head stays as it is."""
    work = Decoding.of(session.here, shape.here(session.here), rows)
    work.theirs("eager")
    work.theirs("patched", patched(work.model))
    work.ours("fastft")
    work.ours("fastft int8", quantized(8))
    work.ours("fastft int4", quantized(4))
    return work.measure(session).judge(LESS_THAN_EAGER, FEWER_BITS)


def generate_lora(session: Session, shape: Shape, rows: int) -> Report:
    """Adapters on all linear layers, unmerged."""
    work = Decoding.of(session.here, shape.here(session.here), rows, lora=True)
    work.theirs("eager")
    work.ours("fastft")
    return work.measure(session).judge(LESS_THAN_EAGER)


def generate_drafting(session: Session, shape: Shape, rows: int) -> Report:
    """Drafts from the text and from a small model. What random weights accept is told: it is no
    language model's rate."""
    here, shape = session.here, shape.here(session.here)
    work = Decoding.of(here, shape, rows)
    small = replace(shape, hidden=shape.hidden // 4, intermediate=shape.intermediate // 4,
                    layers=2, heads=shape.heads // 2, kv_heads=shape.kv_heads // 2)  # fmt: skip
    draft = causal_lm(here, small).eval()
    draft.generation_config.use_cache, draft.config.use_cache = True, True
    work.theirs("eager")
    work.theirs("transformers, prompt lookup", prompt_lookup_num_tokens=10)
    work.theirs("transformers, draft model", assistant_model=draft)
    work.ours("fastft")
    work.ours("fastft, prompt lookup", speculation="prompt_lookup")
    work.ours("fastft, draft model", speculation=draft)
    return work.measure(session).judge(LESS_THAN_EAGER)


def generate_compiled(session: Session, shape: Shape, rows: int) -> Report:
    """Beside a static cache, with which transformers compiles its step on a GPU."""
    work = Decoding.of(session.here, shape.here(session.here), rows)
    static = "transformers, static cache, compiled"
    work.ours("fastft")
    work.theirs(static, cache_implementation="static")
    return work.measure(session).judge(at_most(static, 1.0, "not slower than it compiled"))


def decode_attention(session: Session, shape: Shape, rows: int) -> Report:
    """One query per row over caches of different lengths."""
    here, shape = session.here, shape.here(session.here)
    capacity = 32 if here.toy else 8192
    query = randn(here, rows, 1, shape.heads, shape.head_dim)
    cache = rows, shape.kv_heads, capacity, shape.head_dim
    keys, values = randn(here, *cache), randn(here, *cache)
    lengths = torch.linspace(capacity // 4, capacity, rows, device=here.device).to(torch.int32)
    mask = (torch.arange(capacity, device=here.device) < lengths[:, None])[:, None, None]

    def eager():
        q = query.transpose(1, 2)
        out = F.scaled_dot_product_attention(q, keys, values, mask, enable_gqa=True)
        return (out.transpose(1, 2),)

    seen = int(lengths.sum()) * shape.kv_heads * shape.head_dim
    sides = {
        "eager": Side(eager),
        "fastft": Side(lambda: (fused_attention(query, keys, values, lengths),)),
    }
    floor = Floor(bytes=2 * seen * keys.element_size())
    return session.measure(sides, floor=floor).judge(BANDWIDTH)


def quantized_linear(session: Session, shape: Shape, bits: int, rows: int, lora: bool) -> Report:
    """x W^T for a few rows; the floor reads the stored weight once."""
    here, shape = session.here, shape.here(session.here)
    x = randn(here, rows, shape.hidden)
    weight = randn(here, shape.intermediate, shape.hidden, std=shape.hidden**-0.5)
    a = randn(here, RANK, shape.hidden, std=shape.hidden**-0.5)
    b = randn(here, shape.intermediate, RANK, std=0.1)
    stored = weight if bits == 16 else storage.quantize(weight, bits)
    plain = weight if bits == 16 else storage.dequantize(stored, here.dtype)
    adapter = storage.Adapter(a, b, 2.0) if lora else None

    def eager():
        y = F.linear(x, plain)
        return (y + F.linear(F.linear(x, a), b) * 2.0 if lora else y,)

    sides = {
        "eager": Side(eager),
        "fastft": Side(lambda: (storage.quantized_linear(x, stored, None, adapter),)),
    }
    floor = Floor(bytes=weight.numel() * bits // 8)
    return session.measure(sides, floor=floor).judge(BANDWIDTH)


def inference(function):
    """Nothing here has gradients."""
    return torch.no_grad()(function)


def cases() -> list[Case]:
    made = [
        Case.of(
            f"decode_attention {shape.name}, {rows} rows", inference(decode_attention), shape, rows
        )
        for shape in (LLAMA_8B, LLAMA_1B)
        for rows in (1, 8, 64)
    ]
    for bits in (16, 8, 4):
        for rows in (1, 4, 16):
            for lora in (False, True):
                name = f"quantized_linear {LLAMA_8B.name}, {bits} bits, {rows} rows"
                name += ", LoRA" if lora else ""
                call = inference(quantized_linear), LLAMA_8B, bits, rows, lora
                made.append(Case.of(name, *call))
    sizes = (LLAMA_1B, 1), (LLAMA_1B, 8), (LLAMA_8B, 1), (LLAMA_8B, 8)
    works = (
        ("", generate, 240.0),
        (", LoRA", generate_lora, 120.0),
        (", drafts", generate_drafting, 240.0),
        (", compiled", generate_compiled, 300.0),
    )
    for what, function, limit in works:
        for shape, rows in sizes:
            name = f"generate {shape.name}, {rows} rows{what}"
            made.append(Case.of(name, inference(function), shape, rows, limit=limit))
    return made
