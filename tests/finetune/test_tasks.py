"""What each task gives the model: ids, labels, which tokens count."""

from types import SimpleNamespace

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from finetune import tiny

from fastft.finetune import UserError, data, examples, reading
from fastft.finetune.data import IGNORED
from fastft.finetune.tasks import classify, lm, ner, sft

TOKENIZER = tiny.tokenizer()
CHAT = [
    {"role": "user", "content": "word1"},
    {"role": "assistant", "content": "word2 word3"},
    {"role": "user", "content": "word4"},
    {"role": "assistant", "content": "word5"},
]


def config(**settings):
    usual = {
        "text_column": None, "label_column": None, "multi_label": False, "max_length": 32,
        "packing": None, "method": "full", "learn": "completion", "task": "sft",
    }  # fmt: skip
    return SimpleNamespace(**usual | settings)


def learned(labels) -> list[str]:
    return TOKENIZER.convert_ids_to_tokens([label for label in labels if label != IGNORED])


def test_what_is_learned_of_a_chat():
    whole = TOKENIZER.apply_chat_template(CHAT, tokenize=False).split()
    for learn, tokens in {
        "completion": ["word5", "</s>"],
        "assistant": ["word2", "word3", "</s>", "word5", "</s>"],
        "all": whole,
    }.items():
        ids, labels = sft.tokenize(CHAT, TOKENIZER, learn)
        assert TOKENIZER.convert_ids_to_tokens(ids) == whole and learned(labels) == tokens
        assert all(label in (own, IGNORED) for own, label in zip(ids, labels, strict=True))


def test_a_single_answer_is_what_the_demo_learns():
    record = {"instruction": "word1 word2", "output": "word3"}
    chat = [
        {"role": "user", "content": "word1 word2"},
        {"role": "assistant", "content": "word3"},
    ]
    for template in (TOKENIZER.chat_template, None):
        tokenizer = tiny.tokenizer()
        tokenizer.chat_template = template
        expected = data.encode(record, tokenizer)
        assert sft.tokenize(chat, tokenizer, "completion") == (expected.ids, expected.labels)


def test_a_template_that_rewrites_turns():
    tokenizer = tiny.tokenizer()
    # Like those that drop the thoughts of all turns but the last.
    tokenizer.chat_template = (
        "{% for m in messages %}<s> {{ m.role }} "
        "{{ m.content if loop.last or m.role == 'user' else 'word0' }} </s> {% endfor %}"
        "{% if add_generation_prompt %}<s> assistant {% endif %}"
    )
    with pytest.raises(UserError, match="learn: completion"):
        sft.tokenize(CHAT, tokenizer, "assistant")
    _, labels = sft.tokenize(CHAT, tokenizer, "completion")
    assert learned(labels)[0] == "word5"


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "list of messages"),
        ([{"role": "user", "content": "a"}], "no message of the assistant"),
        ([{"role": "robot", "content": "a"}], "of a role"),
        ([{"role": "assistant", "content": None}], "content"),
    ],
)
def test_no_chat(messages, words):
    with pytest.raises(UserError, match=words):
        sft.tokenize(messages, TOKENIZER, "completion")


def test_packed_rows_hold_the_same_examples():
    rows = Dataset.from_list([{"messages": CHAT[:2]}, {"messages": CHAT}, {"messages": CHAT[2:]}])
    single = sft.encode(rows, TOKENIZER, config(packing=False))
    packed = sft.encode(rows, TOKENIZER, config())
    assert len(packed) == 2 and len(single) == 3
    parts = []
    for row in packed:
        starts = [sum(row["seq_lengths"][:i]) for i in range(len(row["seq_lengths"]) + 1)]
        parts += [row["labels"][a:b] for a, b in zip(starts, starts[1:], strict=False)]
    assert sorted(parts) == sorted(single["labels"])
    batch = sft.collator(TOKENIZER, config())(list(packed))
    assert batch["input_ids"].shape == (1, sum(map(len, single["input_ids"])))
    assert (batch["position_ids"] == 0).sum() == 3
    with pytest.raises(UserError, match="packing: not with the method prefix"):
        sft.encode(rows, TOKENIZER, config(method="prefix", packing=True))
    assert "seq_lengths" not in sft.encode(rows, TOKENIZER, config(method="prefix")).column_names


def test_an_answer_beyond_the_length_is_nothing_to_learn():
    rows = Dataset.from_list([{"messages": CHAT[:2]}])
    with pytest.raises(UserError, match="nothing is learned"):
        sft.encode(rows, TOKENIZER, config(max_length=4))


def test_packed_texts_lose_no_token():
    rows = Dataset.from_list(tiny.texts(10))
    packed = lm.encode(rows, TOKENIZER, config(max_length=16))
    stream = [token for row in packed["input_ids"] for token in row]
    expected = [TOKENIZER(text)["input_ids"] + [2] for text in rows["text"]]
    assert stream == sum(expected, []) and packed["labels"][:] == packed["input_ids"][:]
    assert {len(row) for row in packed["input_ids"][:-1]} == {16}
    apart = lm.encode(rows, TOKENIZER, config(max_length=6, packing=False))
    assert apart["input_ids"][:] == [row[:6] for row in expected]


