"""One process of test_distributed: losses and gradients of a wrapped model against a plain one."""

import os
import sys
import warnings

import torch
import torch.distributed as dist
from models import batch, causal_lm, with_lora
from torch.nn.parallel import DistributedDataParallel

from fastft.patch import patch, unpatch
from fastft.patch.swap import swap_of


def step(model, inputs):
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    return output, output.loss.item()


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def plain_step(make, every):
    """The mean over the processes' batches, on one plain model."""
    model, losses = make(), []
    for inputs in every:
        loss = model(**inputs).loss
        losses.append(loss.item())
        (loss / len(every)).backward()
    return losses, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def check(wrapped, plain, make, rank):
    every = [batch("right", seed=s) for s in range(dist.get_world_size())]
    losses, wanted = plain_step(make, every)
    for _ in range(2):
        output, loss = step(wrapped, every[rank])
        assert not output.logits.is_materialized, "wrapping must not compute the logits"
        assert abs(loss - losses[rank]) < 1e-5 * losses[rank], (loss, losses)
        grads = {n: full(p.grad) for n, p in plain.named_parameters() if p.grad is not None}
        assert grads.keys() == wanted.keys()
        for name, grad in wanted.items():
            gap = (grads[name] - grad).norm()
            assert gap < 1e-4 * max(grad.norm(), 1e-2), (name, gap, grad.norm())


def ddp(make, rank, **settings):
    model = make()
    patch(model)
    wrapped = DistributedDataParallel(model, **settings)
    check(wrapped, model, make, rank)
    assert unpatch(model) == []


def fsdp(make, rank, first):
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    model = make()
    if first:
        patch(model)
    policy = MixedPrecisionPolicy(output_dtype=torch.float32)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    for layer in base.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    if not first:
        report = patch(model)
        assert report.count("norm") == 5 and report.count("linear_cross_entropy") == 1, str(report)
        assert any("patch before sharding" in entry.reason for entry in report.left), str(report)
    assert swap_of(base) is not None
    check(model, model, make, rank)
    output = model(**batch("right"))
    wanted = make()(**batch("right")).logits
    real = batch("right")["attention_mask"].bool()
    torch.testing.assert_close(full(output.logits)[real], wanted[real], rtol=1e-4, atol=1e-4)
    assert unpatch(model) == []


def int8(rank):
    """Sharded and replicated over an int8 base, whose numbers every process holds whole."""
    from torch.distributed.fsdp import fully_shard

    def make():
        model = with_lora(causal_lm("llama")).train()
        patch(model, base_weights="int8")
        return model

    model = make()
    check(DistributedDataParallel(model), model, make, rank)
    print("replicated agrees")
    model = make()
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    check(model, model, make, rank)
    print("sharded agrees")
    checkpointed = make()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": False})
    check(DistributedDataParallel(checkpointed), checkpointed, make, rank)
    print("checkpointed agrees")


def main():
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = int(os.environ["RANK"])
    if sys.argv[1] == "int8":
        int8(rank)
        dist.destroy_process_group()
        return
    makers = {
        "full": lambda: causal_lm("llama").train(),
        "tied": lambda: causal_lm("llama", tie_word_embeddings=True).train(),
        "lora": lambda: with_lora(causal_lm("llama")).train(),
    }
    for name, make in makers.items():
        if sys.argv[1] == "ddp":
            ddp(make, rank)
            ddp(make, rank, find_unused_parameters=True)
            ddp(make, rank, static_graph=True)
        else:
            fsdp(make, rank, first=True)
            fsdp(make, rank, first=False)
        print(f"{sys.argv[1]} {name} agrees")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
