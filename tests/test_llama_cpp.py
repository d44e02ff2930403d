"""The peer of the decoding benches gets the model that transformers has, and decodes it alike."""

import pytest
import torch

from bench.decode_prompts import FIFTY, chat
from bench.llama_cpp import Peer, gguf_of

REASON = "llama-cpp-python is not installed"
IDS = [3, 14, 15, 92, 65, 35, 89, 79]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random Llama whose width is that of Q4_0's blocks, with a byte-level BPE tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("llama")
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(FIFTY, trainer)
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>").save_pretrained(folder)
    torch.manual_seed(0)
    # Four rows of the embedding have no token. The rotary base and the epsilon are not defaults.
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=304,
        rms_norm_eps=1e-3,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        tie_word_embeddings=True,
        initializer_range=0.2,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def greedy(model, ids: list[int], new: int) -> list[int]:
    settings = {"do_sample": False, "max_new_tokens": new, "pad_token_id": 0}
    return model.generate(torch.tensor([ids]), **settings)[0, len(ids) :].tolist()


@torch.no_grad()
def same_but_for_near_ties(model, ids: list[int], tokens: list[int], gap: float) -> int:
    """Every token has the largest logit after those before it, or one at most `gap` below it.

    Returns how many do not have the largest one. Judged with the tokens before it as they are, so
    that what comes after a near tie is judged too.
    """
    logits = model(torch.tensor([ids + tokens])).logits[0, len(ids) - 1 : -1]  # (new, vocab)
    below = logits.max(1).values - logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    assert below.max() <= gap, f"token {below.argmax()} is {below.max()} below the largest"
    return int((below > 0).sum())


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_0"])
def test_gguf_read_by_transformers(folder, model, tmp_path, kind):
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    path = gguf_of(folder, kind, tmp_path / "model.gguf")
    where = {"pretrained_model_name_or_path": tmp_path, "gguf_file": path.name}
    read = LlamaForCausalLM.from_pretrained(**where, dtype=torch.float32)
    error = {"F32": 0, "F16": 2**-11, "Q8_0": 0.006, "Q4_0": 0.1}[kind]
    for name, weight in model.state_dict().items():
        distance = (read.state_dict()[name] - weight).norm() / weight.norm()
        assert distance <= error, f"{name}: {distance}"
    for name in ("rms_norm_eps", "num_key_value_heads", "max_position_embeddings", "head_dim"):
        assert getattr(read.config, name) == pytest.approx(getattr(model.config, name)), name
    assert read.config.rope_parameters["rope_theta"] == 500
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    text = "Write a haiku about the first snow of the year.</s>"
    again = PreTrainedTokenizerFast.from_pretrained(**where)
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_q4_0_keeps_the_logits_in_8_bits(folder, tmp_path):
    import gguf

    path = gguf_of(folder, "Q4_0", tmp_path / "model.gguf")
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}
    assert types["token_embd.weight"] == "Q8_0"
    assert types["blk.0.attn_q.weight"] == types["blk.1.ffn_down.weight"] == "Q4_0"
    assert types["blk.0.attn_norm.weight"] == types["output_norm.weight"] == "F32"
    assert "output.weight" not in types


@pytest.mark.parametrize(
    "change",
    [{"attention_bias": True}, {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}],
)
def test_gguf_refuses_what_it_cannot_say(folder, tmp_path, change):
    from transformers import LlamaConfig

    LlamaConfig.from_pretrained(folder, **change).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="gguf_of writes Llama"):
        gguf_of(tmp_path, "F32", tmp_path / "model.gguf")


def test_peer_decodes_alike(folder, model, tmp_path):
    pytest.importorskip("llama_cpp", reason=REASON)
    peer = Peer(gguf_of(folder, "F32", tmp_path / "model.gguf"), 1, context=256, cache="F32")
    for ids in (IDS, IDS[:1], IDS * 20):  # the second call finds what the first left in the cache
        got = peer.generate(ids, 40)
        assert len(got.tokens) == 40
        same_but_for_near_ties(model, ids, got.tokens, 1e-4)
    tokens = peer.generate(IDS, 40).tokens
    assert tokens == greedy(model, IDS, 40)
    stop = tokens[5]
    stopped = peer.generate(IDS, 40, stop=[stop])
    assert stopped.tokens == tokens[: tokens.index(stop) + 1]
    assert stopped.prompt_seconds > 0
    with pytest.raises(ValueError, match="at most 257"):
        peer.generate(IDS, 250)
    with pytest.raises(ValueError, match="both must be at least 1"):
        peer.generate([], 4)
    peer.close()


def test_peer_tells_a_file_it_cannot_load(tmp_path):
    pytest.importorskip("llama_cpp", reason=REASON)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="cannot load"):
        Peer(tmp_path / "model.gguf", 1)


@pytest.mark.slow
def test_peer_decodes_a_real_model_alike(tmp_path):
    pytest.importorskip("llama_cpp", reason=REASON)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fastft.finetune import assets

    folder = assets.model("SmolLM2-135M-Instruct")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    peer = Peer(gguf_of(folder, "F32", tmp_path / "model.gguf"), 1, cache="F32")
    same = 0
    for prompt in FIFTY[::7]:
        ids = chat(tokenizer, prompt)
        tokens = peer.generate(ids, 48, stop=[tokenizer.eos_token_id]).tokens
        same_but_for_near_ties(model, ids, tokens, 1e-3)
        same += tokens == greedy(model, ids, 48)
    assert same >= 6  # of 8
    peer.close()
