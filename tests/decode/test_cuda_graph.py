"""GraphStep against the eager step, with recorded operators in the place of CUDA graphs."""

import pytest
import torch
from decode.tape import FakeGraphs, Tape
from models import causal_lm, with_lora
from ops import test_decoder_layer as layers

from fastft.decode import cuda_graph, generate
from fastft.decode.cuda_graph import GraphStep
from fastft.decode.step import FusedStep
from fastft.ops.decoder_layer import Tokens, decoder_layer


@pytest.fixture(autouse=True)
def log():
    FakeGraphs.log.clear()
    yield FakeGraphs.log


def steps(name="llama", lora=False, **settings):
    model = causal_lm(name)
    inner = with_lora(model).eval().get_base_model() if lora else model
    with torch.no_grad():
        return GraphStep(inner, make_graphs=FakeGraphs, **settings), FusedStep(inner, **settings)


def feed(width, rows=2):
    return [torch.randint(0, 97, (n,)).tolist() for n in ([width] * rows)]


class Both:
    """One step and the other, each over its cache, on the same tokens."""

    def __init__(self, ours, eager, rows=2, capacity=64):
        self.steps = ours, eager
        self.caches = [step.new_cache(rows, capacity) for step in self.steps]

    @torch.no_grad()
    def __call__(self, new, keep=1):
        ours, eager = (s(c, new, keep) for s, c in zip(self.steps, self.caches, strict=True))
        assert ours.shape == eager.shape and ours.is_contiguous()
        assert torch.equal(ours, eager)
        lengths = [cache.lengths for cache in self.caches]
        assert lengths[0] == lengths[1]
        for row, n in enumerate(lengths[0]):
            for a, b in zip(*(cache.layers for cache in self.caches), strict=True):
                assert torch.equal(a.keys[row, :, :n], b.keys[row, :, :n])
                assert torch.equal(a.values[row, :, :n], b.values[row, :, :n])
        return ours

    def each(self, change):
        for cache in self.caches:
            change(cache)


