"""Sentiment with BertForSequenceClassification and a loop of one's own, as tutorials write it.

python tests/tutorials/sentiment.py            fine-tunes MiniLM on Rotten Tomatoes, on the CPU
python tests/tutorials/sentiment.py --eager    the same without fastft
"""

import argparse
import time

import sklearn.metrics
import torch
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoTokenizer, BertForSequenceClassification, get_scheduler

import fastft
from fastft.finetune import assets, labelled


def read(held_out: int):
    return labelled.read_reviews(assets.dataset("reviews"), "rotten_tomatoes", held_out)


def main(arguments=None, model_path=None, data=None) -> float:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--eager", action="store_true", help="leave the model as it is")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    model_path = model_path or assets.model("all-MiniLM-L6-v2")
    train, test = data or read(held_out=1000)

    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = BertForSequenceClassification.from_pretrained(model_path, num_labels=2)
    if not args.eager:
        print(fastft.patch(model))  # the line that is added

    def dataset(pairs):
        texts, labels = zip(*pairs, strict=True)
        encoded = tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=128, return_tensors="pt"
        )
        return TensorDataset(encoded["input_ids"], encoded["attention_mask"], torch.tensor(labels))

    loader = DataLoader(dataset(train), batch_size=16, shuffle=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, fused=True)
    steps = args.epochs * len(loader)
    schedule = get_scheduler(
        "linear", optimizer, num_warmup_steps=steps // 10, num_training_steps=steps
    )

    start = time.perf_counter()
    model.train()
    for epoch in range(args.epochs):
        total = 0.0
        for step, (input_ids, attention_mask, labels) in enumerate(loader, 1):
            output = model(input_ids=input_ids, attention_mask=attention_mask, labels=labels)
            output.loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            total += output.loss.item()
            if step % 50 == 0 or step == len(loader):
                where = f"epoch {epoch + 1} step {step}/{len(loader)}"
                print(f"{where} loss {total / step:.3f} {time.perf_counter() - start:.0f} s")
    trained = time.perf_counter() - start

    model.eval()
    predicted, truth = [], []
    with torch.no_grad():
        for input_ids, attention_mask, labels in DataLoader(dataset(test), batch_size=16):
            logits = model(input_ids=input_ids, attention_mask=attention_mask).logits
            predicted += logits.argmax(-1).tolist()
            truth += labels.tolist()
    names = labelled.SENTIMENTS
    print(
        sklearn.metrics.classification_report(
            truth, predicted, target_names=names, digits=3, zero_division=0
        )
    )
    accuracy = sklearn.metrics.accuracy_score(truth, predicted)
    print(
        f"accuracy {accuracy:.4f} on {len(truth)} held-out reviews, seed {args.seed}, "
        f"{args.epochs} epochs in {trained:.0f} s, {'eager' if args.eager else 'fastft'}"
    )
    return accuracy


if __name__ == "__main__":
    main()