def test_the_lines_of_a_file_are_one_text(tmp_path):
    file = tmp_path / "book.txt"
    file.write_text("word1 word2\n\nword3\nword4\n" * 5)
    settings = config(
        task="lm", data=str(file), validation_data=None, validation=0.2, folds=0, seed=0,
        early_stopping=0,
    )  # fmt: skip
    rows = examples.read(settings)
    assert rows["validation"]["text"][:] == ["word1 word2", "", "word3", "word4"]
    encoded = examples.encode(rows, TOKENIZER, settings, None)
    ids = encoded["validation"]["input_ids"]
    assert TOKENIZER.convert_ids_to_tokens(ids[0]) == ["word1", "word2", "word3", "word4", "</s>"]


def test_nothing_to_predict():
    with pytest.raises(UserError, match="no token to predict"):
        lm.encode(Dataset.from_list([{"text": ""}]), tiny.tokenizer(), config())


def test_tags_stand_at_the_first_token_of_a_word():
    assert ner.align([None, 0, 0, 1, 2, 2, None], [5, 6, 7]) == [
        IGNORED, 5, IGNORED, 6, 7, IGNORED, IGNORED,
    ]  # fmt: skip
    rows = Dataset.from_list(tiny.tagged(4))
    encoded = ner.encode(rows, TOKENIZER, config(max_length=4), ["O", "B-PER"])
    for own, row in zip(encoded, rows, strict=True):
        names = [["O", "B-PER"][label] for label in own["labels"]]
        assert names == row["tags"][: len(names)] and len(names) == 4
    assert ner.names(rows, config()) == ["O", "B-PER"]
    assert ner.names(rows, config(), ["B-PER", "B-LOC", "O"]) == ["B-PER", "B-LOC", "O"]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"tokens": ["a"], "tags": ["O", "O"]}, "row 1: 1 words and 2 tags"),
        ({"tokens": ["a"], "tags": ["B-X"]}, "row 1: the tag 'B-X'"),
        ({"tokens": [], "tags": []}, "row 1: expected a list of words"),
    ],
)
def test_wrong_tags(row, words):
    rows = Dataset.from_list([{"tokens": ["a"], "tags": ["O"]}, row])
    with pytest.raises(UserError, match=words):
        ner.encode(rows, TOKENIZER, config(), ["O", "B-PER"])


def test_classes_keep_the_order_the_model_knows():
    rows = Dataset.from_list([{"text": "a", "label": n} for n in (10, 2, 1)])
    assert classify.names(rows, config()) == ["1", "2", "10"]
    assert classify.names(rows, config(), ["10", "1", "2", "3"]) == ["10", "1", "2", "3"]
    assert classify.names(rows, config(), ["1", "2"]) == ["1", "2", "10"]


def test_a_parquet_file_that_names_its_classes(tmp_path):
    """As `datasets` writes it: numbers, and in the schema what they stand for."""
    texts = {"text": Value("string"), "label": ClassLabel(names=["good", "bad"])}
    words = {"tokens": List(Value("string")), "tags": List(ClassLabel(names=["O", "B-PER"]))}
    held = {
        "a": ({"text": ["word1", "word2"], "label": [1, 0]}, texts),
        "b": ({"tokens": [["word1", "word2"]], "tags": [[1, 0]]}, words),
    }
    for name, (columns, features) in held.items():
        written = Dataset.from_dict(columns, features=Features(features))
        written.to_parquet(tmp_path / f"{name}.parquet")
    rows = reading.rows(tmp_path / "a.parquet")
    assert classify.names(rows, config()) == ["bad", "good"]
    assert classify.encode(rows, TOKENIZER, config(), ["bad", "good"])["labels"][:] == [0, 1]
    rows = reading.rows(tmp_path / "b.parquet")
    assert ner.names(rows, config()) == ["O", "B-PER"]
    assert ner.encode(rows, TOKENIZER, config(), ["O", "B-PER"])["labels"][:] == [[1, 0]]


def test_several_labels_are_a_row_of_ones():
    rows = Dataset.from_list([{"text": "word1", "label": "a, b"}, {"text": "word2", "label": ""}])
    encoded = classify.encode(rows, TOKENIZER, config(multi_label=True), ["a", "b", "c"])
    assert encoded["labels"][:] == [[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
    batch = classify.collator(tokenizer(), config())(list(encoded))
    assert batch["labels"].dtype == torch.float32


def tokenizer():
    made = tiny.tokenizer()
    made.pad_token = "</s>"
    return made


def test_held_out_rows_keep_the_shares_of_the_labels(tmp_path):
    rows = tiny.labelled(20) + [{"text": "word9", "label": "good"}] * 20
    file = tiny.save_rows(tmp_path / "rows.jsonl", rows)
    settings = config(
        task="classify", data=str(file), validation_data=None, validation=0.2, folds=0, seed=0,
        early_stopping=0,
    )  # fmt: skip
    held = examples.read(settings)["validation"]["label"][:]
    assert sorted(held) == ["bad"] * 2 + ["good"] * 6


def test_lengths_fit_the_model():
    def limit(config_of_model=None, **settings):
        model = SimpleNamespace(
            **{"max_position_embeddings": 64, "model_type": "bert", "pad_token_id": 1}
            | (config_of_model or {})
        )
        own = config(**{"max_length": None, "task": "classify", "virtual_tokens": 20} | settings)
        return examples.limit(own, TOKENIZER, model)

    assert limit() == 64 and limit(max_length=10) == 10
    assert limit({"model_type": "xlm-roberta"}) == 62
    assert limit(method="prefix") == 44
    assert limit({"max_position_embeddings": None}) == 512
    with pytest.raises(UserError, match="more than the model's 64 tokens"):
        limit(max_length=65)
