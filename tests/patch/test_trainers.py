"""transformers.Trainer and trl.SFTTrainer: the same run, patched before, patched after, or not."""

import pytest
import torch
from datasets import Dataset
from models import batch, causal_lm, with_lora
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from fastft.patch import lazy as lazy_logits
from fastft.patch import patch, unpatch
from fastft.patch.swap import swap_of

ROWS = 16


def rows(count=ROWS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        length = int(torch.randint(4, 12, (), generator=generator))
        ids = torch.randint(3, 97, (length,), generator=generator).tolist()
        yield {"input_ids": ids, "labels": [-100, -100, *ids[2:]]}


def collate(examples):
    longest = max(len(e["input_ids"]) for e in examples)

    def padded(name, fill):
        return torch.tensor([e[name] + [fill] * (longest - len(e[name])) for e in examples])

    mask = torch.tensor([[i < len(e["input_ids"]) for i in range(longest)] for e in examples])
    return {
        "input_ids": padded("input_ids", 0),
        "labels": padded("labels", -100),
        "attention_mask": mask.long(),
    }


@pytest.fixture
def computed(monkeypatch):
    """How many LazyLogits were computed."""
    calls = []
    materialize = lazy_logits.LazyLogits.materialize
    monkeypatch.setattr(
        lazy_logits.LazyLogits, "materialize", lambda self: calls.append(1) or materialize(self)
    )
    return calls


def trained(folder, make, when, trainer_class=Trainer, **settings):
    """The trainer after a few steps; when: patch "before" or "after" making it, or "never"."""
    model = make().train()
    if when == "before":
        patch(model)
    arguments = {
        "output_dir": str(folder / when), "use_cpu": True, "report_to": "none", "seed": 5,
        "optim": "adamw_torch_fused", "learning_rate": 1e-2, "max_steps": 3, "logging_steps": 1,
        "per_device_train_batch_size": 4, "save_strategy": "no", "disable_tqdm": True,
    }  # fmt: skip
    extras = {k: settings.pop(k) for k in ("eval_dataset", "compute_metrics") if k in settings}
    trainer = trainer_class(
        model=model,
        args=TrainingArguments(**{**arguments, **settings}),
        train_dataset=list(rows()),
        data_collator=collate,
        **extras,
    )
    if when == "after":
        patch(model)
    trainer.train()
    return trainer


def history(trainer, *names):
    return [e[n] for e in trainer.state.log_history for n in names if n in e]


def assert_same_run(got, wanted, tolerance=1e-4):
    for name in ("loss", "grad_norm"):
        ours, theirs = history(got, name), history(wanted, name)
        assert len(theirs) >= 3 and ours == pytest.approx(theirs, rel=tolerance)
    assert swap_of(_causal_lm(got.model)) is not None and swap_of(_causal_lm(wanted.model)) is None
    theirs = dict(wanted.model.named_parameters())
    for name, parameter in got.model.named_parameters():
        # AdamW's first steps are the gradient's sign: tiny gradients may differ in theirs.
        gap = (parameter - theirs[name]).norm()
        assert gap <= 100 * tolerance * theirs[name].norm(), name


def _causal_lm(model):
    return model.get_base_model() if hasattr(model, "get_base_model") else model


MAKERS = {
    "full": lambda: causal_lm("llama"),
    "lora": lambda: with_lora(causal_lm("llama")),
    "gpt2": lambda: with_lora(causal_lm("gpt2")),
}


@pytest.mark.parametrize("name", MAKERS)
def test_trainer(tmp_path, computed, name):
    wanted = trained(tmp_path, MAKERS[name], "never")
    for when in ("before", "after"):
        assert_same_run(trained(tmp_path, MAKERS[name], when), wanted)
    assert not computed


def test_accumulation(tmp_path, computed):
    """num_items_in_batch: 1 x 8 and 4 x 2 rows are one step, patched or not."""
    runs = {
        (when, size): trained(
            tmp_path, MAKERS["full"], when, max_steps=2,
            per_device_train_batch_size=size, gradient_accumulation_steps=8 // size,
        )
        for when in ("never", "before") for size in (8, 2)
    }  # fmt: skip
    wanted = history(runs["never", 8], "loss", "grad_norm")
    assert len(wanted) == 4
    for run in runs.values():
        assert history(run, "loss", "grad_norm") == pytest.approx(wanted, rel=1e-4)
    assert not computed


@pytest.mark.parametrize(
    "settings",
    [
        {"bf16": True},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"label_smoothing_factor": 0.1},
        {"neftune_noise_alpha": 5.0},
        {"max_grad_norm": 0.1, "average_tokens_across_devices": False},
        pytest.param(
            {"torch_compile": True, "torch_compile_backend": "eager"}, marks=pytest.mark.slow
        ),
    ],
    ids=str,
)
def test_arguments(tmp_path, computed, settings):
    tolerance = 2e-2 if settings.get("bf16") else 1e-4
    make = MAKERS["lora"] if "torch_compile" not in settings else MAKERS["full"]
    runs = [trained(tmp_path, make, when, **settings) for when in ("before", "never")]
    losses = [history(run, "loss") for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=tolerance) and len(losses[0]) == 3
    norms = [history(run, "grad_norm") for run in runs]
    assert norms[0] == pytest.approx(norms[1], rel=10 * tolerance)
    if "label_smoothing_factor" not in settings:
        assert not computed


