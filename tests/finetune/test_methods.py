"""Every method on every task it fits: what it trains, that it learns, is saved, and is patched."""

import copy
import json
from types import SimpleNamespace

import encoders
import models
import pytest
import torch
from finetune.methods_settings import settings
from safetensors.torch import load_file, save_file

import fastft
from fastft.finetune import UserError, methods
from fastft.finetune.methods import adapter, layers

HEADS = {"classify": "SequenceClassification", "ner": "TokenClassification"}


def model_of(name, task):
    if task == "lm":
        return models.causal_lm(name)
    return encoders.encoder(name, HEADS[task], classifier_dropout=0.0)


def batch_of(task):
    return models.batch("right") if task == "lm" else encoders.batch(HEADS[task], "right")


# Added parameters are recognised by these parts of their names.
ADDED = {
    "lora": "lora_",
    "dora": "lora_",
    "adapter": "bottleneck_adapter",
    "prompt": "prompt_encoder",
    "prefix": "prompt_encoder",
    "ia3": "ia3_l",
}
LAYERS = {"bert": "encoder.layer", "gpt2": "transformer.h", "llama": "model.layers"}
LAST_NORM = {"bert": (), "gpt2": ("transformer.ln_f",), "llama": ("model.norm",)}
CASES = [
    (name, task, method)
    for name in ("bert", "gpt2", "llama")
    for task in ("classify", "ner", "lm")
    for method in methods.METHODS
    if method != "qlora"
    and methods.fits(method, task) is None
    and not (name == "bert" and task == "lm")
    and not (name == "llama" and method == "bitfit")  # it has no biases
    and not (name != "bert" and task == "classify" and method == "prompt")
]


def intended(name, task, method, parameter) -> bool:
    """Whether the method is to train a parameter, by its name, written down independently."""
    head = ("classifier", "score", "pooler") if task != "lm" else ()
    if any(part in parameter.split(".") for part in head):
        return "original_module" not in parameter  # PEFT keeps the head as it was, beside
    if method == "full":
        return True
    if method == "top-layers":
        parts = (f"{LAYERS[name]}.1.", *LAST_NORM[name])
        return any(part in parameter for part in parts)
    if method == "bitfit":
        return parameter.endswith("bias")
    return ADDED[method] in parameter


def gradients(model, batch):
    model.train().zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name, task, method", CASES)
def test_method(name, task, method, tmp_path):
    model = methods.apply(model_of(name, task), settings(method), task)
    batch = batch_of(task)
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in model.named_parameters() if intended(name, task, method, n)}
    sizes = sum(p.numel() for n, p in model.named_parameters() if n in trained)
    assert methods.count(model)[0] == sizes

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        losses.append(gradients(model, batch)[0])
        optimizer.step()
    loss, wanted = gradients(model, batch)
    # Virtual tokens of a random model have little to say; the rest learns at once.
    assert loss < losses[0] - (0.01 if method in ("prompt", "prefix") else 0.05)
    assert set(wanted) == trained
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)

    model.eval()
    logits = model(**batch).logits
    methods.save(model, tmp_path)
    assert not list(tmp_path.glob("*.bin")) and (tmp_path / "config.json").exists()
    if methods.is_adapter(model):
        fresh = model_of(name, task)
        for head in layers.head(fresh, task):  # a new one, as where the checkpoint has none
            for parameter in fresh.get_submodule(head).parameters():
                parameter.data += 1.0
        loaded = methods.load(fresh, tmp_path).eval()
        assert not any(p.requires_grad for p in loaded.parameters())
    else:
        loaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(**batch).logits, logits)

    report = fastft.patch(model)
    got_loss, got = gradients(model, batch)
    assert report.count("attention") == 2 and set(got) == set(wanted)
    low_rank = sum(hasattr(module, "lora_A") for module in model.modules())
    assert report.count("lora") == (low_rank if method == "lora" else 0)
    assert abs(got_loss - loss) < 1e-5
    largest = max(float(g.abs().max()) for g in wanted.values())
    for parameter, gradient in got.items():
        torch.testing.assert_close(gradient, wanted[parameter], rtol=1e-4, atol=1e-5 * largest)


