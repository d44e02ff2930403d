"""LazyLogits: metadata and mixed-precision plumbing cost nothing, any read gives the logits."""

import copy
import io

import pytest
import torch
from encoders import batch as encoder_batch
from encoders import encoder
from models import batch, causal_lm, with_lora
from transformers.modeling_outputs import CausalLMOutputWithPast

from fastft.patch import patch
from fastft.patch.lazy import LazyLogits
from fastft.patch.swap import switched_off


def lazy_of(values, calls=None, **overrides):
    def compute():
        if calls is not None:
            calls.append(torch.is_grad_enabled())
        return values * 1

    given = {"dtype": values.dtype, "requires_grad": values.requires_grad, **overrides}
    return LazyLogits(compute, values.shape, device=values.device, **given)


def test_metadata_does_not_compute():
    calls = []
    lazy = lazy_of(torch.randn(2, 3, 5, requires_grad=True), calls)
    assert lazy.shape == (2, 3, 5) and lazy.size(-1) == 5 and len(lazy) == 2 and lazy.dim() == 3
    assert lazy.dtype is torch.float32 and lazy.device.type == "cpu" and lazy.ndim == 3
    assert lazy.numel() == torch.numel(lazy) == 30 and lazy.requires_grad
    assert lazy.is_floating_point() and torch.is_floating_point(lazy)
    assert isinstance(lazy, torch.Tensor) and {lazy: 1}[lazy] == 1 and lazy.element_size() == 4
    assert lazy.stride() == (15, 5, 1) and not lazy.is_cuda and not lazy.is_sparse
    output = CausalLMOutputWithPast(loss=torch.zeros(()), logits=lazy)
    assert len(output.to_tuple()) == 2 and output[1] is lazy
    assert not calls and not lazy.is_materialized


READS = {
    "add": lambda z: z + 1,
    "argmax": lambda z: z.argmax(-1),
    "index": lambda z: z[..., :-1, :],
    "cat": lambda z: torch.cat([z, z]),
    "numpy": lambda z: torch.from_numpy(z.detach().numpy().copy()),
    "tolist": lambda z: torch.tensor(z.tolist()),
    "function": lambda z: torch.nn.functional.log_softmax(z, -1),
    "matmul from the right": lambda z: torch.ones(4, 2) @ z,
    "out": lambda z: torch.add(z, 1, out=torch.empty(0)) if not z.requires_grad else z + 1,
    "data": lambda z: z.data,
    "inplace": lambda z: z.detach().clone().mul_(2),
    "iteration": lambda z: torch.stack(list(z)),
    "comparison": lambda z: z > 0,
    "vmap": lambda z: torch.func.vmap(torch.sum)(z),
}


@pytest.mark.parametrize("name", READS)
def test_every_read_gives_the_values_once(name):
    values, calls = torch.randn(2, 3, requires_grad=True), []
    lazy = lazy_of(values, calls)
    got = READS[name](lazy)
    READS[name](lazy)
    torch.testing.assert_close(got, READS[name](values))
    assert type(got) is torch.Tensor and calls == [True]


def test_gradients_flow_and_every_way_to_ask_for_them_works():
    values = torch.randn(2, 3, requires_grad=True)
    lazy = lazy_of(values)
    (grad,) = torch.autograd.grad(lazy.square().sum(), values)
    assert lazy.grad_fn is not None and not lazy.is_leaf
    torch.testing.assert_close(grad, 2 * values)
    lazy_of(values).backward(torch.ones(2, 3))
    torch.testing.assert_close(values.grad, torch.ones(2, 3))
    (grad,) = torch.autograd.grad(lazy_of(values), values, torch.full((2, 3), 3.0))
    torch.testing.assert_close(grad, torch.full((2, 3), 3.0))


def test_history_is_that_of_the_forward_not_of_the_first_reader():
    values, calls = torch.randn(2, 3, requires_grad=True), []
    lazy = lazy_of(values, calls)
    with torch.no_grad():
        lazy.sum()
    assert calls == [True] and lazy.sum().requires_grad
    with torch.no_grad():
        lazy = lazy_of(values, calls, requires_grad=False)
    lazy.sum()
    assert calls == [True, False] and not lazy.requires_grad and not lazy.sum().requires_grad


def fully_sharded(seen: list, name: str):
    """A hook such as FSDP's."""

    def hook(grad):
        seen.append(name)

    hook.__module__ = "torch.distributed.fsdp._fully_shard._fsdp_state"
    return hook


