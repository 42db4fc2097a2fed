"""Progress and learning rate of a training that ends after iterations or after minutes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from pfstorer_rt.config import TrainConfig


class Schedule:
    """End and learning rate of a training.

    With `config.minutes` the training ends after that time, without the start-up time of its runs, and the decay of the
    learning rate follows the time; otherwise it ends after `config.iterations`. seconds: duration of earlier runs.
    clock: returns the time in seconds.
    """

    def __init__(self, config: TrainConfig, seconds: float = 0.0, clock: Callable[[], float] = time.monotonic) -> None:
        self.config, self.before, self.clock, self.begun = config, seconds, clock, clock()

    @property
    def seconds(self) -> float:
        """Duration of this training so far, earlier runs included."""
        return self.before + self.clock() - self.begun

    def share(self, iteration: int) -> float:
        """Return the finished share of the training, 1 at its end."""
        if self.config.minutes:
            return min(1.0, self.seconds / (60 * self.config.minutes))
        return min(1.0, iteration / self.config.iterations)

    def factor(self, iteration: int) -> float:
        """Return the factor on every learning rate: linear warm-up, then constant, then a cosine to zero."""
        if iteration < self.config.warmup:
            return (iteration + 1) / self.config.warmup
        start = 1 - self.config.decay
        share = self.share(iteration)
        if self.config.decay and share > start:
            return 0.5 + 0.5 * math.cos(math.pi * (share - start) / self.config.decay)
        return 1.0
