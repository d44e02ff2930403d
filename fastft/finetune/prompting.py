"""Prompts made of rows: a Jinja template, and examples with their answers before the question."""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastft.finetune import UserError, need
from fastft.finetune.config import LARGEST_SEED, Config, option

# Name -> the question, and the answer that follows it in an example.
TEMPLATES = {
    "text": ("{{ text }}", " {{ label }}"),
    "prompt": ("{{ prompt }}", "{{ completion }}"),
    "question": ("Question: {{ question }}\nAnswer:", " {{ answer }}"),
    "label": ("Text: {{ text }}\nLabel:", " {{ label }}"),
    "sentiment": ("Review: {{ text }}\nSentiment:", " {{ label }}"),
    "instruction": (
        # Blocks swallow the newline after them.
        "{{ instruction }}{% if input is defined and input %}{{ '\\n\\n' ~ input }}{% endif %}",
        "{{ output }}",
    ),
    "alpaca": (
        "Below is an instruction that describes a task"
        "{% if input is defined and input %}, paired with an input that provides further context"
        "{% endif %}. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{{ instruction }}\n\n"
        "{% if input is defined and input %}### Input:\n{{ input }}\n\n{% endif %}"
        "### Response:\n",
        "{{ output }}",
    ),
}
# The template of rows for which none is named: by the first of these columns that they have.
_BY_COLUMN = ("prompt", "instruction", "question", "text")


@dataclass(kw_only=True)
class PromptConfig(Config):
    """How a prompt is made of a row of data."""

    template: str | None = option(
        None,
        f"Jinja template over a row's columns: a file (.jinja, .j2), {', '.join(TEMPLATES)}, or "
        "the template itself; default: by the columns. If it names `examples`, it places them",
    )
    answer: str | None = option(None, "template of an example's answer, with its leading space")
    separator: str = option("\n\n", "text between examples")
    chat: bool | None = option(
        None, "questions and answers as turns of the model's chat template; default: if it has one"
    )
    system: str | None = option(None, "first message of a chat")
    examples: str | None = option(None, "file with rows to pick examples from")
    shots: int = option(0, "examples before each question", least=0)
    selection: Literal["fixed", "random", "nearest"] = option(
        "fixed",
        "which examples: the first, drawn by the seed for each question, or the most similar ones "
        "(TF-IDF), the nearest last",
    )
    seed: int = option(0, "examples and samples are drawn by it", least=0, most=LARGEST_SEED)

    def check(self) -> None:
        if self.shots and self.examples is None:
            raise UserError(f"shots: {self.shots} examples need a file of them (examples)")
        if self.examples is not None and not self.shots:
            raise UserError("examples: set shots, the number of them before each question")
        if self.system is not None and self.chat is False:
            raise UserError("system: a message of a chat, and chat is off")


