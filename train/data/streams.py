"""The streams of random numbers of a training run."""

from enum import IntEnum

import numpy as np


class Stream(IntEnum):
    """The purposes of random numbers; each has a separate stream.

    Do not change the values: a resumed run would get other data.
    """

    CROPS = 1
    DROPPED_CAPTIONS = 2
    SUB_NETWORKS = 3
    SIMULATION = 4
    CRITIC_WIDTHS = 5
    STEP_WIDTHS = 6
    PICTURE_FOLDER = 7
    TRAJECTORIES = 8
    CAPTIONS = 21
    SIMULATED_SIZES = 31
    STICKER_SIZES = 41
    STRANGERS = 42
    OWN_THING = 43

    def generator(self, seed: int, number: int) -> np.random.Generator:
        """The random numbers of batch or step `number` in a run with this seed."""
        return np.random.default_rng((seed, number, int(self)))
