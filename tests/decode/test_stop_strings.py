"""Stop strings end rows where transformers ends them, wherever they are asked for."""

import pytest
import torch
from decoders import BOS, EOS, PAD, VOCABULARY, padded, tiny
from transformers import GenerationConfig, PreTrainedTokenizerFast

import fastft


def tokenizer():
    """A letter for each token."""
    from tokenizers import Tokenizer, decoders
    from tokenizers.models import BPE

    letters = {"<pad>": PAD, "<s>": BOS, "</s>": EOS}
    letters |= {letter(token): token for token in range(3, VOCABULARY)}
    made = Tokenizer(BPE(letters, []))
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>")


def letter(token: int) -> str:
    return chr(33 + token)


GIVEN = ("keyword", "configuration", "model", "over the configuration's", "over the model's")


@pytest.mark.parametrize("speculation", [None, "prompt_lookup"])
@pytest.mark.parametrize("given", GIVEN)
def test_rows_end_where_transformers_ends_them(given, speculation, every_draft):
    model, x = tiny("llama"), padded([7, 4])
    free = model.generate(**x, max_new_tokens=14)
    stop = "".join(map(letter, free[0, 10:12].tolist()))  # the answer's 4th and 5th token
    kwargs = {"tokenizer": tokenizer()}
    if given == "model" or given.endswith("model's"):
        model.generation_config.stop_strings = [stop] if given == "model" else ["never"]
    if "configuration" in given:
        own = [stop] if given == "configuration" else ["never"]
        kwargs["generation_config"] = GenerationConfig(
            max_new_tokens=14, stop_strings=own, eos_token_id=EOS, pad_token_id=PAD
        )
    else:
        kwargs["max_new_tokens"] = 14
    if given == "keyword" or given.startswith("over"):
        kwargs["stop_strings"] = stop
    wanted = model.generate(**x, **kwargs)
    out = fastft.generate(model, x, speculation=speculation, **kwargs)
    assert out.stats.path == "decoder_layer" and torch.equal(out.sequences, wanted)
    assert not torch.equal(wanted, free) and (wanted[0, 12:] == PAD).all()
    if "configuration" in given:
        assert kwargs["generation_config"].stop_strings == own