def test_casts_and_hooks_wait():
    """accelerate casts outputs of a step, DDP clones them, FSDP casts and hangs hooks on them."""
    values, calls, seen = torch.randn(2, 3, requires_grad=True), [], []
    lazy = lazy_of(values, calls)
    copied = lazy.clone()
    assert lazy._base is None
    wide = [lazy.double(), lazy.to(torch.float64), lazy.to(dtype=torch.float64)]
    assert lazy.float() is lazy or lazy.float().dtype is torch.float32
    assert all(type(w) is LazyLogits and w.dtype is torch.float64 for w in wide)
    handle = lazy.register_hook(fully_sharded(seen, "removed"))
    lazy.register_hook(fully_sharded(seen, "kept"))
    handle.remove()
    assert calls == []
    wide[0].sum().backward()
    assert calls == [True] and seen == ["kept"]
    torch.testing.assert_close(wide[1], values.double())
    copied.detach().zero_()
    torch.testing.assert_close(lazy, values)
    assert lazy.register_hook(fully_sharded(seen, "late")) is not None


def test_copies_prints_and_saves_as_an_ordinary_tensor():
    values = torch.randn(2, 3)
    assert repr(lazy_of(values)) == repr(values)
    copied = copy.deepcopy(lazy_of(values))
    assert type(copied) is torch.Tensor and torch.equal(copied, values)
    file = io.BytesIO()
    torch.save({"logits": lazy_of(values)}, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True)["logits"], values)


def model_and_batch(lora=False):
    model = causal_lm("llama").train()
    model = with_lora(model) if lora else model
    patch(model)
    return model, batch("right")


def test_logits_of_a_training_step_have_their_gradients():
    model, inputs = model_and_batch()

    def step():
        model.zero_grad()
        output = model(**inputs)
        real = output.logits[inputs["attention_mask"].bool()]
        (output.loss + real.logsumexp(-1).mean()).backward()
        return {n: p.grad.clone() for n, p in model.named_parameters()}

    got = step()
    with switched_off(model):
        wanted = step()
    for name, grad in wanted.items():
        torch.testing.assert_close(got[name], grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("lora", [False, True])
def test_autocast_is_that_of_the_forward(lora):
    """accelerate puts only the forward under autocast; the logits are read outside."""
    model, inputs = model_and_batch(lora)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**inputs)
        with switched_off(model):
            wanted = model(**inputs).logits
    assert output.logits.dtype is wanted.dtype is torch.bfloat16
    assert output.logits.sum().dtype is wanted.dtype
    real = inputs["attention_mask"].bool()
    gap = (output.logits[real].float() - wanted[real].float()).norm()
    assert gap < 0.05 * wanted.float().norm()


def test_a_loss_alone_never_computes_them():
    model, inputs = model_and_batch()
    output = model(**inputs)
    output.loss.backward()
    assert type(output.logits) is LazyLogits and not output.logits.is_materialized
    assert output.logits.shape == (*inputs["input_ids"].shape, 97)


def moved(model, by: str):
    head = model.get_output_embeddings().weight
    if by == "fused":
        torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True).step()
    elif by == "plain":
        torch.optim.SGD(model.parameters(), lr=1e-2).step()
    elif by == "data":
        head.data.add_(0.01)
    else:
        model.load_state_dict({k: v + 0.01 for k, v in model.state_dict().items()})


@pytest.mark.parametrize("by", ["fused", "plain", "data", "loaded"])
@pytest.mark.parametrize("head", ["CausalLM", "MaskedLM"])
def test_logits_read_after_the_head_has_changed(head, by):
    """They would be those of other weights; a tensor's version tells only half of these."""
    model = causal_lm("llama") if head == "CausalLM" else encoder("bert", head)
    inputs = batch("right") if head == "CausalLM" else encoder_batch(head)
    patch(model.train())
    read, unread = model(**inputs), model(**inputs)
    assert type(unread.logits) is LazyLogits
    wanted = read.logits + 0
    read.loss.backward()
    moved(model, by)
    torch.testing.assert_close(read.logits, wanted)
    with pytest.raises(RuntimeError, match="before optimizer.step"):
        unread.logits.sum()
    assert unread.logits.shape == wanted.shape


def test_logits_of_a_frozen_head_read_late():
    model = with_lora(causal_lm("llama")).train()
    patch(model)
    output, twin = model(**batch("right")), model(**batch("right"))
    wanted = twin.logits + 0
    output.loss.backward()
    torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True).step()
    torch.testing.assert_close(output.logits, wanted)


def test_weights_that_are_no_numbers_have_not_changed():
    weight = torch.full((3, 2), torch.nan)
    lazy = LazyLogits(lambda: weight * 1, (3, 2), weight.dtype, weight.device, False, [weight])
    assert lazy.isnan().all()


@pytest.mark.parametrize("read", [False, True])
def test_gradients_of_logits_that_the_loss_does_not_pass_through(read):
    """`logits.grad` would be none, or lack the loss's part; hooks would not run."""
    model, inputs = model_and_batch()
    output = model(**inputs)
    if read:
        output.logits.sum()
    with pytest.raises(RuntimeError, match="does not pass through"):
        output.logits.retain_grad()
    with pytest.raises(RuntimeError, match="does not pass through"):
        output.logits.register_hook(lambda grad: None)
    logits = output.logits + 0
    logits.retain_grad()
    logits.sum().backward()
    assert (logits.grad == 1).all()
