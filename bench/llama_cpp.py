"""llama.cpp as a peer of the decoding benches: the same model as GGUF, decoded from token ids.

llama.cpp comes as llama-cpp-python; whatever needs it is skipped, saying so, where it is missing.
Only its C interface is used: its Python class copies the logits and samples more slowly.
"""

import json
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

Kind = Literal["F32", "F16", "Q8_0", "Q4_0"]


def gguf_of(folder: Path, kind: Kind, out: Path) -> Path:
    """Writes a Hugging Face folder of a Llama as the GGUF file `out`, and returns `out`.

    folder holds config.json, *.safetensors and a byte-level BPE tokenizer.json. The matrices are
    stored as `kind`; norms stay float32, and with Q4_0 the matrix that gives the logits is Q8_0, as
    `llama-quantize` leaves it where its Q6_K does not divide a row. ValueError for another
    architecture, biases, or scaled rotary embeddings.
    Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, names and layout as
    llama.cpp's convert_hf_to_gguf.py writes them.
    """
    import gguf
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    _check(config)
    writer = gguf.GGUFWriter(out, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.LLAMA])
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_config(writer, config)
    _add_tokenizer(writer, folder, config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    logits = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    for name, weight in _weights(folder, config):
        stored = gguf.GGMLQuantizationType[kind if weight.ndim > 1 else "F32"]
        if kind == "Q4_0" and name == logits:
            stored = gguf.GGMLQuantizationType.Q8_0
        target = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor(target, gguf.quants.quantize(weight, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def _check(config) -> None:
    rotary = config.rope_parameters["rope_type"] if config.model_type == "llama" else None
    if rotary != "default" or config.attention_bias or config.mlp_bias:
        raise ValueError(
            "gguf_of writes Llama without biases and with default rotary embeddings, "
            f"not {config.model_type!r} with rotary embeddings {rotary!r}"
        )


def _add_config(writer, config) -> None:
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _add_tokenizer(writer, folder: Path, config) -> None:
    from gguf import TokenType

    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    # llama.cpp wants one token per row of the embedding, which may have more rows than tokens.
    tokens = [f"[PAD{i}]" for i in range(config.vocab_size)]
    types = [TokenType.UNUSED] * config.vocab_size
    for token, i in tokenizer["model"]["vocab"].items():
        tokens[i], types[i] = token, TokenType.NORMAL
    for added in tokenizer["added_tokens"]:
        tokens[added["id"]] = added["content"]
        special = added["special"]
        types[added["id"]] = TokenType.CONTROL if special else TokenType.USER_DEFINED
    merges = tokenizer["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    writer.add_add_bos_token(False)
    ends = config.eos_token_id
    if ends is not None:  # GGUF has one, transformers may have several
        writer.add_eos_token_id(ends if isinstance(ends, int) else ends[0])
    if config.bos_token_id is not None:
        writer.add_bos_token_id(config.bos_token_id)


def _weights(folder: Path, config) -> Iterator[tuple[str, np.ndarray]]:
    """Names as in transformers, float32 weights as in GGUF; of two tied ones the first.

    transformers rotates a head's first half against its second, llama.cpp rotates neighbours: row
    i of the first half goes to 2i, and row i of the second to 2i + 1.
    """
    from safetensors import safe_open

    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():
                if config.tie_word_embeddings and name == "lm_head.weight":
                    continue
                weight = tensors.get_tensor(name).to(torch.float32).numpy()
                if count := heads.get(name.split(".")[-2]):
                    rows, columns = weight.shape  # (heads * head_dim, hidden)
                    halves = weight.reshape(count, 2, rows // count // 2, columns)
                    weight = halves.swapaxes(1, 2).reshape(rows, columns)
                yield name, weight


@dataclass(frozen=True)
class Decoded:
    """The new tokens, and the seconds until the first was known and from there to the last."""

    tokens: list[int]
    prompt_seconds: float
    decode_seconds: float


class Peer:
    """A GGUF file in llama.cpp, decoding greedily; `close` gives its memory back.

    context: slots of its KV cache. cache: their type, "F16" as llama.cpp has it by default or
    "F32". Skips the running test or bench where llama-cpp-python is not installed.
    """

    def __init__(
        self, path: Path, threads: int, *, context: int = 2048, cache: Literal["F32", "F16"] = "F16"
    ):
        missing = "llama-cpp-python is not installed: pip install llama-cpp-python"
        self._library = library = pytest.importorskip("llama_cpp", reason=missing)
        # Its binding would print every line of llama.cpp's log, pages for each model.
        logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
        library.llama_backend_init()
        settings = library.llama_model_default_params()
        settings.n_gpu_layers = 0
        self._model = library.llama_model_load_from_file(str(path).encode(), settings)
        if not self._model:
            raise ValueError(f"llama.cpp cannot load {path}")
        settings = library.llama_context_default_params()
        settings.n_ctx = settings.n_batch = context
        settings.n_threads = settings.n_threads_batch = threads
        settings.type_k = settings.type_v = getattr(library, f"GGML_TYPE_{cache}")
        self._context = library.llama_init_from_model(self._model, settings)
        if not self._context:
            raise ValueError(f"llama.cpp cannot make a context of {context} slots for {path}")
        self._slots = context
        self._vocab = library.llama_vocab_n_tokens(library.llama_model_get_vocab(self._model))

    def generate(self, ids: Sequence[int], new: int, stop: Sequence[int] = ()) -> Decoded:
        """At most `new` tokens after `ids`, ending with the first of `stop`; the cache is reset."""
        if not ids or new < 1 or len(ids) + new > self._slots + 1:
            raise ValueError(
                f"ids has {len(ids)} tokens and new is {new}: both must be at least 1, "
                f"together at most {self._slots + 1} for a context of {self._slots} slots"
            )
        library = self._library
        library.llama_memory_clear(library.llama_get_memory(self._context), True)
        start = time.perf_counter()
        tokens = [self._next(ids)]
        first = time.perf_counter()
        while len(tokens) < new and tokens[-1] not in stop:
            tokens.append(self._next(tokens[-1:]))
        return Decoded(tokens, first - start, time.perf_counter() - first)

    def _next(self, ids: Sequence[int]) -> int:
        """Puts ids into the cache; the token of the largest logit after the last of them."""
        buffer = (self._library.llama_token * len(ids))(*ids)
        batch = self._library.llama_batch_get_one(buffer, len(ids))
        if code := self._library.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode of {len(ids)} tokens returned {code}")
        logits = self._library.llama_get_logits_ith(self._context, -1)
        return int(np.ctypeslib.as_array(logits, (self._vocab,)).argmax())

    def close(self) -> None:
        self._library.llama_free(self._context)
        self._library.llama_model_free(self._model)
