"""The streams of random numbers of a training run."""

from enum import IntEnum

import numpy as np


class Stream(IntEnum):
    """What random numbers are drawn for: each purpose has a stream of its own.

    The values are part of every run: with others, a resumed run sees other data.
    """

    CROPS = 1
    DROPPED_CAPTIONS = 2
    SUB_NETWORKS = 3
    SIMULATION = 4
    CRITIC_WIDTHS = 5
    STEP_WIDTHS = 6
    PICTURE_FOLDER = 7
    TRAJECTORIES = 8

    def generator(self, seed: int, number: int) -> np.random.Generator:
        """The random numbers of batch or step `number` in a run with this seed."""
        return np.random.default_rng((seed, number, int(self)))
