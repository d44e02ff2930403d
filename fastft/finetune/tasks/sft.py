"""Supervised fine-tuning on conversations: what the assistant says is learned.

Not trl's SFTTrainer: it puts a head of its own over the model's forward, so that fastft's would
never run, and its loss cannot be replaced. Its packing and its collator are what is used here.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from fastft.finetune import UserError
from fastft.finetune.data import IGNORED, pad_id

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

TEXT, LABEL = None, None
BEST = "loss"
ROLES = ("system", "user", "assistant", "tool")
# For a tokenizer without a template: alpaca's form, as in fastft.finetune.data.
TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] == 'assistant' %}{{ m['content'] }}{{ eos_token }}\n\n"
    "{% elif m['role'] == 'user' %}### Instruction:\n{{ m['content'] }}\n\n### Response:\n"
    "{% else %}{{ m['content'] }}\n\n{% endif %}"
    "{% endfor %}"
)


def names(rows: "Dataset", config: Any, known: Sequence[str] | None = None) -> None:
    return None


def strata(rows: "Dataset", config: Any) -> None:
    return None


def packs(config: Any) -> bool:
    """Whether rows hold several texts; UserError where that was asked for and cannot be."""
    from fastft.finetune import methods

    reason = methods.fits(config.method, "sft", packing=True)
    if reason is not None and config.packing:
        raise UserError(f"packing: not with the method {config.method}: {reason}")
    return config.packing is not False and reason is None


def encode(
    rows: "Dataset",
    tokenizer: "PreTrainedTokenizerBase",
    config: Any,
    names: Sequence[str] | None = None,
) -> "Dataset":
    """A Dataset of input_ids and labels; packed rows have seq_lengths.

    rows may be of any format of conversations that fastft.finetune.formats knows.
    Raises: UserError for rows that are no conversations, and where nothing is left to learn.
    """
    from datasets import Dataset

    from fastft.finetune import formats

    chats = formats.convert(rows, "messages")["messages"]
    held: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
    for number, messages in enumerate(chats):
        try:
            ids, labels = tokenize(messages, tokenizer, config.learn)
        except UserError as error:
            raise UserError(f"row {number}: {error}") from None
        if any(label != IGNORED for label in labels[1 : config.max_length]):
            held["input_ids"].append(ids[: config.max_length])
            held["labels"].append(labels[: config.max_length])
    if not held["input_ids"]:
        raise UserError(
            f"no answer lies within max_length = {config.max_length} tokens; nothing is learned"
        )
    encoded = Dataset.from_dict(held)
    if packs(config):
        from trl.data_utils import pack_dataset

        encoded = pack_dataset(encoded, config.max_length, "bfd")
    return encoded


def tokenize(
    messages: list[dict[str, Any]], tokenizer: "PreTrainedTokenizerBase", learn: str
) -> tuple[list[int], list[int]]:
    """ids and labels of one conversation.

    learn: "completion" labels the last answer, "assistant" every answer, "all" every token. An
    answer is tokenized apart from what is before it, as it is when the model generates it.
    Raises: UserError.
    """
    _check(messages, learn)
    render = _renderer(tokenizer)
    whole = render(messages)
    ids: list[int] = []
    labels: list[int] = []
    if learn == "all":
        ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
        return ids, list(ids)
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if learn == "completion":
        answers = answers[-1:]
    done = ""

    def add(text: str, learned: bool) -> None:
        own = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids.extend(own)
        labels.extend(own if learned else [IGNORED] * len(own))

    for at in answers:
        prompt = render(messages[:at], add_generation_prompt=True)
        until = render(messages[: at + 1])
        if not (prompt.startswith(done) and until.startswith(prompt)):
            if learn == "assistant":
                raise UserError(
                    "the chat template writes a turn differently once it is answered; "
                    "learn: completion works with it"
                )
            # The answer alone then, as in fastft.finetune.data.
            until = prompt + messages[at]["content"] + (tokenizer.eos_token or "")
        add(prompt[len(done) :], False)
        add(until[len(prompt) :], True)
        done = until
    return ids, labels


def _renderer(tokenizer: "PreTrainedTokenizerBase") -> Callable[..., Any]:
    template = tokenizer.chat_template or TEMPLATE

    def render(messages: list[dict[str, Any]], **options: Any) -> str:
        from jinja2 import TemplateError

        try:
            return str(
                tokenizer.apply_chat_template(
                    messages, chat_template=template, tokenize=False, **options
                )
            )
        except TemplateError as error:
            raise UserError(f"the chat template does not take it: {error}") from None

    return render


def _check(messages: list[dict[str, Any]], learn: str) -> None:
    if not isinstance(messages, list) or not messages:
        raise UserError(f"expected a list of messages, got {messages!r}")
    for message in messages:
        if message.get("role") not in ROLES or not isinstance(message.get("content"), str):
            raise UserError(
                f"expected messages of a role ({', '.join(ROLES)}) and a content, got {message!r}"
            )
    if learn != "all" and all(message["role"] != "assistant" for message in messages):
        raise UserError("no message of the assistant: nothing to learn")


def collator(tokenizer: "PreTrainedTokenizerBase", config: Any) -> Callable[..., Any]:
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    return DataCollatorForLanguageModeling(pad_id(tokenizer), padding_free=packs(config))


metrics = None
