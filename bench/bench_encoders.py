"""Full fine-tuning of MiniLM (22.7M) in float32, patched against eager: batches of 16, fused AdamW.

Real texts as collators pad them, to a fixed length or to the longest of the batch; dropout as the
model has it. All sides see the same batches in the same order; first their losses without dropout
are compared. The floor counts the matrix products over real tokens.
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
    how = {"padding": "max_length" if length else "longest", "return_tensors": "pt"}
    how |= {"truncation": True, "max_length": 512 if source == "imdb" else 128}
    batches = []
    for start in range(0, len(pairs), BATCH):
        texts, labels = zip(*pairs[start : start + BATCH], strict=True)
        batches.append({**tokenizer(list(texts), **how), "labels": torch.tensor(labels)})
    return batches


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


# work -> its batches, what is aimed at, whether torch.compile runs beside it
CASES = {
    "Rotten Tomatoes, padded to 128": (lambda t: reviews(t, "rotten_tomatoes", 128), 5.0, True),
    "Rotten Tomatoes, to the longest": (lambda t: reviews(t, "rotten_tomatoes", 0), 2.0, True),
    "IMDB, padded to 512": (lambda t: reviews(t, "imdb", 512), 4.0, False),
    "IMDB, to the longest": (lambda t: reviews(t, "imdb", 0), 3.0, False),
    "CoNLL-2003, padded to 128": (lambda t: entities(t, 128), 5.0, False),
    "no padding, 16 x 128": (unpadded, 1.2, True),
}


def tokenizer():
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers.AutoTokenizer.from_pretrained(assets.model("all-MiniLM-L6-v2"))


def load(labels: int, tagging: bool):
    """The model with a new head."""
    auto = transformers.AutoModelForSequenceClassification
    auto = transformers.AutoModelForTokenClassification if tagging else auto
    torch.manual_seed(0)
    return auto.from_pretrained(assets.model("all-MiniLM-L6-v2"), num_labels=labels)


class Stepper:
    """Training steps of one side through the same batches, round and round."""

    def __init__(self, model, batches, compiled=False):
        self.model, self.batches, self.turn = model, batches, 0
        self.call = torch.compile(model, dynamic=True) if compiled else model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def __call__(self) -> float:
        batch = self.batches[self.turn % len(self.batches)]
        self.turn += 1
        loss = self.call(**batch).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


def operations(model, batch) -> int:
    """Forward and backward products over real tokens; embeddings are no product."""
    lengths, config = batch["attention_mask"].sum(1), model.config
    weights = sum(p.numel() for n, p in model.named_parameters() if "layer." in n and p.dim() == 2)
    attention = 4 * config.hidden_size * config.num_hidden_layers
    return 3 * int(2 * weights * lengths.sum() + attention * lengths.square().sum())


@pytest.mark.parametrize("work", CASES)
def bench_training_step(versus, work):
    make, aim, compiled = CASES[work]
    batches, tagging = make(tokenizer()), "CoNLL" in work
    eager = load(len(TAGS) if tagging else 2, tagging)
    patched, other = copy.deepcopy(eager), copy.deepcopy(eager)
    patch(patched)
    steps = {"eager": Stepper(eager, batches), "fastft": Stepper(patched, batches)}
    if compiled:
        steps["compiled"] = Stepper(other, batches, compiled=True)
    real = sum(int(b["attention_mask"].sum()) for b in batches)
    print(f"\n{work}: {real} real tokens of {sum(b['input_ids'].numel() for b in batches)}")

    def check(_):
        for model in (eager, patched, other):
            model.eval()  # no dropout
        for _ in range(BATCHES - 1):
            losses = {name: step() for name, step in steps.items()}
            for loss in losses.values():
                assert loss == pytest.approx(losses["eager"], rel=1e-4, abs=1e-5), losses
        for model in (eager, patched, other):
            model.train()
        steps.get("compiled", float)()  # another mode is another compilation

    for model in (eager, patched, other):
        model.eval()
    work_of_step = sum(operations(eager, b) for b in batches) / BATCHES
    versus(
        f"MiniLM step, {work}", steps, at_least=aim, check=check,
        floor=work_of_step / floor.measure().operations,
        rounds=BATCHES if "IMDB" in work else 2 * BATCHES,
    )  # fmt: skip


def bench_prediction(versus):
    """A test set in batches of 16, to the longest of the batch, without gradients."""
    batches = reviews(tokenizer(), "rotten_tomatoes", 0)
    batches = [{k: v for k, v in batch.items() if k != "labels"} for batch in batches]
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


def bench_loss_curve():
    """200 steps of both, without dropout: the curves lie within 1e-4 of each other."""
    batches = reviews(tokenizer(), "rotten_tomatoes", 0)
    eager = load(2, False).eval()
    patched = copy.deepcopy(eager)
    patch(patched)
    one, other = Stepper(eager, batches), Stepper(patched, batches)
    gaps = [abs(one() - other()) for _ in range(200)]
    print(f"\nlargest difference of the losses in 200 steps: {max(gaps):.1e}")
    assert max(gaps) <= 1e-4