@pytest.mark.parametrize("lora", [False, True], ids=["plain", "LoRA"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_the_same_bits_as_eager_at_every_length_and_width(name, lora, log):
    both = Both(*steps(name, lora))
    both([[5] * 20, [7] * 3])  # a ragged prompt: eager
    log.clear()
    for width, keep in ((1, 1), (3, 2), (16, 16), (1, 1), (3, 1), (1, 2), (3, 3)):
        both(feed(width), keep)
    assert log == ["new"] + ["warm-up"] * 3 + ["capture", "replay"] * 2 + ["replay"] * 2
    assert both.steps[0].replayed == 4


def test_rows_that_are_finished_and_rolled_back(log):
    both = Both(*steps(), rows=3)
    both([[5, 6, 7], [7], [9, 9]])
    for _ in range(3):
        both(feed(1, 3))
    log.clear()
    both.each(lambda cache: cache.roll_back(1, 2))
    both(feed(1, 3))
    both.each(lambda cache: cache.roll_back(0, 1))
    both(feed(1, 3))
    assert log == ["replay"] * 2
    # Any two of three rows are one shape.
    for active in ((0, 2), (0, 2), (1, 2), (0, 1)):
        both([[11 + row] if row in active else [] for row in range(3)])
    assert log[2:] == ["warm-up", "capture", "replay", "replay", "replay"]
    for row in range(3):
        both([[row] if row == at else [] for at in range(3)])
    assert log[7:] == ["warm-up", "capture", "replay", "replay"]


def test_what_is_not_uniform_or_too_wide_runs_eagerly(log):
    both = Both(*steps())
    log.clear()
    for new in ([[1, 2], [3]], feed(17), feed(17), [[], []], [[4], [5, 6, 7]]):
        both(new, 2)
    assert log == [] and both.steps[0].replayed == 0


def test_a_cache_that_grew_is_captured_anew(log):
    both = Both(*steps(), capacity=4)
    for _ in range(3):
        both(feed(1))
    log.clear()
    both.each(lambda cache: cache.reserve(30))
    for _ in range(3):
        both(feed(1))
    assert log == ["new", "warm-up", "capture", "replay", "replay"]
    for _ in range(80):  # grows by itself
        both(feed(1))
    assert log.count("new") >= 2 and log[-1] == "replay"


def test_angles_that_grew_are_captured_anew(log):
    both = Both(*steps(), capacity=500)
    for _ in range(3):
        both(feed(1))
    log.clear()
    both.each(lambda cache: cache.reserve(600))
    both(feed(1))
    assert log == ["new", "warm-up"]
    assert len(both.steps[0].angles[0]) >= 600


def test_weights_that_were_trained_are_seen_and_those_that_moved(log):
    ours, eager = steps()
    both = Both(ours, eager)
    for _ in range(3):
        first = both(feed(1))
    log.clear()
    with torch.no_grad():
        ours.model.model.layers[1].mlp.down_proj.weight.mul_(-2)
    assert not torch.equal(both(feed(1)), first) and log == ["replay"]
    # As a sharded parameter moves: the tensor stays, its memory is another.
    held = ours.fused.layers[0].linears[3].weight.values
    held.set_(held.clone().mul_(3))
    eager.fused.layers[0].linears[3].weight.values.set_(held)
    vars(eager.fused.layers[0]).pop(
        "plan"
    )  # the CPU's kernels keep addresses of a step's own tensors
    for _ in range(2):
        both(feed(1))
    assert log == ["replay", "new", "warm-up", "capture", "replay"]


def test_another_cache_and_another_number_of_rows(log):
    ours, eager = steps()
    first, second, wide = Both(ours, eager), Both(ours, eager), Both(ours, eager, rows=5)
    for _ in range(3):
        first(feed(1))
        second(feed(1))
        wide(feed(1, 5))


def test_logits_are_the_callers(log):
    ours, _ = steps()
    cache = ours.new_cache(2, 64)
    with torch.no_grad():
        kept = [ours(cache, feed(1)) for _ in range(4)]
        copies = [k.clone() for k in kept]
        ours(cache, feed(1))
    assert all(torch.equal(k, c) for k, c in zip(kept, copies, strict=True))


def test_a_failed_capture_warns_and_the_steps_go_on(log, monkeypatch):
    def fail(self, function):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(FakeGraphs, "capture", fail)
    both = Both(*steps())
    both(feed(1))
    with pytest.warns(RuntimeWarning, match="0 steps replayed, then none.*not permitted"):
        both(feed(1))
    log.clear()
    for _ in range(2):
        both(feed(1))
    assert log == [] and "not permitted" in both.steps[0].report


def test_rows_of_several_adapters(log):
    both = Both(*steps(lora=True, adapter_names=["default", "__base__"]))
    for _ in range(4):
        both(feed(1))
    assert both.steps[0].replayed == 3


@pytest.mark.parametrize("speculation", [None, "prompt_lookup", "model"])
@pytest.mark.parametrize("rows", [1, 3])
def test_generate_gives_the_same_tokens(rows, speculation, monkeypatch):
    model = causal_lm("llama")
    draft = causal_lm("llama", seed=0) if speculation == "model" else speculation
    ids = torch.randint(3, 97, (rows, 5)).repeat(1, 2)
    settings = {"max_new_tokens": 20, "speculation": draft}
    wanted = generate.generate(model, ids, **settings)
    assert wanted.stats.cuda_graphs is None

    def on_cuda(model, adapter_names=None):
        return GraphStep(model, adapter_names, FakeGraphs)

    monkeypatch.setattr(generate, "fused_step", on_cuda)
    got = generate.generate(model, ids, **settings)
    assert torch.equal(got.sequences, wanted.sequences)
    assert got.stats.cuda_graphs.endswith("steps replayed")
    if speculation is None:
        # One pass is the prompt's, and one a warm-up for every number of unfinished rows.
        assert int(got.stats.cuda_graphs.split()[0]) >= 19 - rows


def test_the_kind_of_step_follows_the_device():
    assert type(cuda_graph.fused_step(causal_lm("llama"))) is FusedStep


@pytest.mark.parametrize("kind", ["separate", "gpt2"])
@pytest.mark.parametrize("adapter_of", [None, [1, -1, 0]])
def test_the_reference_can_be_captured(kind, adapter_of):
    """What serves CUDA, in float64: replayed on other tokens of the same shape, it is right."""
    layer = layers.wide(layers.make_layer(kind, ranks=(4, 3)[: 1 if adapter_of is None else 2]))
    rotary = not layer.center
    first = layers.place([2, 0, 2], [3, 5, 0], adapter_of, rotary)
    other = layers.place([0, 2, 2], [1, 20, 7], adapter_of, rotary)
    x, y = torch.randn(2, 4, layers.HIDDEN).double()
    keys, values = torch.randn(2, 3, layers.KV_HEADS, layers.CAPACITY, layers.DIM).double()

    def run(x, tokens, keys, values):
        return decoder_layer(x, layer, keys, values, tokens)

    own = keys.clone(), values.clone()
    static = Tokens(*(t.clone() if isinstance(t, torch.Tensor) else t
                      for t in vars(first).values()))  # fmt: skip
    buffer, cache = x.clone(), (keys.clone(), values.clone())
    with Tape() as tape:
        got = run(buffer, static, *cache)
    assert len(tape.calls) > 10
    torch.testing.assert_close(got, run(x, first, *own), rtol=1e-12, atol=1e-12)
    for name in ("cu_seqlens", "lengths", "cos", "sin"):
        if getattr(static, name) is not None:
            getattr(static, name).copy_(getattr(other, name))
    buffer.copy_(y)
    tape.replay()
    torch.testing.assert_close(got, run(y, other, *own), rtol=1e-12, atol=1e-12)
    for a, b in zip(cache, own, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
