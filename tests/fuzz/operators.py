"""Random calls of every operator, judged against eager PyTorch in float64 by the relative rule.

    python tests/fuzz/operators.py --calls 100000 --seed 0 [--only attention] [--first 1234]

A call depends on the seed and its number alone: what fails names both. Some calls are as they
should not be (shapes, dtypes, devices of nothing): those are refused by a ValueError or TypeError,
and never crash. `make fuzz` runs it under the address and undefined-behaviour sanitizers.
"""

import argparse
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from fuzz.calls import TRAINING
from fuzz.decoding_calls import DECODING
from fuzz.draw import Call, Draw
from truth import assert_as_exact

from fastft.library import extension

OPERATORS = {f.__name__: f for f in (*TRAINING, *DECODING)}
ISAS = ("baseline", "avx2", "avx512", "avx512vnni")
REFUSALS = (ValueError, TypeError)
# PyTorch's own function with its errors, and one that lies behind what checks.
PLAIN = {"linear": (RuntimeError,), "decoder_layer": (RuntimeError,)}


@contextmanager
def kernels_at_any_size() -> Iterator[None]:
    """Small inputs, as most here are, would go to PyTorch's own operators."""
    with (
        mock.patch("fastft.ops.norm._EAGER_BELOW", 0),
        mock.patch("fastft.ops.gated_mlp._EAGER_SIZES", {}),
        mock.patch("fastft.ops.linear._wins", lambda x, w, b: _fits(x, w, b)),
    ):
        yield
    if extension is not None:
        extension.limit_isa(ISAS[-1])


def _fits(x, weight, bias) -> bool:
    return (
        weight.dim() == 2
        and x.shape[-1:] == weight.shape[1:]
        and x.dtype == weight.dtype
        and (bias is None or bias.dtype == x.dtype and bias.shape == weight.shape[:1])
    )


def one(name: str, number: int, seed: int, again: int = 0) -> str:
    """Makes a call and judges it; gives what kind it was. Raises: AssertionError.

    again: another one of the same sizes and options, with other numbers in its tensors.
    """
    draw = Draw(f"{seed} {name} {number}")
    torch.manual_seed(draw.getrandbits(60) + again)
    if extension is not None:
        extension.limit_isa(draw.choice(ISAS))
    call, kind = OPERATORS[name](draw), draw.random()
    if kind < 0.25:
        return _spoiled(name, call, draw)
    if kind < 0.32:
        return _special(name, call, draw)
    if kind < 0.45:
        call = _aliased(name, call, draw)
    assert_as_exact(call.ours, call.eager, call.args)
    return "exact"


def _tensors(call: Call) -> list[int]:
    return [i for i, a in enumerate(call.args) if isinstance(a, torch.Tensor)]


def _aliased(name: str, call: Call, draw: Draw) -> Call:
    """Two arguments in one memory, or one whose places lie on each other."""
    # Of a head whose rows are one, and of queries whose keys or values are, the exact gradient is
    # 0; of queries that are their own keys, nearly.
    place = {"head": 0, "attention": 2}.get(name, draw.choice(_tensors(call)))
    held = call.args[place]
    twins = [i for i in _tensors(call) if i != place and call.args[i].shape == held.shape
             and call.args[i].dtype == held.dtype and (name, i) != ("attention", 0)]  # fmt: skip
    # Not the last one: of a row of equal numbers layer_norm's exact result is 0.
    wide = [d for d in range(held.dim() - 1) if held.shape[d] > 1]
    args = list(call.args)
    if twins:
        twin = draw.choice(twins)
        args[twin] = None

        def joined(function):
            return lambda *args: function(*[args[place] if i == twin else a
                                            for i, a in enumerate(args)])  # fmt: skip

    elif wide and name != "attention":
        dim, shape = draw.choice(wide), held.shape
        args[place] = held.detach().narrow(dim, 0, 1).clone().requires_grad_(held.requires_grad)

        def joined(function):
            return lambda *args: function(*[a.expand(shape) if i == place else a
                                            for i, a in enumerate(args)])  # fmt: skip

    else:
        return call
    return Call(joined(call.ours), joined(call.eager), args)


