"""Full fine-tuning of MiniLM (22.7M) in float32, eager against patched: batches of 16, fused AdamW.

Real texts, as padded as their collator pads them: to a fixed length, or to the longest of the batch.
The steps of both sides see the same batches in the same order; first their losses are compared.
The floor counts the matrix products over real tokens.
"""

import copy
from pathlib import Path

import pytest
import torch
import transformers

from fastft.finetune import assets, floor
from fastft.finetune.labelled import TAGS, read_conll, read_reviews
from fastft.patch import patch

BATCH, BATCHES = 16, 6


def reviews(tokenizer, source: str, length: int) -> list[dict]:
    """Batches as DataCollatorWithPadding makes them; cut and, with a length, padded to it."""
    path = assets.dataset("reviews")
    pairs = read_reviews(Path(path), source, 0)[0][: BATCH * BATCHES]
    return [
        {
            **tokenizer(
                [text for text, _ in chosen], truncation=True, max_length=512 if source == "imdb" else 128,
                padding="max_length" if length else "longest", return_tensors="pt",
            ),
            "labels": torch.tensor([label for _, label in chosen]),
        }
        for chosen in (pairs[i : i + BATCH] for i in range(0, len(pairs), BATCH))
    ]  # fmt: skip


def entities(tokenizer, length: int) -> list[dict]:
    sentences = read_conll(Path(assets.dataset("conll2003")) / "train.txt")[
        1000 : 1000 + BATCH * BATCHES
    ]
    batches = []
    for start in range(0, len(sentences), BATCH):
        words = [w for w, _ in sentences[start : start + BATCH]]
        batch = tokenizer(
            words, is_split_into_words=True, truncation=True, max_length=length,
            padding="max_length", return_tensors="pt",
        )  # fmt: skip
        labels = torch.full(batch["input_ids"].shape, -100)
        for row, (_, tags) in enumerate(sentences[start : start + BATCH]):
            for place, word in enumerate(batch.word_ids(row)):
                if word is not None:
                    labels[row, place] = TAGS.index(tags[word])
        batches.append({**batch, "labels": labels})
    return batches


def unpadded(tokenizer) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 20000, (BATCHES, BATCH, 128), generator=generator)
    mask = torch.ones(BATCH, 128, dtype=torch.long)
    labels = torch.randint(0, 2, (BATCH,), generator=generator)
    return [{"input_ids": i, "attention_mask": mask, "labels": labels} for i in ids]


CASES = {
    "Rotten Tomatoes, padded to 128": (lambda t: reviews(t, "rotten_tomatoes", 128), 5.0),
    "Rotten Tomatoes, to the longest": (lambda t: reviews(t, "rotten_tomatoes", 0), 2.0),
    "IMDB, padded to 512": (lambda t: reviews(t, "imdb", 512), 4.0),
    "IMDB, to the longest": (lambda t: reviews(t, "imdb", 0), 3.0),
    "CoNLL-2003, padded to 128": (lambda t: entities(t, 128), 5.0),
    "no padding, 16 x 128": (unpadded, 1.2),
}


def load(labels: int, tagging: bool):
    """The model with a new head, dropout off: both sides must compute the same."""
    auto = transformers.AutoModelForTokenClassification if tagging else None
    auto = auto or transformers.AutoModelForSequenceClassification
    torch.manual_seed(0)
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return auto.from_pretrained(assets.model("all-MiniLM-L6-v2"), num_labels=labels, **off).train()


def stepper(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step(batch) -> float:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def operations(model, batch) -> int:
    """Forward and backward products over real tokens; embeddings are no product."""
    lengths = batch["attention_mask"].sum(1)
    config = model.config
    tokens = sum(p.numel() for n, p in model.named_parameters() if "layer." in n and p.dim() == 2)
    attention = 4 * config.hidden_size * config.num_hidden_layers
    return 3 * int(2 * tokens * lengths.sum() + attention * lengths.square().sum())


@pytest.mark.parametrize("work", CASES)
def bench_training_step(versus, work):
    make, aim = CASES[work]
    transformers.logging.set_verbosity_error()
    tokenizer = transformers.AutoTokenizer.from_pretrained(assets.model("all-MiniLM-L6-v2"))
    batches, tagging = make(tokenizer), "CoNLL" in work
    eager = load(len(TAGS) if tagging else 2, tagging)
    patched = copy.deepcopy(eager)
    patch(patched)
    steps = {"eager": stepper(eager), "fastft": stepper(patched)}
    real = sum(int(b["attention_mask"].sum()) for b in batches)
    print(f"\n{work}: {real} real tokens of {sum(b['input_ids'].numel() for b in batches)}")
    turn = {name: 0 for name in steps}

    def run(name):
        batch = batches[turn[name] % BATCHES]
        turn[name] += 1
        return steps[name](batch)

    def check(_):
        for _ in range(BATCHES - 1):
            torch.testing.assert_close(run("fastft"), run("eager"), rtol=1e-4, atol=1e-5)

    work_of_step = sum(operations(eager, b) for b in batches) / BATCHES
    versus(
        f"MiniLM step, {work}", {name: lambda n=name: run(n) for name in steps},
        at_least=aim, floor=work_of_step / floor.measure().operations, check=check,
        rounds=BATCHES if "IMDB" in work else 2 * BATCHES,
    )  # fmt: skip


def bench_prediction(versus):
    """A test set in batches of 16, to the longest of the batch, without gradients."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(assets.model("all-MiniLM-L6-v2"))
    batches = [
        {k: v for k, v in b.items() if k != "labels"}
        for b in reviews(tokenizer, "rotten_tomatoes", 0)
    ]
    eager = load(2, False).eval()
    patched = copy.deepcopy(eager)
    patch(patched)

    def predict(model):
        with torch.no_grad():
            return torch.cat([model(**batch).logits for batch in batches])

    def check(results):
        torch.testing.assert_close(results["fastft"], results["eager"], rtol=1e-4, atol=1e-5)

    sides = {"eager": lambda: predict(eager), "fastft": lambda: predict(patched)}
    versus("MiniLM prediction, Rotten Tomatoes", sides, at_least=1.8, check=check)
