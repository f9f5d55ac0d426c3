"""The streams of random numbers, which runs of earlier versions share."""

import numpy as np

from train.data.streams import Stream


def test_resumed_runs_see_the_random_numbers_of_before():
    before = {
        "CROPS": 1,
        "DROPPED_CAPTIONS": 2,
        "SUB_NETWORKS": 3,
        "SIMULATION": 4,
        "CRITIC_WIDTHS": 5,
        "STEP_WIDTHS": 6,
        "PICTURE_FOLDER": 7,
        "TRAJECTORIES": 8,
        "CAPTIONS": 21,
    }
    assert {name: int(Stream[name]) for name in before} == before
    assert len(Stream) == len(Stream.__members__)  # no two with one value
    for stream in Stream:
        found = stream.generator(3, 11).random(4)
        assert np.array_equal(found, np.random.default_rng((3, 11, int(stream))).random(4))
