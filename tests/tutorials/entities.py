"""Named entities with BertForTokenClassification, a Dataset of padded tags, and seqeval's report.

python tests/tutorials/entities.py             fine-tunes MiniLM on CoNLL-2003, on the CPU
python tests/tutorials/entities.py --eager     the same without fastft
"""

import argparse
import time
from pathlib import Path

import seqeval.metrics
import torch
from torch.utils.data import DataLoader, Dataset
from transformers import AutoTokenizer, BertForTokenClassification, get_scheduler

import fastft
from fastft.finetune import assets, labelled


def read():
    folder = Path(assets.dataset("conll2003"))
    return [labelled.read_conll(folder / f"{part}.txt") for part in ("train", "test")]


class Tagged(Dataset):
    """Sentences in pieces, padded to a length; the tag of a word stands at its first piece."""

    def __init__(self, sentences, tokenizer, length=128):
        self.encoded = tokenizer(
            [words for words, _ in sentences], is_split_into_words=True,
            padding="max_length", truncation=True, max_length=length, return_tensors="pt",
        )  # fmt: skip
        self.labels = torch.full(self.encoded["input_ids"].shape, -100)
        for row, (_, tags) in enumerate(sentences):
            before = None
            for place, word in enumerate(self.encoded.word_ids(row)):
                if word is not None and word != before:
                    self.labels[row, place] = labelled.TAGS.index(tags[word])
                before = word

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, row):
        item = {name: values[row] for name, values in self.encoded.items()}
        return item | {"labels": self.labels[row]}


def main(arguments=None, model_path=None, data=None) -> float:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--eager", action="store_true", help="leave the model as it is")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    model_path = model_path or assets.model("all-MiniLM-L6-v2")
    train, test = data or read()

    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = BertForTokenClassification.from_pretrained(model_path, num_labels=len(labelled.TAGS))
    if not args.eager:
        print(fastft.patch(model))  # the line that is added

    loader = DataLoader(Tagged(train, tokenizer), batch_size=16, shuffle=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4, fused=True)
    steps = args.epochs * len(loader)
    schedule = get_scheduler(
        "linear", optimizer, num_warmup_steps=steps // 10, num_training_steps=steps
    )

    start = time.perf_counter()
    model.train()
    for epoch in range(args.epochs):
        total = 0.0
        for step, batch in enumerate(loader, 1):
            loss = model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            total += loss.item()
            if step % 100 == 0 or step == len(loader):
                where = f"epoch {epoch + 1} step {step}/{len(loader)}"
                print(f"{where} loss {total / step:.3f} {time.perf_counter() - start:.0f} s")
    trained = time.perf_counter() - start

    model.eval()
    predicted, truth = [], []
    with torch.no_grad():
        for batch in DataLoader(Tagged(test, tokenizer), batch_size=16):
            labels = batch.pop("labels")
            for guess, label in zip(model(**batch).logits.argmax(-1), labels, strict=True):
                kept = label != -100
                predicted.append([labelled.TAGS[tag] for tag in guess[kept]])
                truth.append([labelled.TAGS[tag] for tag in label[kept]])
    print(seqeval.metrics.classification_report(truth, predicted, digits=3, zero_division=0))
    f1 = seqeval.metrics.f1_score(truth, predicted, zero_division=0)
    print(
        f"entity F1 {f1:.4f} on {len(truth)} test sentences, seed {args.seed}, "
        f"{args.epochs} epochs in {trained:.0f} s, {'eager' if args.eager else 'fastft'}"
    )
    return f1


if __name__ == "__main__":
    main()
