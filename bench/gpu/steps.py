"""Whole training steps, forward, backward and AdamW, of models with random weights.

Every side is a copy of one model that shares its weights and its optimizer, so that none takes
memory from another. liger-kernel changes transformers for the whole process, so it is timed in a
process of its own, after fastft rather than alternating with it.
"""

import copy
import gc
import importlib

import torch
import transformers
from torch import Tensor, nn

import fastft
from bench.gpu import peers
from bench.gpu.case import Case, Floor, Here, Report, ahead_of_all
from bench.gpu.measure import Session, Side
from bench.gpu.shapes import LLAMA_1B, LLAMA_8B, QWEN_05B, RANK, Shape

LENGTHS = (2048, 1311, 640, 287)  # of the ragged batch; padded to the longest
# Loss and gradients of the first and last layer, in bfloat16, of a model of random weights.
TOLERANCE = 0.1


def causal_lm(here: Here, shape: Shape) -> nn.Module:
    prefix = {"llama": "Llama", "qwen2": "Qwen2"}[shape.family]
    config = getattr(transformers, f"{prefix}Config")(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=8192,
        tie_word_embeddings=shape.tied,
        use_cache=False,
    )
    with torch.device(here.device):
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=here.dtype, attn_implementation="sdpa"
        )
    return model.train()


def with_lora(model: nn.Module) -> nn.Module:
    """Rank 16 on all linears, in the base's dtype, B nonzero so that every gradient is too."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, config, autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return model


def sharing(model: nn.Module) -> nn.Module:
    """Another model around the same parameters and buffers."""
    kept = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, kept)


def batch_of(here: Here, shape: Shape, ragged: bool) -> dict[str, Tensor]:
    longest = shape.tokens // 4
    lengths = [n * longest // LENGTHS[0] for n in LENGTHS] if ragged else [longest] * 4
    ids = torch.randint(1, shape.vocab, (4, longest), device=here.device)
    places = torch.arange(longest, device=here.device)
    mask = (places < torch.tensor(lengths, device=here.device)[:, None]).long()
    labels = ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


def floor_of(model: nn.Module, shape: Shape, batch: dict, lora: bool, dtype) -> Floor:
    """Products over real tokens, and in full fine-tuning what AdamW reads and writes.

    A product with a trained weight is done three times, with a frozen one twice; an adapter's
    narrow products three times. Attention, causal: 2 products forward, 4 backward, half of each.
    """
    lengths = batch["attention_mask"].sum(1)
    tokens, labelled = int(lengths.sum()), int((batch["labels"][:, 1:] >= 0).sum())
    times = 4 if lora else 6
    total = times * labelled * shape.vocab * shape.hidden
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "lora_" in name:
            total += 6 * tokens * module.weight.numel()
        elif isinstance(module, nn.Linear) and "lm_head" not in name:
            total += times * tokens * module.weight.numel()
    squares = int(lengths.square().sum())
    total += 6 * squares * shape.heads * shape.head_dim * shape.layers
    # Weight, gradient and both moments read; weight and both moments written.
    return Floor(bytes=7 * trained * dtype.itemsize, operations=total, dtype=dtype, both=True)


class Steps:
    """One model, its optimizer and batch, and the sides that train it."""

    def __init__(self, model: nn.Module, batch: dict[str, Tensor], floor: Floor):
        self.model, self.batch, self.floor = model, batch, floor
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True)
        self.tokens = int(batch["attention_mask"].sum())
        # Enough to see a wrong gradient: it goes through every layer on its way to the first.
        self.told = [*trained[:4], *trained[-4:]]

    def side(self, model: nn.Module, called=None) -> Side:
        called = model if called is None else called

        def step():
            loss = called(**self.batch).loss
            loss.backward()
            grads = tuple(p.grad for p in self.told)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            return loss.detach(), *grads

        return Side(step)

    def measure(self, session: Session, sides: dict) -> Report:
        report = session.measure(
            sides, floor=self.floor, tokens=self.tokens, queued=False, tolerance=TOLERANCE,
        )  # fmt: skip
        if session.here.device == "cuda":
            held = torch.cuda.memory_allocated() / 2**30
            report.notes.append(f"{held:.2f} GiB hold weights and optimizer, beside the peaks")
        return report


def causal_steps(here: Here, shape: Shape, lora: bool, ragged: bool) -> Steps:
    torch.manual_seed(0)
    model = causal_lm(here, shape)
    if lora:
        model = with_lora(model)
    batch = batch_of(here, shape, ragged)
    return Steps(model, batch, floor_of(model, shape, batch, lora, here.dtype))


def patched(model: nn.Module, report: Report | None = None) -> nn.Module:
    """A copy that shares the weights, patched."""
    model = sharing(model)
    told = fastft.patch(model)
    if report is not None:
        report.notes += [
            f"{e.count} x {e.module}: {e.operator or 'left alone'}, {e.implementation or e.reason}"
            for e in (*told.swapped, *told.left)
        ]
    return model


def step(session: Session, shape: Shape, lora: bool, ragged: bool, compiled: bool) -> Report:
    here, shape = session.here, shape.here(session.here)
    return compare(session, causal_steps(here, shape, lora, ragged), compiled)


def compare(session: Session, work: Steps, compiled: bool) -> Report:
    """eager, or its compiled form, against fastft."""
    here, told = session.here, Report()
    sides = {"eager": work.side(work.model), "fastft": work.side(patched(work.model, told))}
    if compiled:
        model = sharing(work.model)
        sides = {
            "fastft": sides["fastft"],
            "torch.compile": work.side(model, here.compile(model)),
        }
    report = work.measure(session, sides)
    report.notes += told.notes
    return report.judge(ahead_of_all())


def step_beside_liger(session: Session, shape: Shape, lora: bool, ragged: bool) -> Report:
    """liger-kernel after fastft: its ratio is that of the medians."""
    here, shape = session.here, shape.here(session.here)
    peers.need(here, "liger-kernel")
    work = causal_steps(here, shape, lora, ragged)
    ours = patched(work.model)
    report = work.measure(session, {"fastft": work.side(ours)})
    fastft.unpatch(ours)
    del ours
    gc.collect()
    apply = importlib.import_module("liger_kernel.transformers")._apply_liger_kernel_to_instance
    inner = work.model.get_base_model() if lora else work.model
    apply(model=inner)
    theirs = work.measure(session, {"liger-kernel": work.side(work.model)})
    theirs.rows[0].ratio = theirs.rows[0].ms / report.rows[0].ms
    report.rows += theirs.rows
    report.notes.append("one after the other, not alternating; results not compared")
    return report.judge(ahead_of_all())


def cases() -> list[Case]:
    """Name and settings; the first line is what the README would quote."""
    works = (
        ("LoRA", LLAMA_8B, True),
        ("LoRA", LLAMA_1B, True),
        ("full", QWEN_05B, False),
        ("full", LLAMA_1B, False),
    )
    made = []
    for ragged in (False, True):
        for method, shape, lora in works:
            batch = "ragged padded" if ragged else "4 x 2048"
            name = f"{method} {shape.name}, {batch}"
            made.append(Case.of(name, step, shape, lora, ragged, False))
    for method, shape, lora in works:
        name = f"{method} {shape.name}, 4 x 2048, liger-kernel"
        made.append(Case.of(name, step_beside_liger, shape, lora, False, alone="liger-kernel"))
    for method, shape, lora in reversed(works):
        name = f"{method} {shape.name}, 4 x 2048, torch.compile"
        made.append(Case.of(name, step, shape, lora, False, True, limit=240.0))
    return made
