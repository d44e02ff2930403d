"""Formats of data: told apart by their columns, made of each other, and what does not fit said."""

import pytest

from fastft.finetune import UserError, formats
from fastft.finetune.formats import Unfit, check, convert, convert_row, detect, map_texts, text_of

ALPACA = {"instruction": "Name a color.", "input": "", "output": "Red.", "system": ""}
TURNS = [
    {"role": "user", "content": "Name a color."},
    {"role": "assistant", "content": "Red."},
]
SYSTEM = {"role": "system", "content": "Be brief."}
ROWS = {
    "alpaca": ALPACA,
    "messages": {"messages": TURNS},
    "sharegpt": {
        "conversations": [
            {"from": "human", "value": "Name a color."},
            {"from": "gpt", "value": "Red."},
        ]
    },
    "prompt-completion": {"prompt": TURNS[:1], "completion": TURNS[1:]},
    "text": {"text": "one"},
    "text-label": {"text": "good", "label": 1},
    "tokens": {"tokens": ["EU", "rejects"], "tags": ["B-ORG", "O"]},
}


@pytest.mark.parametrize("format", formats.FORMATS)
def test_each_is_detected_and_stays(format):
    row = ROWS[format]
    assert detect([row, {"other": 1}]) == format
    assert convert_row(row | {"other": 1}, format, format) == row


@pytest.mark.parametrize("to", formats.CHAT)
@pytest.mark.parametrize("source", formats.CHAT)
def test_chats_become_each_other(source, to):
    assert convert_row(ROWS[source], to, source) == ROWS[to]


@pytest.mark.parametrize("source", ["messages", "sharegpt", "prompt-completion", "alpaca"])
def test_system_turn_is_kept(source):
    held = convert_row({"messages": [SYSTEM, *TURNS]}, source, "messages")
    assert convert_row(held, "messages", source) == {"messages": [SYSTEM, *TURNS]}


@pytest.mark.parametrize("source", formats.FORMATS)
def test_every_format_becomes_text(source):
    expected = {"text": "one", "text-label": "good", "tokens": "EU rejects"}.get(
        source, "### Instruction:\nName a color.\n\n### Response:\nRed."
    )
    assert convert_row(ROWS[source], "text", source) == {"text": expected}


def test_text_is_what_alpaca_is_trained_on_without_a_chat_template():
    from fastft.finetune import data

    class Tokenizer:
        chat_template = None

    row = ALPACA | {"input": "of the sky"}
    written = convert_row(row, "text", "alpaca")["text"]
    assert written == data.prompt_of(row, Tokenizer) + "Red."


def test_texts_as_prompt_and_completion():
    row = {"prompt": "Name a color.", "completion": "Red."}
    assert convert_row(row, "messages", "prompt-completion") == ROWS["messages"]
    assert convert_row(row, "prompt-completion", "prompt-completion") == row


def test_what_turns_have_besides():
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "now"}]}
    answer = {"role": "tool", "content": "noon", "name": "now", "value": None}
    row = {"messages": [TURNS[0], call, answer, TURNS[1]]}
    turns = convert_row(row, "messages", "messages")["messages"]
    assert turns[1] == call | {"content": ""}
    assert turns[2] == {"role": "tool", "content": "noon", "name": "now"}
    for to in ("sharegpt", "text", "alpaca"):
        with pytest.raises(Unfit, match="calls of tools"):
            convert_row(row, to, "messages")


@pytest.mark.parametrize(
    "row, format, message",
    [
        ({"instruction": "a", "output": None}, "alpaca", "no output"),
        ({"instruction": "a", "output": 5}, "alpaca", "what the assistant says is not a text"),
        ({"instruction": "a", "output": " "}, "alpaca", "no answer"),
        ({"instruction": "a", "input": 5, "output": "b"}, "alpaca", "input is not a text"),
        ({"messages": TURNS[:1]}, "messages", "no answer"),
        ({"messages": []}, "messages", "turns are not a list"),
        ({"messages": ["hello"]}, "messages", "a turn is not an object"),
        (
            {"messages": [{"role": "alien", "content": "x"}]},
            "messages",
            "a turn of none of",
        ),
        ({"messages": [{"role": ["user"]}]}, "messages", "a turn of none of"),
        ({"text": 5}, "text", "text is not a text"),
        ({"text": "a", "label": None}, "text-label", "no label"),
        ({"text": "a", "label": ""}, "text-label", "no label"),
        ({"text": "a", "label": ["x", None]}, "text-label", "neither a name nor a number"),
        ({"tokens": ["a"], "tags": []}, "tokens", "not lists of words"),
        ({"tokens": ["a"], "tags": ["O", "O"]}, "tokens", "not as many tags as tokens"),
        ({"tokens": [None], "tags": ["O"]}, "tokens", "a token is not a text"),
    ],
)
def test_rows_that_do_not_fit(row, format, message):
    with pytest.raises(Unfit, match=message):
        check(row, format)


def test_conversations_that_do_not_fit_alpaca_or_a_completion():
    with pytest.raises(Unfit, match="more than one question"):
        convert_row({"messages": TURNS * 2}, "alpaca", "messages")
    with pytest.raises(Unfit, match="last turn is not an answer"):
        convert_row({"messages": TURNS + TURNS[:1]}, "prompt-completion", "messages")


def test_a_data_set_is_converted_and_the_row_that_does_not_fit_named():
    from datasets import Dataset

    held = Dataset.from_list([ALPACA | {"id": 1}] * 2)
    assert list(convert(held, "messages")) == [ROWS["messages"]] * 2
    with pytest.raises(UserError, match="row 1: no answer"):
        convert(Dataset.from_list([ALPACA, ALPACA | {"output": ""}]), "messages")


def test_formats_that_do_not_become_each_other():
    with pytest.raises(UserError, match="text cannot become messages"):
        formats.check_possible("text", "messages")
    with pytest.raises(UserError, match="expected one of alpaca"):
        formats.check_possible("alpaka", "text")
    with pytest.raises(UserError, match="columns 'a', 'b' are of no known format"):
        detect([{"a": 1}, {"b": 2}])
    with pytest.raises(UserError, match="the only column is 'text;label': .* none by ';'"):
        detect([{"text;label": "a film;good"}])


@pytest.mark.parametrize("format", formats.FORMATS)
def test_texts_are_mapped_and_nothing_else(format):
    row = ROWS[format] | {"note": "kept"}
    loud = map_texts(row, format, str.upper)
    assert text_of(loud, format) == text_of(row, format).upper() != text_of(row, format)
    assert map_texts(loud, format, str.lower) == map_texts(row, format, str.lower)
    assert loud["note"] == "kept"
    if format == "messages":
        assert [turn["role"] for turn in loud["messages"]] == ["user", "assistant"]


def test_labels_are_mapped_and_nothing_else():
    for label, expected in (("a", "A"), (["a", 1], ["A", 1]), (5, 5)):
        row = formats.map_labels({"text": "a", "label": label}, "text-label", str.upper)
        assert row == {"text": "a", "label": expected}
    row = formats.map_labels(ROWS["tokens"] | {"tags": ["b-x", "o"]}, "tokens", str.upper)
    assert row == {"tokens": ["EU", "rejects"], "tags": ["B-X", "O"]}
    assert formats.map_labels(ROWS["messages"], "messages", str.upper) == ROWS["messages"]
