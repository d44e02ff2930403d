"""Encoders: no padding is computed, and every head's loss, scores and gradients stay right."""

import copy

import pytest
import torch
from encoders import CLASSES, DECODERS, ENCODERS, HEADS, batch, encoder
from peft import LoraConfig, get_peft_model

import fastft
from fastft.finetune.methods.cache_for_peft import name_cache
from fastft.patch import packing
from fastft.patch.lazy import LazyLogits

CASES = [(name, head) for name in ENCODERS for head in HEADS]
CASES += [(name, "SequenceClassification") for name in DECODERS]


def scores(output):
    return output.start_logits if "start_logits" in output else output.logits


def step(model, inputs):
    """Loss, scores at real places, and gradients of one training step."""
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    logits = scores(output).detach()
    mask = inputs["attention_mask"]
    if logits.shape[: mask.dim()] == mask.shape:
        logits = logits[mask.bool()]
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return output.loss.detach(), logits, grads


def assert_same(got, wanted, limit=2e-5):
    torch.testing.assert_close(got[0].to(wanted[0].dtype), wanted[0], rtol=limit, atol=limit)
    torch.testing.assert_close(got[1], wanted[1], rtol=limit, atol=limit)
    assert got[2].keys() == wanted[2].keys()
    largest = max(g.norm() for g in wanted[2].values())
    for name, grad in wanted[2].items():
        assert (got[2][name] - grad).norm() <= limit * max(grad.norm(), 5e-2 * largest), name


@pytest.fixture
def packed(monkeypatch):
    """How many tokens each packed forward computed."""
    seen = []
    real = packing.Packing.of

    def of(mask):
        found = real(mask)
        seen.append(None if found is None else found.places.numel())
        return found

    monkeypatch.setattr(packing.Packing, "of", staticmethod(of))
    return seen


@pytest.mark.parametrize("padding", ["right", "none", "left"])
@pytest.mark.parametrize("name, head", CASES, ids=lambda x: x)
def test_step_is_the_same(name, head, padding, packed):
    model, inputs = encoder(name, head).train(), batch(head, padding)
    wanted = step(model, inputs)
    report = fastft.patch(model)
    assert report.count("padding") == 1, report
    assert report.count("cross_entropy") == 1, report
    packed.clear()
    assert_same(step(model, inputs), wanted)
    real = int(inputs["attention_mask"].sum())
    if head == "QuestionAnswering":
        assert packed == [] and [e for e in report.swapped if "the loss counts it" in e.reason]
    else:
        assert packed == [None if padding == "none" else real]
    assert fastft.unpatch(model) == []
    after = step(model, inputs)
    assert torch.equal(after[0], wanted[0]) and torch.equal(after[1], wanted[1])


@pytest.mark.parametrize("name, head", CASES, ids=lambda x: x)
def test_prediction_is_the_same_and_padded_places_are_zero(name, head, packed):
    model, inputs = encoder(name, head), batch(head)
    inputs = {k: inputs[k] for k in ("input_ids", "attention_mask")}
    with torch.no_grad():
        wanted = scores(model(**inputs))
        fastft.patch(model)
        packed.clear()
        got = scores(model(**inputs))
        assert packed[-1] == int(inputs["attention_mask"].sum())
        mask = inputs["attention_mask"].bool()
        per_place = got.shape[: mask.dim()] == mask.shape
        chosen = mask if per_place else slice(None)
        torch.testing.assert_close(got[chosen], wanted[chosen], rtol=2e-5, atol=2e-5)
        if head == "MultipleChoice":
            return
        base = getattr(model, model.base_model_prefix)
        states = base(**inputs, **({"use_cache": False} if name in DECODERS else {}))[0]
        assert states[~mask].eq(0).all() and states[mask].ne(0).any()


