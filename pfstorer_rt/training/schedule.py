"""How far a training is: by its iterations, or by the minutes that it may take."""

from __future__ import annotations

import math
import time

from pfstorer_rt.config import TrainConfig


class Schedule:
    """Says when a training ends and what its learning rate is on the way.

    With `config.minutes` the training ends after that time, all its runs together and their starts not counted, and the
    decay of the learning rate follows the time; else it ends after `config.iterations`.
    seconds: that earlier runs took.
    """

    def __init__(self, config: TrainConfig, seconds: float = 0.0) -> None:
        self.config, self.before, self.begun = config, seconds, time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds that this training took so far."""
        return self.before + time.monotonic() - self.begun

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
