"""What models call the key-value cache they take and give.

transformers renamed it in 5.24; models that come with their own code keep the name they have.
"""

from collections.abc import Collection, Mapping
from functools import cache
from typing import Any

NAMES = ("cache", "past_key_values")


def cache_name(names: Collection[str]) -> str | None:
    """The one that is among names: the parameters of a forward, or the fields of an output."""
    return next((name for name in NAMES if name in names), None)


def cache_in(arguments: Mapping[str, Any]) -> Any:
    """The cache that a call was given, by either name."""
    return next((arguments[n] for n in NAMES if arguments.get(n) is not None), None)


def renamed(arguments: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The arguments of a call with the cache, where it has one, by this name."""
    if all(arguments.get(given) is not None for given in NAMES):
        raise TypeError(f"cache: expected under one name, got it as {' and as '.join(NAMES)}")
    held = cache_in(arguments)
    rest = {given: value for given, value in arguments.items() if given not in NAMES}
    return rest if held is None else rest | {name: held}


@cache
def own_name() -> str:
    """The name in the installed transformers, of whose outputs this is the plainest."""
    from transformers.modeling_outputs import BaseModelOutputWithPast

    name = cache_name(BaseModelOutputWithPast.__dataclass_fields__)
    assert name is not None  # one of NAMES it must be
    return name