@pytest.mark.parametrize("name", [*ENCODERS, *DECODERS])
def test_rows_that_are_all_padding(name):
    model, inputs = (
        encoder(name, "SequenceClassification"),
        batch("SequenceClassification", "empty"),
    )
    real = inputs["attention_mask"].any(1)
    wanted = model(**inputs).logits[real]
    fastft.patch(model)
    got = model(**inputs).logits
    assert got.isfinite().all()
    torch.testing.assert_close(got[real], wanted, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("head", ["SequenceClassification", "TokenClassification", "MaskedLM"])
@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "modernbert"])
def test_batches_of_a_step_share_one_mean(name, head):
    """One batch of 4 and two of 2: with num_items_in_batch the gradients add up to the same."""
    model, inputs = encoder(name, head).train(), batch(head)
    plain = copy.deepcopy(model)
    fastft.patch(model)
    items = (inputs["labels"] != -100).sum()
    whole = step(plain, inputs)
    model.zero_grad()
    total = 0
    for rows in (slice(0, 1), slice(1, 4)):
        part = {k: v[rows] for k, v in inputs.items()}
        loss = model(**part, num_items_in_batch=items).loss
        loss.backward()
        total += loss.item()
    assert total == pytest.approx(whole[0].item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gap = (parameter.grad - whole[2][name]).norm()
            assert gap <= 1e-4 * max(whole[2][name].norm(), 1e-3), name


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification"])
def test_other_losses_are_scaled(problem):
    model = encoder("bert", "SequenceClassification", problem_type=problem)
    inputs = batch("SequenceClassification")
    inputs["labels"] = torch.rand(4, CLASSES)
    wanted = model(**inputs).loss
    fastft.patch(model)
    torch.testing.assert_close(model(**inputs).loss, wanted)
    got = model(**inputs, num_items_in_batch=10 * CLASSES).loss
    torch.testing.assert_close(got, wanted * 4 / 10)


def test_a_batch_without_labels_costs_nothing_and_breaks_nothing():
    """Eager gives NaN for loss and gradients: a step's other batches would be lost with it."""
    model, inputs = encoder("bert", "TokenClassification").train(), batch("TokenClassification")
    fastft.patch(model)
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    loss, _, grads = step(model, inputs)
    assert loss == 0 and all(g.eq(0).all() for g in grads.values())


def test_labels_out_of_range_name_their_place():
    model, inputs = encoder("bert", "TokenClassification"), batch("TokenClassification")
    fastft.patch(model)
    inputs["labels"][0, 2] = CLASSES
    with pytest.raises(ValueError, match=f"got {CLASSES} at position"):
        model(**inputs)


def test_masked_lm_computes_the_masked_places_alone():
    model, inputs = encoder("bert", "MaskedLM").train(), batch("MaskedLM")
    wanted = model(**inputs)
    fastft.patch(model)
    computed = []
    hook = model.cls.predictions.decoder.register_forward_hook(
        lambda m, a, out: computed.append(out.shape[:-1].numel())
    )
    got = model(**inputs)
    masked, real = int((inputs["labels"] != -100).sum()), inputs["attention_mask"].bool()
    assert computed == [masked] and isinstance(got.logits, LazyLogits)
    torch.testing.assert_close(got.logits[real], wanted.logits[real], rtol=2e-5, atol=2e-5)
    assert computed == [masked, inputs["labels"].numel()]
    hook.remove()


def test_padding_inside_a_row_and_positions_of_ones_own():
    model, inputs = encoder("bert", "TokenClassification"), batch("TokenClassification")
    inputs["attention_mask"][0, 3:5] = 0
    inputs["labels"][0, 3:5] = -100
    inputs["position_ids"] = torch.arange(11).flip(0)[None].expand(4, -1)
    inputs["token_type_ids"] = torch.randint(0, 2, (4, 11))
    wanted = step(model, inputs)
    fastft.patch(model)
    assert_same(step(model, inputs), wanted)


def test_labels_at_padded_places_count_and_are_told(packed):
    """Tags padded with a tag of their own, as older code does."""
    model, inputs = encoder("bert", "TokenClassification"), batch("TokenClassification")
    inputs["labels"][inputs["attention_mask"] == 0] = 0
    wanted = step(model, inputs)
    fastft.patch(model)
    packed.clear()
    with pytest.warns(UserWarning, match="labels at padded places"):
        assert_same(step(model, inputs), wanted)
    assert packed == []


def test_hidden_states_and_attentions_asked_for():
    model, inputs = encoder("bert", "SequenceClassification"), batch("SequenceClassification")
    model.set_attn_implementation("eager")
    asked = {"output_hidden_states": True, "output_attentions": True}
    wanted = model(**inputs, **asked)
    fastft.patch(model)
    got, real = model(**inputs, **asked), inputs["attention_mask"].bool()
    for name in ("hidden_states", "attentions"):
        assert len(wanted[name]) >= 2
        for pair in zip(got[name], wanted[name], strict=True):
            a, b = (x.transpose(1, 2) if x.dim() == 4 else x for x in pair)
            torch.testing.assert_close(a[real], b[real], rtol=2e-5, atol=2e-5)
    as_tuple = model(**inputs, return_dict=False)
    torch.testing.assert_close(as_tuple[0], wanted.loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("padding", ["right", "none"])
def test_under_compile_at_most_one_break(padding):
    model, inputs = (
        encoder("bert", "SequenceClassification").train(),
        batch("SequenceClassification", padding),
    )
    wanted = step(model, inputs)
    fastft.patch(model)
    explained = torch._dynamo.explain(model)(**inputs)
    assert explained.graph_break_count <= 1
    compiled = torch.compile(model, backend="aot_eager")
    loss = compiled(**inputs).loss
    torch.testing.assert_close(loss.detach(), wanted[0], rtol=1e-5, atol=1e-6)


def test_deberta_keeps_its_attention_and_is_reported():
    import transformers

    config = transformers.DebertaV2Config(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, num_labels=CLASSES, relative_attention=True,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, pad_token_id=1,
    )  # fmt: skip
    model = transformers.DebertaV2ForTokenClassification(config).eval()
    inputs = batch("TokenClassification")
    wanted = step(model, inputs)
    report = fastft.patch(model)
    assert [e for e in report.left if "attention kept" in e.reason]
    assert_same(step(model, inputs), wanted)


@pytest.mark.parametrize("train", ["all", "top layer", "biases", "lora", "ia3", "prompt", "prefix"])
@pytest.mark.parametrize("name", ["bert", "distilbert"])
def test_ways_of_training(name, train):
    import peft

    model, inputs = encoder(name, "SequenceClassification"), batch("SequenceClassification")
    targets = ["query", "value"] if name == "bert" else ["q_lin", "v_lin"]
    top = ["layer.1", "classifier"]
    if train == "top layer":
        for n, p in model.named_parameters():
            p.requires_grad = any(part in n for part in top)
    elif train == "biases":
        for n, p in model.named_parameters():
            p.requires_grad = n.endswith("bias") or "classifier" in n
    elif train == "lora":
        model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules=targets))
    elif train == "ia3":
        ff = ["output.dense"] if name == "bert" else ["lin2"]
        model = get_peft_model(
            model,
            peft.IA3Config(
                task_type="SEQ_CLS", target_modules=targets + ff, feedforward_modules=ff
            ),
        )
    elif name == "distilbert":
        pytest.skip("PEFT knows no prompt or prefix tuning of DistilBERT")
    elif train == "prompt":
        model = get_peft_model(model, peft.PromptTuningConfig("SEQ_CLS", num_virtual_tokens=3))
    elif train == "prefix":
        config = peft.PrefixTuningConfig("SEQ_CLS", num_virtual_tokens=3)
        model = name_cache(get_peft_model(model, config))
    model.eval()  # prompt encoders draw nothing there, and gradients flow all the same
    wanted = step(model, inputs)
    fastft.patch(model)
    assert_same(step(model, inputs), wanted, 5e-5)


def test_whatever_the_default_device_is():
    model, other = encoder("bert", "MaskedLM"), encoder("bert", "MaskedLM")
    wanted = fastft.patch(other)
    torch.set_default_device("meta")
    try:
        assert str(fastft.patch(model)) == str(wanted)
    finally:
        torch.set_default_device(None)


def test_verify():
    model, inputs = encoder("roberta", "TokenClassification"), batch("TokenClassification")
    found = fastft.verify(model, inputs)
    assert found.ok, found
