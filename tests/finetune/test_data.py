"""Instruction data: what is learned, what is padded, what is refused."""

import json

import pytest
import torch
from finetune import tiny

from fastft.finetune import UserError, data

RECORD = {"instruction": "word1 word2", "input": "word3", "output": "word4 word5"}


def test_only_the_answer_is_labelled():
    tokenizer = tiny.tokenizer()
    example = data.encode(RECORD, tokenizer)
    assert tokenizer.decode(example.ids) == (
        "<s> user word1 word2 word3 </s> <s> assistant word4 word5 </s>"
    )
    learned = [i for i in example.labels if i != data.IGNORED]
    assert tokenizer.decode(learned) == "word4 word5 </s>"
    assert example.labels[-len(learned) :] == learned == example.ids[-len(learned) :]
    assert len(example.labels) == len(example.ids)


def test_without_a_chat_template():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = None
    assert "### Response:" in data.prompt_of(RECORD, tokenizer)
    example = data.encode(RECORD, tokenizer)
    learned = [i for i in example.labels if i != data.IGNORED]
    assert tokenizer.convert_ids_to_tokens(learned) == ["word4", "word5", "</s>"]


def test_a_template_that_rewrites_earlier_turns():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% if add_generation_prompt %}<s> user {% else %}</s> {% endif %}"
    example = data.encode(RECORD, tokenizer)
    learned = [i for i in example.labels if i != data.IGNORED]
    assert tokenizer.convert_ids_to_tokens(learned) == ["word4", "word5", "</s>"]


def test_collate_pads_to_the_longest():
    batch = data.collate([data.Example([5, 6, 7], [-100, 6, 7]), data.Example([8], [8])], 2)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 2, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]
    assert all(t.dtype == torch.int64 for t in batch.values())


def test_order_depends_on_the_seed_alone():
    assert data.shuffled(50, 3) == data.shuffled(50, 3) != data.shuffled(50, 4)
    assert sorted(data.shuffled(50, 3)) == list(range(50))


@pytest.mark.parametrize(
    "content, message",
    [
        ("[", "not JSON"),
        ("[]", "not empty"),
        ('{"instruction": "a"}', "expected a JSON array"),
        (json.dumps([{"instruction": "a", "output": "b"}, {"instruction": "a"}]), "record 1"),
        (json.dumps(["a"]), "record 0"),
        (json.dumps([RECORD | {"input": 5}]), "record 0: expected a text under 'input'"),
    ],
)
def test_bad_files_are_told(tmp_path, content, message):
    path = tmp_path / "data.json"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        data.read_alpaca(path)


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        data.read_alpaca(tmp_path / "none.json")


def test_the_mark_at_the_start_of_a_file_is_no_part_of_it(tmp_path):
    path = tmp_path / "marked.json"
    path.write_text(json.dumps([RECORD]), encoding="utf-8-sig")
    assert data.read_alpaca(path) == [RECORD]
