"""What a random call is made of: sizes from nothing up, tensors of any strides, every dtype."""

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch

DTYPES = (torch.float32, torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Call:
    """ours and eager compute the same of args."""

    ours: Callable
    eager: Callable
    args: list


class Draw(random.Random):
    """Random sizes, dtypes and tensors; torch's own generator fills them."""

    def size(self, most: int = 70, least: int = 0) -> int:
        """Often at the ends, and beside what vectors and blocks are long."""
        if self.random() < 0.3:
            return min(most, max(least, self.choice([0, 1, 2])))
        if self.random() < 0.4:
            return min(most, max(least, self.choice([8, 16, 32, 64]) + self.choice([-1, 0, 1])))
        return self.randint(least, most)

    def shape(self, least: int = 0) -> tuple[int, ...]:
        """Leading dimensions of rows of at least so many numbers."""
        leading = self.choice([(self.size(),), (), (self.size(9), self.size(9)), (2, 1, 3)])
        return (*leading, self.size(130, least))

    def tensor(self, *shape, dtype=torch.float32, std=1.0, grad=True):
        """Contiguous, or with its dimensions in another order, or a part of a larger one."""
        if shape and self.random() < 0.3:
            step = self.choice([1, 2, 3])
            wide = torch.randn(*shape[:-1], shape[-1] * step + self.choice([0, 1, 5])) * std
            held = wide.to(dtype)[..., : shape[-1] * step : step]
        elif len(shape) > 1 and self.random() < 0.3:
            order = self.sample(range(len(shape)), len(shape))
            held = (torch.randn([shape[i] for i in order]) * std).to(dtype)
            held = held.permute([order.index(i) for i in range(len(shape))])
        else:
            held = (torch.randn(shape) * std).to(dtype)
        return held.detach().requires_grad_(grad and self.random() < 0.8)

    def maybe(self, *shape, **more):
        return self.tensor(*shape, **more) if self.random() < 0.6 else None

    def options(self, **choices) -> dict:
        """Some of the options, each with one of its values."""
        return {n: self.choice(held) for n, held in choices.items() if self.random() < 0.4}
