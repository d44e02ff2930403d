"""verify: original and patched computation side by side, on the user's own batch."""

from dataclasses import dataclass


@dataclass
class Verification:
    pass


def verify(model, batch):
    pass
