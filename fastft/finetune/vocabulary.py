"""A tokenizer that knows more tokens than its model has embeddings for.

It comes about where a padding token or the marks of a chat template were added to a tokenizer and
the model was not resized, or where a class of transformers adds its own.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastft.finetune import UserError, assets

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_RESIZE = "model.resize_token_embeddings(len(tokenizer)) adds it"


def settle_padding(
    tokenizer: "PreTrainedTokenizerBase", embedded: int | None, source: str | Path
) -> None:
    """Lets the end of text pad where the padding token is missing or has no embedding.

    embedded: how many tokens the model has an embedding for, None where that is not known.
    Raises: UserError where neither that nor the unknown token has one.
    """
    held, place = tokenizer.pad_token, tokenizer.pad_token_id
    if held is None or place is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        return
    if embedded is None or place < embedded:
        return
    unknown = f"{source}: the padding token {held!r} is none of the model's {embedded} tokens"
    ends = {
        tokenizer.eos_token: tokenizer.eos_token_id,
        tokenizer.unk_token: tokenizer.unk_token_id,
    }
    for end, place in ends.items():
        if end is not None and place is not None and place < embedded:
            assets.say(f"{unknown}; {end!r} pads instead")
            tokenizer.pad_token = end
            return
    raise UserError(f"{unknown}; {_RESIZE}")


def check(
    rows: Iterable[Sequence[int]],
    tokenizer: "PreTrainedTokenizerBase",
    embedded: int | None,
    where: str = "",
) -> None:
    """Raises UserError where a row of ids has a token that the model has no embedding for.

    where: what the sentence begins with.
    """
    if embedded is None or len(tokenizer) <= embedded:
        return  # so it is nearly always, and nothing is to be searched
    for number, ids in enumerate(rows):
        beyond = next((one for one in ids if one >= embedded), None)
        if beyond is not None:
            token = tokenizer.convert_ids_to_tokens(beyond)
            raise UserError(
                f"{where}row {number}: the token {token!r} is none of the model's {embedded}; "
                f"{_RESIZE}"
            )
