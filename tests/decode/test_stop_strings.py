"""Stop strings end rows where transformers ends them, wherever they are asked for."""

import pytest
import torch
from decoders import BOS, EOS, PAD, VOCABULARY, padded, tiny
from transformers import GenerationConfig, PreTrainedTokenizerFast

import fastft


def tokenizer():
    """A word for each token: w3 w4 …"""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = {"<pad>": PAD, "<s>": BOS, "</s>": EOS}
    words |= {f"w{i}": i for i in range(3, VOCABULARY)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<pad>")),
        pad_token="<pad>", bos_token="<s>", eos_token="</s>",
    )  # fmt: skip


GIVEN = ("keyword", "configuration", "model", "over the configuration's", "over the model's")


@pytest.mark.parametrize("speculation", [None, "prompt_lookup"])
@pytest.mark.parametrize("given", GIVEN)
def test_rows_end_where_transformers_ends_them(given, speculation, every_draft):
    model, x = tiny("llama"), padded([7, 4])
    free = model.generate(**x, max_new_tokens=14)
    stop = "".join(f"w{token}" for token in free[0, 10:12].tolist())  # the answer's 4th and 5th
    kwargs = {"tokenizer": tokenizer()}
    if given == "model" or given.endswith("model's"):
        model.generation_config.stop_strings = [stop] if given == "model" else ["w9" * 20]
    if "configuration" in given:
        own = [stop] if given == "configuration" else ["w9" * 20]
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
