"""Every loader on damaged files: it reads them, or refuses them in one short line.

    SNAPGEN_FUZZ=10000 python -m pytest tests/fuzz          # this many inputs, instead of 500
    SNAPGEN_FUZZ=731:732 python -m pytest tests/fuzz        # input 731 alone, from a failure

The inputs depend only on their number.
"""

import os
import random
import resource
import shutil
import sys
import time
import traceback
import warnings

import pytest

from mlx_snapgen.errors import MOST_CHARACTERS, UserError
from tests.fuzz.damage import damaged
from tests.fuzz.loaders import LOADERS

COUNT = 500
SECONDS = 5
"""Of computing; an input that waits for something has ten times as long."""
MEGABYTES = 500


def numbers() -> range:
    start, _, end = os.environ.get("SNAPGEN_FUZZ", str(COUNT)).rpartition(":")
    return range(int(start or 0), int(end))


def peak() -> float:
    """Largest memory of this process so far, in MB."""
    unit = 1024 if sys.platform == "linux" else 1
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def fault(name: str, folder) -> str | None:
    """What is wrong with how a loader takes the folder; None: nothing."""
    before, started, waiting = peak(), time.process_time(), time.perf_counter()
    try:
        LOADERS[name].read(folder)
    except UserError as error:
        message = str(error)
        if len(message) > MOST_CHARACTERS or not message.isprintable():
            return f"a message of {len(message)} characters: {message!r}"
    except Exception:
        return traceback.format_exc(limit=-3)
    seconds, waited = time.process_time() - started, time.perf_counter() - waiting
    if seconds > SECONDS or waited > 10 * SECONDS:
        return f"took {seconds:.1f} s of computing, {waited:.1f} s in all"
    if (grown := peak() - before) > MEGABYTES:
        return f"took {grown:.0f} MB"
    return None


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """Name of a loader -> the folder of its good sample."""
    folder = tmp_path_factory.mktemp("good")
    found = {}
    for name, loader in LOADERS.items():
        (folder / name).mkdir()
        try:
            loader.write(folder / name)
        except pytest.skip.Exception:
            continue
        found[name] = folder / name
    return found


def files(name: str, folder) -> list:
    paths = {p for pattern in LOADERS[name].files for p in folder.glob(pattern) if p.is_file()}
    return sorted(paths)


def test_good_samples_are_read(samples, tmp_path):
    for name, sample in samples.items():
        assert files(name, sample)
        copy = shutil.copytree(sample, tmp_path / name)
        try:
            LOADERS[name].read(copy)
        except UserError as error:
            # The folder of pickles has one that could run code.
            assert name == "pickle" and "holds more than weights" in str(error)


@pytest.mark.timeout(24 * 3600 if "SNAPGEN_FUZZ" in os.environ else 300)
def test_damaged_inputs_end_in_one_line(samples, tmp_path):
    faults, names = [], list(samples)
    for number in numbers():
        rng = random.Random(number)
        name = names[number % len(names)]
        folder = shutil.copytree(samples[name], tmp_path / "input")
        for path in rng.sample(files(name, folder), 1):
            path.write_bytes(damaged(path.read_bytes(), path.name, rng))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = fault(name, folder)
        if found is not None:
            faults.append(f"input {number}, {name}, {path.name}: {found}")
        shutil.rmtree(folder)
    assert not faults, f"{len(faults)} faults\n" + "\n".join(faults[:40])
