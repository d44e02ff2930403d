"""A Llama-type model of 1.1 billion parameters: loaded in int8, and a LoRA step of 1 x 256 tokens.

`python -m bench.int8_large SIDE FOLDER` runs one side over a checkpoint that `write` made and
prints seconds to load, seconds of a step and peak memory as JSON; `section` runs both.
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
TOKENS, STEPS = 256, 3
SIDES = ("eager", "fastft")


def _config():
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32,
        num_key_value_heads=4, vocab_size=32000, max_position_embeddings=2048,
        tie_word_embeddings=False,
    )  # fmt: skip


def write(folder: Path) -> int:
    """The checkpoint, in bfloat16 and a file per layer, no more than one in memory; parameters."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaForCausalLM

    config = _config()
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in LlamaForCausalLM(config).named_parameters()}
    groups: dict[str, list[str]] = {}
    for name in shapes:
        layer = name.split(".layers.")[-1].split(".")[0] if ".layers." in name else name
        groups.setdefault(layer, []).append(name)
    places = {}
    for i, names in enumerate(groups.values()):
        file = f"model-{i + 1:05}-of-{len(groups):05}.safetensors"
        held = {}
        for name in names:
            normal = torch.randn(shapes[name], dtype=torch.bfloat16) * 0.02
            held[name] = normal if len(shapes[name]) == 2 else torch.ones_like(normal)
        save_file(held, folder / file)
        places |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return sum(shape.numel() for shape in shapes.values())


def run(side: str, folder: str) -> dict:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    import fastft
    from fastft.decode.peak_memory import peak_of_process

    start = time.perf_counter()
    if side == "eager":
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    else:
        model = fastft.load(folder)
    loaded = time.perf_counter() - start
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
    if side == "fastft":
        fastft.patch(model)
    model.train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4)
    ids = torch.randint(0, model.config.vocab_size, (1, TOKENS))
    taken, losses = [], []
    for _ in range(STEPS + 1):
        start = time.perf_counter(), time.process_time()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        taken.append((time.perf_counter() - start[0], time.process_time() - start[1]))
        losses.append(loss.item())
    seconds, processor = (statistics.median(column) for column in zip(*taken[1:], strict=True))
    return {"loaded": loaded, "step": seconds, "processor": processor,
            "peak": peak_of_process(), "loss": losses[0]}  # fmt: skip


def section(work: Path, threads: int) -> str:
    from bench.workflows import table

    parameters = write(work)
    rows = [("side", "loading", "step", "tokens per second", "processor time of a step",
             "peak memory", "first loss")]  # fmt: skip
    for side in SIDES:
        command = [sys.executable, "-m", "bench.int8_large", side, str(work), str(threads)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stderr[-3000:]}")
        found = json.loads(done.stdout.splitlines()[-1])
        rows.append((
            {"eager": "PEFT eager, float32", "fastft": "fastft, int8 base"}[side],
            f"{found['loaded']:.0f} s", f"{found['step']:.2f} s", f"{TOKENS / found['step']:.1f}",
            f"{found['processor']:.2f} s", f"{found['peak'] / 2**30:.2f} GB",
            f"{found['loss']:.3f}",
        ))  # fmt: skip
    return (
        f"A Llama-type model of {parameters / 1e9:.2f} billion parameters, random weights, in "
        f"bfloat16 files of a layer each; LoRA of rank 8 on all linear layers, a step of 1 x "
        f"{TOKENS} tokens, median of {STEPS}. `fastft.load` rounds the layers while they are "
        "read; goal: at most 4 GB.\n\n" + table(rows)
    )


if __name__ == "__main__":
    import torch

    torch.set_num_threads(int(sys.argv[3]) if len(sys.argv) > 3 else 2)
    print(json.dumps(run(sys.argv[1], sys.argv[2])))
