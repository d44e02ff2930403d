"""The shapes in which fine-tuning data comes, told apart by their columns, and made of each other.

    alpaca             instruction, output; perhaps input, system
    messages           messages: [{"role": "user", "content": …}, …], as chat templates take them
    sharegpt           conversations: [{"from": "human", "value": …}, …]; perhaps system
    prompt-completion  prompt, completion: both texts, or both lists of messages
    text               text
    text-label         text, label: a name, a number, or a list of them
    tokens             tokens: words; tags: one per word

The first four become each other through messages, and every format becomes text.
"""

from collections.abc import Callable, Iterable
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, get_args

from fastft.finetune import UserError, data
from fastft.finetune.readers import Row

if TYPE_CHECKING:
    from datasets import Dataset

Format = Literal[
    "alpaca", "messages", "sharegpt", "prompt-completion", "text", "text-label", "tokens"
]
FORMATS: tuple[str, ...] = get_args(Format)
CHAT = ("alpaca", "messages", "sharegpt", "prompt-completion")
# The columns that hold text, in the order in which they are read.
TEXTS = {
    "alpaca": ("system", "instruction", "input", "output"),
    "messages": ("messages",),
    "sharegpt": ("system", "conversations"),
    "prompt-completion": ("prompt", "completion"),
    "text": ("text",),
    "text-label": ("text",),
    "tokens": ("tokens",),
}
LABELS = {"text-label": ("label",), "tokens": ("tags",)}
# Enough of them, and the row is of that format; the first that fits is taken.
MARKS = {
    "alpaca": ("instruction", "output"),
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt-completion": ("prompt", "completion"),
    "tokens": ("tokens", "tags"),
    "text-label": ("text", "label"),
    "text": ("text",),
}
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
SHAREGPT = {"user": "human", "assistant": "gpt", "system": "system", "tool": "observation"}


class Unfit(ValueError):
    """A row that is not of its format, or that the format asked for has no place for.

    Its message is one of few, with nothing of the row in it: rows are counted by it.
    """


def detect(rows: Iterable[Row], named: bool = True) -> str:
    """The format of rows, by the columns that the first of them have.

    named: settings can name the columns of texts and labels. Raises: UserError where they are of
    none.
    """
    columns = {name: None for row in islice(rows, 100) for name in row}
    for name, marks in MARKS.items():
        if columns.keys() >= set(marks):
            return name
    if len(columns) == 1 and (between := set(next(iter(columns))) & set(";\t|")):
        raise UserError(
            f"the only column is {next(iter(columns))!r}: columns of a .csv are told apart by "
            f"commas, those of a .tsv by tabs, and none by {between.pop()!r}"
        )
    listed = "; ".join(f"{name}: {', '.join(marks)}" for name, marks in MARKS.items())
    advice = "rename them"
    if named:
        advice += (
            ", or name that of texts by text_column and that of labels, if any, by label_column"
        )
    raise UserError(
        f"columns {', '.join(map(repr, columns))} are of no known format ({listed}); {advice}"
    )


def convert(dataset: "Dataset", to: str, source: str | None = None) -> "Dataset":
    """dataset in format `to`, with that format's columns alone; source None detects its own.

    Raises: UserError for formats that do not become each other, and for a row that does not fit.
    """
    source = source or detect(dataset, named=False)
    check_possible(source, to)

    def one(row: Row, index: int) -> Row:
        try:
            return convert_row(row, to, source)
        except Unfit as why:
            raise UserError(f"row {index}: {why}") from None

    return dataset.map(one, with_indices=True, remove_columns=dataset.column_names)


def check_possible(source: str, to: str) -> None:
    """Raises UserError where rows of format source cannot become rows of format `to`."""
    for name in (source, to):
        if name not in FORMATS:
            raise UserError(f"format {name!r}: expected one of {', '.join(FORMATS)}")
    if source != to and to != "text" and not (source in CHAT and to in CHAT):
        raise UserError(f"{source} cannot become {to}: only {', '.join(CHAT)} become each other")


def convert_row(row: Row, to: str, source: str) -> Row:
    """One row of format source as a row of format `to`; raises Unfit."""
    check(row, source)
    if source == to == "messages":
        return {"messages": messages_of(row, source)}
    if source == to:
        optional = [name for name in TEXTS[to] if row.get(name) is not None]
        return {name: row[name] for name in dict.fromkeys([*MARKS[to], *optional])}
    if source in CHAT:
        return _FROM_MESSAGES[to](messages_of(row, source))
    return {"text": text_of(row, source)}


def check(row: Row, format: str) -> None:
    """Raises Unfit where a row of this format lacks a value or has one of the wrong type."""
    for name in MARKS[format]:
        if row.get(name) is None:
            raise Unfit(f"no {name}")
    if format in CHAT:
        if not any(_answers(turn) for turn in messages_of(row, format)):
            raise Unfit("no answer")
    elif format == "tokens":
        if not all(isinstance(row[n], list) and row[n] for n in ("tokens", "tags")):
            raise Unfit("tokens and tags are not lists of words")
        if not all(isinstance(token, str) for token in row["tokens"]):
            raise Unfit("a token is not a text")
        if len(row["tokens"]) != len(row["tags"]):
            raise Unfit("not as many tags as tokens")
    else:
        _text(row["text"], "text")
        if format == "text-label":
            _check_label(row["label"])