def logits_of(output):
    """Of what Trainer gives metrics, or predicts: there may be more beside them."""
    found = output.predictions
    return torch.from_numpy(found[0] if isinstance(found, tuple) else found)


def accuracy(evaluation):
    logits, labels = logits_of(evaluation), torch.from_numpy(evaluation.label_ids)
    kept = labels[:, 1:] != -100
    metrics = {"accuracy": (logits[:, :-1].argmax(-1) == labels[:, 1:])[kept].float().mean().item()}
    if evaluation.inputs is not None:
        metrics["tokens"] = int((evaluation.inputs > 0).sum())
    return metrics


@pytest.mark.parametrize(
    "settings",
    [{}, {"include_for_metrics": ["inputs", "loss"]}, {"bf16": True}, {"bf16_full_eval": True}],
    ids=str,
)
def test_evaluation(tmp_path, settings):
    given = {
        "eval_dataset": list(rows(6, seed=1)), "compute_metrics": accuracy,
        "per_device_eval_batch_size": 3, **settings,
    }  # fmt: skip
    got, wanted = (trained(tmp_path, MAKERS["full"], when, **given) for when in ("before", "never"))
    ours, theirs = got.evaluate(), wanted.evaluate()
    exact = not any("bf16" in name for name in settings)
    assert ours["eval_loss"] == pytest.approx(theirs["eval_loss"], rel=1e-4 if exact else 2e-2)
    assert ours.keys() == theirs.keys() and 0 < theirs["eval_accuracy"] < 1
    assert ours["eval_accuracy"] == pytest.approx(theirs["eval_accuracy"], abs=0 if exact else 0.1)
    ours, theirs = (run.predict(list(rows(6, seed=1))) for run in (got, wanted))
    real = torch.from_numpy(theirs.label_ids) != -100
    ours, theirs = logits_of(ours)[real].float(), logits_of(theirs)[real].float()
    assert (ours - theirs).norm() <= (1e-3 if exact else 5e-2) * theirs.norm()


def test_evaluation_of_the_loss_alone_computes_no_logits(tmp_path, computed):
    given = {"eval_dataset": list(rows(6, seed=1)), "prediction_loss_only": True}
    got, wanted = (trained(tmp_path, MAKERS["full"], when, **given) for when in ("before", "never"))
    assert got.evaluate()["eval_loss"] == pytest.approx(wanted.evaluate()["eval_loss"], rel=1e-4)
    assert not computed