@pytest.mark.parametrize("method", ["prompt", "prefix"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_virtual_tokens_are_read_once_while_generating(name, method, tmp_path):
    model = methods.apply(model_of(name, "lm"), settings(method), "lm").eval()
    torch.nn.init.normal_(model.prompt_encoder.default.embedding.weight)
    methods.save(model, tmp_path)
    ids = torch.tensor([[5, 9, 3, 7]])
    wanted = ids
    with torch.no_grad():
        for _ in range(6):
            mask = torch.ones_like(wanted)
            last = model(input_ids=wanted, attention_mask=mask).logits[:, -1]
            wanted = torch.cat((wanted, last.argmax(-1, keepdim=True)), 1)
    asked = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    assert not torch.equal(model.get_base_model().generate(ids, **asked), wanted)
    loaded = methods.load(model_of(name, "lm"), tmp_path)
    for each in (model, copy.deepcopy(model), loaded):
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        assert torch.equal(each.generate(**given, **asked), wanted)
        assert torch.equal(fastft.generate(each, given, **asked).sequences, wanted)
        fastft.patch(each)
        assert torch.equal(each.generate(**given, **asked), wanted)


@pytest.mark.parametrize("name", encoders.ENCODERS)
@pytest.mark.parametrize("method", ["top-layers", "lora", "adapter", "prompt", "prefix", "ia3"])
def test_other_encoders_train_or_say_why_not(name, method):
    refused = {
        "albert": {"top-layers", "adapter", "ia3", "prefix"},
        "distilbert": {"prefix"},
        "modernbert": {"prefix"},
    }
    model = model_of(name, "classify")
    if method in refused.get(name, ()):
        with pytest.raises(UserError, match=type(model).__name__):
            methods.apply(model, settings(method), "classify")
        return
    model = methods.apply(model, settings(method), "classify")
    found = gradients(model, batch_of("classify"))[1]
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert set(found) == trained and any("classifier" in n for n in trained)


def test_where_adapters_go():
    for name, ends in [
        ("bert", ("attention.output.dense", "output.dense")),
        ("gpt2", ("attn.c_proj", "mlp.c_proj")),
        ("llama", ("self_attn.o_proj", "mlp.down_proj")),
        ("distilbert", ("attention.out_lin", "ffn.lin2")),
        ("modernbert", ("attn.Wo", "mlp.Wo")),
    ]:
        attentions, mlps = layers.projections(model_of(name, "classify"))
        assert len(attentions) == len(mlps) == 2
        for i in range(2):
            assert attentions[i].endswith(f".{i}.{ends[0]}"), attentions
            assert mlps[i].endswith(f".{i}.{ends[1]}"), mlps


@pytest.mark.parametrize("name, inner", [("bert", 48), ("gpt2", 128), ("llama", 48)])
def test_ia3_scales_keys_values_and_what_enters_the_last_projection(name, inner):
    model = methods.apply(model_of(name, "ner"), settings("ia3"), "ner")
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters() if "ia3_l" in n}
    ends = layers.projections(model_of(name, "ner"))[1]
    entering = {n for n in shapes if any(f"{end}.ia3_l" in n for end in ends)}
    assert len(entering) == 2 and all(shapes[n] == (1, inner) for n in entering)
    assert all(shapes[n][1] == 1 for n in shapes.keys() - entering)
    assert len(shapes) == (4 if name == "gpt2" else 6)


def test_target_modules():
    for method in ("lora", "ia3", "adapter"):
        asked = settings(method, target_modules=["o_proj"])
        model = methods.apply(model_of("llama", "lm"), asked, "lm")
        trained = [n for n, p in model.named_parameters() if p.requires_grad]
        assert trained and all("o_proj" in name for name in trained)
    with pytest.raises(UserError, match="no linear layer of this model is called 'q_prj'; it has"):
        asked = settings("lora", target_modules=["o_proj", "q_prj"])
        methods.apply(model_of("llama", "lm"), asked, "lm")
    with pytest.raises(UserError, match="method full has no choice"):
        methods.apply(model_of("llama", "lm"), settings("full", target_modules=["o_proj"]), "lm")


REFUSED = [
    ("bert", "ner", {"method": "prompt"}, "does not fit task ner"),
    ("gpt2", "classify", {"method": "prompt"}, "take padding for the last token"),
    ("llama", "lm", {"method": "bitfit"}, "LlamaForCausalLM has none"),
    ("llama", "lm", {"method": "top-layers", "top_layers": 3}, "expected 1 to 2"),
    ("llama", "lm", {"method": "top-layers", "top_layers": 0}, "expected 1 to 2"),
    ("llama", "lm", {"method": "prefix", "virtual_tokens": 64}, "fewer than the model's 64"),
    ("llama", "lm", {"method": "lore"}, "expected one of full, "),
    ("llama", "lm", {"method": "qlora"}, "bitsandbytes|4 bits"),
]


@pytest.mark.parametrize("name, task, asked, message", REFUSED)
def test_refused(name, task, asked, message):
    with pytest.raises(UserError, match=message):
        methods.apply(model_of(name, task), settings(**asked), task)


def test_the_head_alone():
    model = methods.apply(model_of("bert", "ner"), settings("top-layers", top_layers=0), "ner")
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"classifier.weight", "classifier.bias"}


