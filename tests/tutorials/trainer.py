"""Sentiment with Trainer, TrainingArguments and DataCollatorWithPadding.

python tests/tutorials/trainer.py              fine-tunes MiniLM on IMDB's shorter reviews
python tests/tutorials/trainer.py --eager      the same without fastft
"""

import argparse

import numpy
import sklearn.metrics
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

import fastft
from fastft.finetune import assets, labelled


def read(held_out: int):
    pairs = labelled.read_reviews(assets.dataset("reviews"), "imdb", 0)[0]
    shorter = [pair for pair in pairs if len(pair[0]) < 800]
    return shorter[held_out : held_out + 4000], shorter[:held_out]


def accuracy(evaluation) -> dict[str, float]:
    predicted = numpy.argmax(evaluation.predictions, axis=-1)
    return {"accuracy": sklearn.metrics.accuracy_score(evaluation.label_ids, predicted)}


def main(arguments=None, model_path=None, data=None) -> float:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--eager", action="store_true", help="leave the model as it is")
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="sentiment", help="folder for checkpoints")
    args = parser.parse_args(arguments)
    model_path = model_path or assets.model("all-MiniLM-L6-v2")
    train, test = data or read(held_out=500)

    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForSequenceClassification.from_pretrained(model_path, num_labels=2)
    if not args.eager:
        print(fastft.patch(model))  # the line that is added

    def dataset(pairs):
        texts, labels = zip(*pairs, strict=True)
        rows = Dataset.from_dict({"text": texts, "labels": labels})
        return rows.map(lambda batch: tokenizer(batch["text"], truncation=True), batched=True)

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=args.output,
            num_train_epochs=args.epochs,
            per_device_train_batch_size=16,
            learning_rate=5e-5,
            warmup_steps=0.1,
            train_sampling_strategy="group_by_length",
            logging_steps=25,
            save_strategy="no",
            report_to="none",
            seed=args.seed,
            use_cpu=True,
        ),
        train_dataset=dataset(train),
        eval_dataset=dataset(test),
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        compute_metrics=accuracy,
    )
    trained = trainer.train()
    found = trainer.evaluate()["eval_accuracy"]
    print(
        f"accuracy {found:.4f} on {len(test)} held-out reviews, seed {args.seed}, "
        f"{trained.metrics['train_runtime']:.0f} s, {'eager' if args.eager else 'fastft'}"
    )
    return found


if __name__ == "__main__":
    main()