class Prompter:
    """Writes prompts: `prompt(row, examples)` for a model to continue.

    A template sees the row's columns, and `examples`, a list of rows, beside them. It runs in
    Jinja's sandbox, and a column that is not there is a UserError.
    """

    def __init__(
        self,
        config: PromptConfig,
        columns: Sequence[str],
        tokenizer: Any = None,
    ) -> None:
        """columns: of the rows, by which a template is chosen where config names none."""
        self.config, self.tokenizer = config, tokenizer
        has_template = getattr(tokenizer, "chat_template", None) is not None
        self.chat = has_template if config.chat is None else config.chat
        if self.chat and not has_template:
            raise UserError("chat: the model's tokenizer has no chat template")
        if config.system is not None and not self.chat:
            raise UserError("system: the model's tokenizer has no chat template")
        self.conversations = config.template is None and "messages" in columns
        if self.conversations:
            if not self.chat:
                raise UserError("messages: the model's tokenizer has no chat template; give one")
            return
        question, answer = _templates(config, columns)
        self._question, self.names = _compiled(question, "template")
        self._answer, _ = _compiled(answer, "answer")
        self.places_examples = "examples" in self.names
        if self.places_examples:
            if config.chat:
                raise UserError("template: it places the examples itself, which a chat does too")
            self.chat = False

    def question(self, row: Mapping[str, Any], examples: Sequence[Mapping[str, Any]] = ()) -> str:
        """The template with the row's values."""
        if self.conversations:
            return json.dumps(_asked(row.get("messages")), sort_keys=True)
        return _render(self._question, "template", row, examples=list(examples))

    def answer(self, row: Mapping[str, Any]) -> str:
        """What follows the question where it is answered; the model's turn of a chat."""
        text = _render(self._answer, "answer", row)
        return text.strip() if self.chat else text

    def prompt(self, row: Mapping[str, Any], examples: Sequence[Mapping[str, Any]] = ()) -> str:
        """The text to continue: the examples, then the row's question."""
        if self.chat:
            return self._as_chat(row, examples)
        if self.places_examples:
            return self.question(row, examples)
        shots = [self.question(e) + self.answer(e) for e in examples]
        return self.config.separator.join([*shots, self.question(row)])

    def ids(self, text: str) -> list[int]:
        """Its tokens, with those that begin a text, and none that end it."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise UserError("a prompt is not UTF-8, or holds half a character") from None
        # A chat template writes the tokens that begin a text itself.
        ids = self.tokenizer(text, add_special_tokens=not self.chat)["input_ids"]
        end = self.tokenizer.eos_token_id
        ended = bool(ids) and ids[-1] == end and not text.endswith(self.tokenizer.eos_token or "")
        out: list[int] = ids[:-1] if ended else ids
        return out

    def _as_chat(self, row: Mapping[str, Any], examples: Sequence[Mapping[str, Any]]) -> str:
        messages: list[Mapping[str, Any]] = []
        if self.config.system is not None:
            messages.append({"role": "system", "content": self.config.system})
        if self.conversations:
            for example in examples:
                messages += example["messages"]
            messages += _asked(row.get("messages"))
        else:
            for example in examples:
                messages.append({"role": "user", "content": self.question(example)})
                messages.append({"role": "assistant", "content": self.answer(example)})
            messages.append({"role": "user", "content": self.question(row)})
        from jinja2 import TemplateError

        try:
            text: str = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
            return text
        except TemplateError as error:
            raise UserError(f"the model's chat template: {error}") from None


class Examples:
    """Picks the examples of each question; never one that asks what is asked."""

    def __init__(
        self,
        rows: Sequence[Mapping[str, Any]],
        prompter: Prompter,
        asked: Sequence[Mapping[str, Any]],
    ) -> None:
        """asked: the rows that will be asked; fixed examples are none of them."""
        config = prompter.config
        self.count, self.selection, self.seed = config.shots, config.selection, config.seed
        self.prompter, self.rows = prompter, list(rows)
        self.questions = [prompter.question(row) for row in self.rows]
        if self.selection == "fixed":
            seen = {prompter.question(row) for row in asked}
            self.first = [
                r for r, q in zip(self.rows, self.questions, strict=True) if q not in seen
            ]
            self.first = self._enough(self.first[: self.count])
        if self.selection == "nearest":
            text = need("sklearn.feature_extraction.text", "the nearest examples")
            # Letters rather than words: it needs no language's rules of what a word is.
            self.index = text.TfidfVectorizer(
                analyzer="char_wb", ngram_range=(2, 4), sublinear_tf=True
            )
            self.vectors = self.index.fit_transform(self.questions)  # (examples, features)

    def of(self, row: Mapping[str, Any], number: int) -> list[Mapping[str, Any]]:
        """The examples of one row, number of those that are asked."""
        if self.selection == "fixed":
            return self.first
        own = self.prompter.question(row)
        others = [i for i, question in enumerate(self.questions) if question != own]
        if self.selection == "random":
            random.Random(f"{self.seed}/{number}").shuffle(others)
            chosen = others[: self.count]
        else:
            near = (self.vectors @ self.index.transform([own]).T).toarray()[:, 0]
            # The nearest stand last, beside the question.
            chosen = sorted(others, key=lambda i: (-near[i], i))[: self.count][::-1]
        return self._enough([self.rows[i] for i in chosen])

    def _enough(self, chosen: list[Any]) -> list[Any]:
        if len(chosen) < self.count:
            raise UserError(f"shots: {self.count} asked for, and only {len(chosen)} examples fit")
        return chosen


def _templates(config: PromptConfig, columns: Sequence[str]) -> tuple[str, str]:
    """The question's and the answer's template."""
    name = config.template
    if name is None:
        name = next((column for column in _BY_COLUMN if column in columns), None)
        if name is None:
            raise UserError(
                f"template: none is known for the columns {', '.join(columns)}; give one, for "
                f"example '{{{{ {next(iter(columns), 'text')} }}}}'"
            )
    if name in TEMPLATES:
        question, answer = TEMPLATES[name]
    else:
        question, answer = name, " {{ label }}"
        if name.endswith((".jinja", ".j2")):
            try:
                question = Path(name).expanduser().read_text(encoding="utf-8").rstrip("\n")
            except OSError as error:
                raise UserError(f"template: {name}: {error.strerror}") from None
            except UnicodeDecodeError as error:
                raise UserError(f"template: {name}: not UTF-8 (byte {error.start})") from None
        elif "{" not in name:
            raise UserError(
                f"template: {name!r} is none of {', '.join(TEMPLATES)}, no .jinja file, and names "
                "no column ({{ text }})"
            )
    return question, answer if config.answer is None else config.answer


def _compiled(source: str, name: str) -> Any:
    """The template, and the names it asks for."""
    need("jinja2", "a prompt template")
    from jinja2 import StrictUndefined, TemplateSyntaxError, meta
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    # As transformers runs chat templates, but an unknown name is an error.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined
    )
    try:
        names = meta.find_undeclared_variables(environment.parse(source))
        return environment.from_string(source), names
    except TemplateSyntaxError as error:
        raise UserError(f"{name}: line {error.lineno}: {error.message}") from None


def _render(template: Any, name: str, row: Mapping[str, Any], **more: Any) -> str:
    from jinja2 import UndefinedError

    try:
        out: str = template.render({**row, **more})
        return out
    except UndefinedError as error:
        raise UserError(f"{name}: {error}; a row has {', '.join(row)}") from None
    except Exception as error:  # a template calls methods of texts, which raise what they like
        said = str(error) or type(error).__name__
        raise UserError(f"{name}: {said}") from None


def _asked(messages: Any) -> list[Mapping[str, Any]]:
    """A conversation up to what the model is to say next."""
    if not isinstance(messages, list) or not all(isinstance(m, Mapping) for m in messages):
        raise UserError(f"messages: expected a list of turns, got {messages!r:.60}")
    asked = list(messages)
    while asked and asked[-1].get("role") == "assistant":
        asked.pop()
    if not asked:
        raise UserError("messages: a conversation without a question")
    return asked