def messages_of(row: Row, format: str) -> list[dict[str, Any]]:
    """The turns of a row of a chat format, [{"role", "content"}, …]; raises Unfit."""
    if format == "alpaca":
        asked = {"instruction": _text(row.get("instruction"), "instruction")}
        asked["input"] = _text(row.get("input") or "", "input")
        turns = [_turn("user", data.question(asked)), _turn("assistant", row.get("output"))]
    elif format == "prompt-completion":
        turns = _side(row.get("prompt"), "user") + _side(row.get("completion"), "assistant")
    else:
        turns = _turns(row.get("messages" if format == "messages" else "conversations"))
    if format in ("alpaca", "sharegpt") and row.get("system"):
        turns.insert(0, _turn("system", row["system"]))
    return turns


def text_of(row: Row, format: str) -> str:
    """All text of a row, by which its length is told and its duplicates are found."""
    found: list[str] = []
    map_texts(row, format, lambda text: found.append(text) or text)  # type: ignore[func-returns-value]
    return (" " if format == "tokens" else "\n").join(part for part in found if part)


def labels_of(row: Row, format: str) -> tuple[Any, ...]:
    """Labels by which a row is counted: its own, or the kinds of entities that its tags name.

    None of them for a format without labels, and for a label that is a measure rather than a name.
    """
    if format == "tokens":
        kinds = {str(tag).split("-", 1)[-1] for tag in row["tags"]}
        return tuple(sorted(kinds - {"O"}))
    label = row.get("label") if format == "text-label" else []
    labels = label if isinstance(label, list) else [label]
    return tuple(one for one in labels if not isinstance(one, float))


def map_texts(row: Row, format: str, function: Callable[[str], str]) -> Row:
    """row with function applied to each of its texts; labels, tags and roles stay."""
    return row | {n: _mapped(row[n], function) for n in TEXTS[format] if n in row}


def map_labels(row: Row, format: str, function: Callable[[str], str]) -> Row:
    """row with function applied to its label, or to each of its labels or tags, that is a name."""
    return row | {n: _mapped(row[n], function) for n in LABELS.get(format, ()) if n in row}


def _mapped(value: Any, function: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return function(value)
    if isinstance(value, list):
        return [_mapped(one, function) for one in value]
    if isinstance(value, dict):  # a turn
        texts = ("content", "value")
        return {k: _mapped(v, function) if k in texts else v for k, v in value.items()}
    return value


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise Unfit(f"{name} is not a text")
    return value


def _check_label(label: Any) -> None:
    if label == "":
        raise Unfit("no label")
    for one in label if isinstance(label, list) else [label]:
        if not isinstance(one, str | int | float):
            raise Unfit("a label is neither a name nor a number")


def _turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": _text(content, f"what the {role} says")}


def _side(value: Any, role: str) -> list[dict[str, Any]]:
    return _turns(value) if isinstance(value, list) else [_turn(role, value)]


def _turns(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise Unfit("its turns are not a list")
    turns = []
    for turn in value:
        if not isinstance(turn, dict):
            raise Unfit("a turn is not an object")
        role = turn.get("role") or turn.get("from")
        if not isinstance(role, str) or role not in ROLES:
            raise Unfit(f"a turn of none of {', '.join(ROLES)}")
        content = turn.get("content") if turn.get("content") is not None else turn.get("value")
        if content is None and turn.get("tool_calls"):
            content = ""
        # What else a turn has (tool_calls, name) is its chat template's.
        own = {k: v for k, v in turn.items() if k not in ("from", "value") and v is not None}
        turns.append(own | _turn(ROLES[role], content))
    return turns


def _answers(turn: dict[str, Any]) -> bool:
    return turn["role"] == "assistant" and bool(turn["content"].strip() or turn.get("tool_calls"))


def _plain(turns: list[dict[str, Any]], to: str) -> list[tuple[str, str]]:
    """Role and content of every turn, for a format that has nothing else."""
    if any(turn.get("tool_calls") for turn in turns):
        raise Unfit(f"calls of tools, which {to} has no place for")
    return [(turn["role"], turn["content"]) for turn in turns]


def _to_alpaca(turns: list[dict[str, Any]]) -> Row:
    said = _plain(turns, "alpaca")
    system = [content for role, content in said if role == "system"]
    rest = [(role, content) for role, content in said if role != "system"]
    if [role for role, _ in rest] != ["user", "assistant"] or len(system) > 1:
        raise Unfit("more than one question and one answer, which alpaca has no place for")
    (_, question), (_, answer) = rest
    # Empty rather than absent: a column of a table is the same in all its rows.
    held = {"instruction": question, "input": "", "output": answer}
    return held | {"system": system[0] if system else ""}


def _to_sharegpt(turns: list[dict[str, Any]]) -> Row:
    said = _plain(turns, "sharegpt")
    return {"conversations": [{"from": SHAREGPT[role], "value": text} for role, text in said]}


def _to_prompt_completion(turns: list[dict[str, Any]]) -> Row:
    # Lists, not texts: trl puts only these into the model's chat template.
    if len(turns) < 2 or not _answers(turns[-1]):
        raise Unfit("its last turn is not an answer")
    return {"prompt": turns[:-1], "completion": turns[-1:]}


def _to_text(turns: list[dict[str, Any]]) -> Row:
    """Alpaca's own form, which a model without chat template is trained on."""
    heads = {"user": "### Instruction:\n", "assistant": "### Response:\n", "tool": "### Input:\n"}
    said = [heads.get(role, "") + content for role, content in _plain(turns, "text")]
    return {"text": "\n\n".join(said)}


_FROM_MESSAGES = {
    "messages": lambda turns: {"messages": turns},
    "alpaca": _to_alpaca,
    "sharegpt": _to_sharegpt,
    "prompt-completion": _to_prompt_completion,
    "text": _to_text,
}