def test_what_fits_depends_on_packing_and_checkpointing():
    assert methods.fits("prompt", "sft") is None
    assert "packed rows" in methods.fits("prompt", "sft", packing=True)
    assert "a second time" in methods.fits("prefix", "lm", checkpointing=True)
    assert methods.fits("adapter", "sft", packing=True, checkpointing=True) is None


def test_prefix_with_checkpointing_fails_as_fits_says():
    model = methods.apply(model_of("llama", "lm"), settings("prefix"), "lm").train()
    model.gradient_checkpointing_enable()
    # 8 tokens behind a prefix of 3, and behind two of them.
    with pytest.raises(RuntimeError, match=r"\(11\) .* \(14\)"):
        model(**batch_of("lm")).loss.backward()


def test_a_bottleneck_is_its_formula():
    model = model_of("llama", "lm")
    module = model.model.layers[1].mlp.down_proj
    x = torch.randn(2, 3, 48)
    before = module(x)
    adapter.add(model, ["model.layers.1.mlp.down_proj"], 8, [])
    assert torch.equal(module(x), before)  # it starts as nothing
    inside = module.bottleneck_adapter
    for parameter in inside.parameters():
        torch.nn.init.normal_(parameter)
    hidden = torch.nn.functional.gelu(before @ inside.down.weight.T + inside.down.bias)
    torch.testing.assert_close(module(x), before + hidden @ inside.up.weight.T + inside.up.bias)
    assert type(module) is torch.nn.Linear and "forward" not in vars(module)


def test_a_bottleneck_in_copies_half_types_and_checkpointing():
    model = methods.apply(model_of("llama", "lm").bfloat16(), settings("adapter"), "lm")
    batch = batch_of("lm")
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    twin = copy.deepcopy(model)
    _, wanted = gradients(model, batch)
    for name, parameter in twin.named_parameters():
        if "up.bias" in name:
            parameter.data += 1.0
    assert twin(**batch).loss != model(**batch).loss  # the copy runs its own
    model.gradient_checkpointing_enable()
    for name, gradient in gradients(model, batch)[1].items():
        torch.testing.assert_close(gradient, wanted[name])


def test_trainer_restores_the_best_bottleneck(tmp_path):
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    model = methods.apply(model_of("bert", "classify"), settings("adapter"), "classify")
    batch = encoders.batch("SequenceClassification", "none")
    data = Dataset.from_dict({name: value.tolist() for name, value in batch.items()})
    # The first step is huge, the second undoes nothing of it: the first checkpoint is the best.
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, learning_rate=5.0, save_steps=1, eval_steps=1,
        eval_strategy="steps", load_best_model_at_end=True, metric_for_best_model="eval_loss",
        use_cpu=True, report_to="none", disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data)
    trainer.train()
    best = load_file(f"{trainer.state.best_model_checkpoint}/model.safetensors")
    last = load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    own = {name: value for name, value in model.state_dict().items() if "adapter" in name}
    assert own and all(torch.equal(best[name], value) for name, value in own.items())
    assert not all(torch.equal(last[name], value) for name, value in own.items())