def _special(name: str, call: Call, draw: Draw) -> str:
    """NaN, infinity and numbers at the ends: no crash, forward and backward."""
    args = [
        a.detach().clone(memory_format=torch.contiguous_format)
        if isinstance(a, torch.Tensor)
        else a
        for a in call.args
    ]
    floats = [i for i in _tensors(call) if args[i].is_floating_point() and args[i].numel()]
    if not floats:
        return "special"
    place = draw.choice(floats)
    value = draw.choice([torch.nan, torch.inf, -torch.inf, 1e38, 6e4, 1e-41, 0.0])
    flat = args[place].view(-1)
    for _ in range(draw.choice([1, 3])):
        flat[draw.randrange(flat.numel())] = value
    for i in floats:
        args[i].requires_grad_(call.args[i].requires_grad)
    try:
        got, wanted = (_first(f(*args)) for f in (call.ours, call.eager))
    except ValueError:
        if name != "quantize":
            raise
        return "refused"
    assert got.shape == wanted.shape
    if value != value:  # a NaN is not lost, and touches nothing else
        # But which of the values that a mask multiplies by 0 are read is left open.
        same = torch.equal(got.isnan(), wanted.isnan()) or name in (
            "attention",
            "decode",
            "decoder_layer",
        )
        assert same, f"NaN in {int(got.isnan().sum())} places"
    if got.requires_grad:
        got.float().sum().backward()
    return "special"


def _first(out) -> torch.Tensor:
    return out[0] if isinstance(out, tuple) else out


def _spoiled(name: str, call: Call, draw: Draw) -> str:
    """An argument that is not as it should be: refused, or no different from eager's answer."""
    args, place = list(call.args), draw.choice(_tensors(call))
    held = args[place].detach()
    ways = [
        lambda t: t.to(draw.choice([torch.int64, torch.bool, torch.complex64, torch.float64])),
        lambda t: t.to(draw.choice([torch.float32, torch.bfloat16, torch.float16])),
        lambda t: t[None],
        lambda t: t.flatten(),
        lambda t: t.new_empty(()),
        lambda t: torch.cat([t, t[..., :1]], -1) if t.dim() and t.shape[-1] else t[None],
        lambda t: t[..., :-1] if t.dim() else t[None],
        lambda t: t[:-1] if t.dim() else t[None],
        lambda t: torch.cat([t, t[:1]]) if t.dim() else t[None],
        lambda t: t.transpose(0, -1) if t.dim() else t[None],
        lambda t: t[:0] if t.dim() else t[None],
    ]
    args[place] = draw.choice(ways)(held)
    try:
        out = _first(call.ours(*args))
        if out.requires_grad:
            out.float().sum().backward()
    except (*REFUSALS, *PLAIN.get(name, ())) as error:
        assert len(str(error)) > 10, repr(error)
        return "refused"
    try:
        wanted = _first(call.eager(*args)).detach().double()
    except Exception:  # what eager does not take has no answer
        return "taken"
    got = out.detach().double()
    assert got.shape == wanted.shape, f"{tuple(got.shape)}, eager gives {tuple(wanted.shape)}"
    if bool(wanted.isfinite().all()):
        gap = (got - wanted).norm()
        assert gap <= 0.02 * wanted.norm(), f"{gap:.3g} from eager's {wanted.norm():.3g}"
    return "taken"


def _repeated(name: str, number: int, seed: int) -> str:
    """What is wrong is wrong again. Luck is not: a call has few numbers, a sum may be nearly 0."""
    for again in range(6):
        try:
            return one(name, number, seed, again)
        except AssertionError as error:
            failed = error
    raise failed


def run(calls: int, seed: int, only: list[str], first: int = 0, stop: int = 20) -> dict[str, str]:
    """Calls spread over the operators: where it failed, "operator number" -> what was wrong."""
    failures, kinds, last = {}, Counter(), time.monotonic()
    with kernels_at_any_size():
        for number in range(first, first + calls):
            name = only[number % len(only)]
            try:
                kinds[name, _repeated(name, number, seed)] += 1
            except Exception:
                failures[f"{name} {number}"] = traceback.format_exc()
                print(f"{name} {number} failed", flush=True)
                if len(failures) == stop:
                    break
            if time.monotonic() - last > 30:
                last = time.monotonic()
                print(f"{number - first + 1:,} calls, {len(failures)} failed", flush=True)
    run.kinds = kinds
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=list(OPERATORS), default=list(OPERATORS))
    parser.add_argument("--first", type=int, default=0, help="number of the first call")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    failures = run(asked.calls, asked.seed, asked.only, asked.first)
    for place, what in failures.items():
        print(f"--only {place.replace(' ', ' --first ')} --calls 1 --seed {asked.seed}\n{what}")
    made = run.kinds.total() + len(failures)  # fewer than asked for where too many failed
    print(f"{made:,} of {asked.calls:,} calls, {len(failures)} failed")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
