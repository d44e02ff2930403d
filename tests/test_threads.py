"""Two models at once, thousands of cycles, and processes forked at any time."""

import copy
import ctypes
import gc
import multiprocessing
import threading

import pytest
import torch
from finetune import tiny

import fastft
from fastft.ops.lora import LoraLinear, lora
from fastft.ops.norm import rms_norm

# Longer than it takes on a busy machine: what hangs does so for ever.
SECONDS = 120


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from transformers import AutoModelForCausalLM

    folder = tiny.save_model(tmp_path_factory.mktemp("model"))
    return AutoModelForCausalLM.from_pretrained(folder)


def batch(seed: int) -> torch.Tensor:
    return torch.randint(5, 60, (2, 9), generator=torch.Generator().manual_seed(seed))


def trained(model, seed: int, steps: int = 3) -> list[torch.Tensor]:
    """A patched model's tokens and weights after some steps."""
    ids, optimizer = batch(seed), torch.optim.AdamW(model.parameters(), 1e-2)
    tokens = []
    for _ in range(steps):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        tokens.append(fastft.generate(model, ids, max_new_tokens=6, do_sample=False).sequences)
    return [*tokens, *(p.detach().clone() for p in model.parameters())]


def test_two_threads_train_and_decode_two_models(model):
    models = [copy.deepcopy(model) for _ in range(4)]
    for one in models:
        fastft.patch(one)
    alone = [trained(one, seed) for seed, one in enumerate(models[:2])]
    together = [None, None]

    def work(seed: int) -> None:
        together[seed] = trained(models[2 + seed], seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got, wanted in zip(together, alone, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


@pytest.mark.parametrize("cycles", [50, pytest.param(2000, marks=pytest.mark.slow)])
def test_memory_is_flat_over_cycles(model, cycles):
    """Patch, train, generate, unpatch: what one cycle allocates, it gives back."""
    own = copy.deepcopy(model)

    def cycle(seed: int) -> None:
        fastft.patch(own)
        own(input_ids=batch(seed), labels=batch(seed)).loss.backward()
        own.zero_grad()
        fastft.generate(own, batch(seed), max_new_tokens=3)
        fastft.unpatch(own)

    for seed in range(30):
        cycle(seed)
    before = resident()
    for seed in range(cycles):
        cycle(seed)
    grown = (resident() - before) / 2**20
    assert grown < 4, f"{grown:.1f} MB more after {cycles} cycles"


class Heap(ctypes.Structure):
    """glibc's mallinfo2."""

    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
        "fordblks", "keepcost",
    )]  # fmt: skip


def allocated() -> int:
    """Bytes that C and C++ hold, of which each lost string is seen."""
    gc.collect()
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = Heap
    return libc.mallinfo2().uordblks


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="glibc tells")
def test_a_step_gives_back_what_it_allocates(model):
    own = copy.deepcopy(model)
    fastft.patch(own)

    def steps(count: int) -> None:
        for _ in range(count):
            own(input_ids=batch(0), labels=batch(0)).loss.backward()
            own.zero_grad()
            with torch.no_grad():
                own(input_ids=batch(0))

    steps(100)
    before = allocated()
    steps(200)
    assert allocated() - before < 200 * 32


def norms(threads: int = 1) -> torch.Tensor:
    """Operators with parallel regions where there is more than one thread."""
    torch.set_num_threads(threads)
    x = torch.arange(512 * 576, dtype=torch.float32).view(512, 576).sin()
    layer = LoraLinear(x[:64], None, x[:4], x[:64, :4])
    return lora(rms_norm(x, x[0]), layer)


class Rows(torch.utils.data.Dataset):
    """A data set that calls operators."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return norms(torch.get_num_threads())[index]


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    yield norms(2)  # a region has run, and its threads are there
    torch.set_num_threads(before)


def test_workers_of_a_loader_call_operators(two_threads):
    """They are forked, after a region, and run on one thread: PyTorch sets it."""
    loader = torch.utils.data.DataLoader(
        Rows(), num_workers=2, timeout=SECONDS, multiprocessing_context="fork"
    )
    got = torch.cat(list(loader))
    torch.testing.assert_close(got, two_threads[:4])


def _child(threads: int, answer) -> None:
    answer.put(norms(threads).sum().item())


def forked(threads: int) -> float | None:
    """What a forked process computes, or None where it hangs."""
    forks = multiprocessing.get_context("fork")
    answer = forks.SimpleQueue()
    child = forks.Process(target=_child, args=(threads, answer))
    child.start()
    child.join(SECONDS)
    if child.is_alive():
        child.kill()
        child.join()
        return None
    assert child.exitcode == 0
    return answer.get()


def test_a_forked_process_calls_operators_on_one_thread(two_threads):
    """GNU OpenMP's threads do not live on in a fork, so it may open no region of more."""
    assert forked(1) == pytest.approx(two_threads.sum().item(), rel=1e-4)