def test_a_bottleneck_that_does_not_fit_changes_nothing(tmp_path):
    model = methods.apply(model_of("bert", "ner"), settings("adapter"), "ner")
    methods.save(model, tmp_path)
    with pytest.raises(UserError, match="has bottleneck adapters already"):
        methods.load(model, tmp_path)
    other = model_of("gpt2", "ner")
    with pytest.raises(UserError, match="not an adapter of this model"):
        methods.load(other, tmp_path)
    assert not adapter.is_added(other) and not any("adapter" in n for n, _ in other.named_modules())
    held = load_file(tmp_path / "adapter_model.safetensors")
    held.pop("classifier.bias")
    save_file(held, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match="classifier.bias has shape None"):
        methods.load(model_of("bert", "ner"), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"bottleneck": "8"}))
    with pytest.raises(UserError, match=r"has shape \(8,\), expected \('8',\)"):
        methods.load(model_of("bert", "ner"), tmp_path)


def test_an_adapter_of_peft_that_fits_in_part_is_refused(tmp_path):
    model = methods.apply(model_of("llama", "lm"), settings("lora"), "lm")
    methods.save(model, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    held = load_file(path)
    save_file(dict(list(held.items())[:-1]), path)
    with pytest.raises(UserError, match="lora_B.weight is in one of them only"):
        methods.load(model_of("llama", "lm"), tmp_path)
    save_file(held, path)
    with pytest.raises(UserError, match="not an adapter of this model"):
        methods.load(models.causal_lm("llama", num_hidden_layers=1), tmp_path)


@pytest.mark.parametrize("before", [False, True])
def test_an_adapter_s_config_says_nothing_of_a_quantisation_while_loading(tmp_path, before):
    model = methods.apply(model_of("llama", "lm"), settings("adapter"), "lm")
    model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    model.hf_quantizer = SimpleNamespace(pre_quantized=before)
    methods.save(model, tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert ("quantization_config" in saved) == before and hasattr(
        model.config, "quantization_config"
    )


def test_qlora_where_bitsandbytes_is(tmp_path):
    pytest.importorskip("bitsandbytes")
    from fastft.finetune import loading

    base = models.causal_lm("llama", hidden_size=64, intermediate_size=128, head_dim=16)
    base.save_pretrained(tmp_path / "base")
    model = loading.load_model(tmp_path / "base", "lm", quantize=True)
    model = methods.apply(model, settings("qlora"), "lm")
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name, _ in trained)
    optimizer = torch.optim.AdamW([p for _, p in trained], lr=1e-2)
    losses = []
    for _ in range(4):
        losses.append(gradients(model, batch_of("lm"))[0])
        optimizer.step()
    assert losses[-1] < losses[0] - 0.05
    methods.save(model, tmp_path / "adapter")
    other = loading.load_model(tmp_path / "base", "lm", quantize=True)
    loaded = methods.load(other, tmp_path / "adapter").eval()
    batch = batch_of("lm")
    assert torch.equal(loaded(**batch).logits, model.eval()(**batch).logits)


def test_a_hostile_adapter_is_not_loaded(tmp_path):
    model = methods.apply(model_of("llama", "lm"), settings("prompt"), "lm")
    methods.save(model, tmp_path)
    config = tmp_path / "adapter_config.json"
    honest = json.loads(config.read_text())
    named = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "x"}
    for hostile in (
        {**named, "tokenizer_name_or_path": str(tmp_path), "tokenizer_kwargs": {"x": 1}},
        {"megatron_config": {"x": 1}, "megatron_core": "antigravity"},
    ):
        config.write_text(json.dumps(honest | hostile))
        with pytest.raises(UserError, match="is refused"):
            methods.load(model_of("llama", "lm"), tmp_path)
    config.write_text(json.dumps([1]))
    with pytest.raises(UserError, match="cannot be read"):
        methods.load(model_of("llama", "lm"), tmp_path)
    config.write_text(json.dumps(honest))
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(UserError, match="no other format is read"):
        methods.load(model_of("llama", "lm"), tmp_path)