def test_checkpoints_and_resuming(tmp_path):
    given = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    got, wanted = (trained(tmp_path, MAKERS["full"], when, **given) for when in ("before", "never"))
    folders = [tmp_path / when / "checkpoint-2" for when in ("before", "never")]
    names = [sorted(file.name for file in folder.iterdir()) for folder in folders]
    assert names[0] == names[1]
    ours, theirs = (load_file(folder / "model.safetensors") for folder in folders)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-2, atol=1e-3)
    assert (folders[0] / "config.json").read_text() == (folders[1] / "config.json").read_text()
    final = {n: p.clone() for n, p in got.model.named_parameters()}
    got.train(resume_from_checkpoint=str(folders[0]))
    for name, parameter in got.model.named_parameters():
        torch.testing.assert_close(parameter, final[name])
    got.save_model(str(tmp_path / "saved"))
    loaded = type(got.model).from_pretrained(tmp_path / "saved").eval()
    inputs = batch("none")
    unpatch(got.model.eval())
    assert torch.equal(loaded(**inputs).logits, got.model(**inputs).logits)


class Tokenizer:
    """SFTTrainer asks for one even when the data are token ids already."""

    def __new__(cls):
        from tokenizers import Tokenizer as Fast
        from tokenizers.models import WordLevel
        from transformers import PreTrainedTokenizerFast

        words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, 97)}}
        return PreTrainedTokenizerFast(
            tokenizer_object=Fast(WordLevel(words, unk_token="<pad>")),
            pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        )  # fmt: skip


def sft(folder, make, when, **settings):
    """A trl run, its report when patched after, and the token shapes a decoder layer has seen."""
    from trl import SFTConfig, SFTTrainer

    model = make().train()
    report = patch(model) if when == "before" else None
    arguments = {
        "output_dir": str(folder / when), "use_cpu": True, "bf16": False, "report_to": "none",
        "seed": 5, "optim": "adamw_torch_fused", "learning_rate": 1e-2, "max_steps": 3,
        "logging_steps": 1, "per_device_train_batch_size": 4, "save_strategy": "no",
        "disable_tqdm": True, "gradient_checkpointing": False, "max_length": 16,
    }  # fmt: skip
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**{**arguments, **settings}),
        train_dataset=Dataset.from_list([{"input_ids": r["input_ids"]} for r in rows()]),
        processing_class=Tokenizer(),
    )
    if when == "after":
        report = patch(trainer.model)
    base = _causal_lm(trainer.model)
    layer = (base.model.layers if hasattr(base, "model") else base.transformer.h)[0]
    shapes = []
    layer.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape[:2])))
    trainer.train()
    return trainer, report, shapes


PACKED = {"packing": True}
FREE = {"padding_free": True, "max_length": None}


@pytest.mark.parametrize("settings", [{}, PACKED, FREE, {"gradient_checkpointing": True}], ids=str)
@pytest.mark.parametrize("name", MAKERS)
def test_sft_trainer(tmp_path, computed, name, settings):
    wanted, _, padded = sft(tmp_path, MAKERS[name], "never", **settings)
    for when in ("before", "after"):
        got, report, shapes = sft(tmp_path, MAKERS[name], when, **settings)
        for key in ("loss", "grad_norm"):
            assert history(got, key) == pytest.approx(history(wanted, key), rel=1e-3)
        assert report.count("norm") == 5 and report.count("attention") == 2
        assert report.count("padding") == 1 and (report.count("lora") > 0) == (name != "full")
        if when == "after":
            assert report.count("linear_cross_entropy") == 0
            assert any("replaced by somebody else" in entry.reason for entry in report.left)
        assert all(shape[0] == 1 for shape in shapes), "rows are laid end to end"
        if settings in (PACKED, FREE):
            assert shapes == padded
        else:
            tokens = [a * b for a, b in padded]
            assert sum(b for _, b in shapes) < sum(tokens)
        remarks = unpatch(got.model)
        assert len(remarks) == (when == "before"), remarks
    assert not computed
