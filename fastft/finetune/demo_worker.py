"""What the demo runs in processes of its own: `python -m fastft.finetune.demo_worker ORDER`.

ORDER is JSON with a job and the demo's settings; the result is the last line of stdout, as JSON.
"""

import json
import sys
from collections.abc import Callable
from typing import Any

import torch

from fastft.decode.peak_memory import peak_of_process
from fastft.finetune import data, demo
from fastft.foreign import ForeignModule


def memory(settings: demo.Settings, side: str) -> dict[str, Any]:
    """Peak of one side over a step on the largest batch, and what the process held before it."""
    task = demo.load_task(settings)
    model = demo.load_lora(settings)
    if side == "patched":
        from fastft.patch import patch

        patch(model)
    before = peak_of_process()
    optimizer = demo.adamw(model)
    largest = max(task.batches, key=lambda batch: batch["input_ids"].numel())
    demo.train_step(model, optimizer, largest)
    return {"peak": peak_of_process(), "before_training": before}


@torch.inference_mode()
def answer(settings: demo.Settings, adapter: str) -> dict[str, Any]:
    """The held-out loss and one answer, of the model as it came and with the saved adapter."""
    from peft import PeftModel

    task = demo.load_task(settings)
    base = demo.load_base(settings).eval()
    examples = [data.encode(record, task.tokenizer) for record in task.held_out]
    batch = data.collate(examples, data.pad_id(task.tokenizer))
    prompt = data.prompt_of(task.held_out[0], task.tokenizer)
    ids = task.tokenizer(prompt, add_special_tokens=False, return_tensors="pt")

    def ask(model: ForeignModule) -> dict[str, Any]:
        out = model.generate(
            **ids,
            max_new_tokens=48,
            do_sample=False,
            pad_token_id=data.pad_id(task.tokenizer),
        )
        new = out[0, ids["input_ids"].shape[1] :]
        text = task.tokenizer.decode(new, skip_special_tokens=True)
        return {"loss": model(**batch).loss.item(), "text": text}

    before = ask(base)
    after = ask(PeftModel.from_pretrained(base, adapter).eval())
    return {"question": data.question(task.held_out[0]), "before": before, "after": after}


def main(order: dict[str, Any]) -> None:
    settings = demo.Settings(**order.pop("settings"))
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    job: Callable[..., Any] = {"memory": memory, "answer": answer}[order.pop("job")]
    print("\n" + json.dumps(job(settings, **order)))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
