"""The settings that methods.apply reads, small ones."""

from types import SimpleNamespace


def settings(method, **own):
    small = {
        "method": method, "rank": 4, "lora_alpha": 8.0, "lora_dropout": 0.0, "top_layers": 1,
        "target_modules": None, "virtual_tokens": 3, "bottleneck": 8,
    }  # fmt: skip
    return SimpleNamespace(**small | own)
