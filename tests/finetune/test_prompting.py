"""Prompts: templates, examples before the question, chats, and what is no template."""

import pytest
from finetune import tiny

from fastft.finetune import UserError
from fastft.finetune.prompting import Examples, PromptConfig, Prompter

ROWS = [
    {"text": "great fun", "label": "good"},
    {"text": "a dull bore", "label": "bad"},
    {"text": "dull and long", "label": "bad"},
    {"text": "fun for all", "label": "good"},
]


def prompter(rows=ROWS, tokenizer=None, **settings) -> Prompter:
    return Prompter(PromptConfig(**settings), list(rows[0]), tokenizer)


def test_zero_and_two_shots():
    made = prompter(template="sentiment")
    assert made.prompt(ROWS[0]) == "Review: great fun\nSentiment:"
    assert made.prompt(ROWS[0], ROWS[1:3]) == (
        "Review: a dull bore\nSentiment: bad\n\nReview: dull and long\nSentiment: bad\n\n"
        "Review: great fun\nSentiment:"
    )


def test_templates_of_rows_without_one():
    row = {"instruction": "Add.", "input": "1 1", "output": "2"}
    made = prompter([row])
    assert made.prompt(row) == "Add.\n\n1 1" and made.answer(row) == "2"
    assert "### Input:\n1 1\n\n### Response:\n" in prompter([row], template="alpaca").prompt(row)
    assert "### Input" not in prompter([row], template="alpaca").prompt(row | {"input": None})
    with pytest.raises(UserError, match="none is known for the columns left, right"):
        prompter([{"left": 1, "right": 2}])


def test_a_template_of_the_users_own(tmp_path):
    assert prompter(template="{{ text|upper }}!").prompt(ROWS[0]) == "GREAT FUN!"
    file = tmp_path / "prompt.jinja"
    file.write_text(
        "{% for e in examples %}\n{{ e.text }}={{ e.label }};\n{% endfor %}\n{{ text }}=\n"
    )
    made = prompter(template=str(file), answer="{{ label }}")
    assert made.prompt(ROWS[0], ROWS[1:2]) == "a dull bore=bad;\ngreat fun="


def test_chats_put_examples_in_turns():
    made = prompter(tokenizer=tiny.tokenizer(), template="{{ text }}", system="judge")
    assert made.prompt(ROWS[0], ROWS[1:2]) == (
        "<s> system judge </s> <s> user a dull bore </s> <s> assistant bad </s> "
        "<s> user great fun </s> <s> assistant "
    )
    plain = prompter(tokenizer=tiny.tokenizer(), template="{{ text }}", chat=False)
    assert plain.prompt(ROWS[0]) == "great fun"
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    made = prompter([{"messages": talk}], tiny.tokenizer())
    assert made.prompt({"messages": talk}) == "<s> user hi </s> <s> assistant "


@pytest.mark.parametrize("row", [{"text": "hi"}, {"messages": "hi"}, {"messages": ["hi"]}])
def test_what_is_no_conversation(row):
    made = prompter([{"messages": []}], tiny.tokenizer())
    with pytest.raises(UserError, match="messages: expected a list of turns, got"):
        made.prompt(row)
    answered = {"messages": [{"role": "assistant", "content": "hello"}]}
    with pytest.raises(UserError, match="messages: a conversation without a question"):
        made.prompt(answered)


def test_ids_begin_a_text_and_do_not_end_it():
    class Ending:
        eos_token, eos_token_id = "</s>", 2

        def __call__(self, text, add_special_tokens):
            ids = [9] * len(text.split())
            return {"input_ids": [1, *ids, 2] if add_special_tokens else ids}

    assert prompter(tokenizer=Ending()).ids("a b") == [1, 9, 9]


def test_fixed_examples_are_none_of_the_asked():
    made = prompter(examples="f", shots=2)
    assert Examples(ROWS, made, asked=ROWS[1:2]).of(ROWS[1], 0) == [ROWS[0], ROWS[2]]
    with pytest.raises(UserError, match="2 asked for, and only 1"):
        Examples(ROWS, made, asked=ROWS[1:])


def test_random_examples_differ_by_row_and_repeat_by_seed():
    rows = [{"text": f"t{i}", "label": "x"} for i in range(20)]
    drawn = [
        [Examples(rows, prompter(rows, examples="f", shots=3, selection="random", seed=s), rows)
         .of(rows[i], i) for i in range(6)]
        for s in (0, 0, 1)
    ]  # fmt: skip
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0][0] != drawn[0][1]
    assert all(rows[i] not in chosen for i, chosen in enumerate(drawn[0]))


def test_the_nearest_example_stands_last():
    made = prompter(examples="f", shots=2, selection="nearest")
    chosen = Examples(ROWS, made, ROWS).of({"text": "what a long and dull film"}, 0)
    assert chosen == [ROWS[1], ROWS[2]]
    assert ROWS[0] not in Examples(ROWS, made, ROWS).of(ROWS[0], 0)


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"template": "{{ txt }}"}, "template: 'txt' is undefined; a row has text, label"),
        ({"template": "{{ text"}, "template: line 1:"),
        ({"template": "sentimental"}, "'sentimental' is none of text, prompt"),
        ({"template": "no/where.jinja"}, "No such file"),
        ({"template": "{{ ''.__class__.__mro__ }}"}, "access to attribute '__class__'"),
        ({"template": "{% for i in range(10**9) %}x{% endfor %}{{ text }}"}, "Range too big"),
        ({"template": "{{ text + 1 }}"}, "template: can only concatenate"),
        (
            {"template": "{{ '{0}{1}'.format(text) }}"},
            "template: tuple index out of range|template: Replacement index",
        ),
        ({"chat": True}, "no chat template"),
        ({"system": "x"}, "no chat template"),
    ],
)
def test_what_is_no_template(settings, said):
    with pytest.raises(UserError, match=said):
        prompter(**settings).prompt(ROWS[0])


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"shots": 2}, "need a file"),
        ({"examples": "f"}, "set shots"),
        ({"system": "x", "chat": False}, "chat is off"),
    ],
)
def test_settings_that_do_not_belong_together(settings, said):
    with pytest.raises(UserError, match=said):
        PromptConfig(**settings)
