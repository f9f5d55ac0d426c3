"""Every loader on damaged files: it reads them, or refuses them in one short line.

    SNAPGEN_FUZZ=10000 python -m pytest tests/fuzz          # this many inputs, instead of 500
    SNAPGEN_FUZZ=731:732 python -m pytest tests/fuzz        # input 731 alone, from a failure

The inputs depend only on their number, which also gives the loader.
"""

import os
import random
import re
import resource
import shutil
import sys
import time
import traceback
import warnings

import numpy as np
import pytest

from mlx_snapgen.errors import MOST_CHARACTERS, UserError
from tests.fuzz import loaders
from tests.fuzz.damage import damaged
from tests.fuzz.loaders import LOADERS, PROGRESS, Loader, TooLong, report_progress

COUNT = 500
SECONDS = 5
"""Of computing between two reports of progress; for an input that waits for something, ten times
as long."""
MEGABYTES = 500


def numbers(name: str) -> list[int]:
    """The inputs of a loader."""
    start, _, end = os.environ.get("SNAPGEN_FUZZ", str(COUNT)).rpartition(":")
    ours = list(LOADERS).index(name)
    return [n for n in range(int(start or 0), int(end)) if n % len(LOADERS) == ours]


def peak() -> float:
    """Largest memory of this process so far, in MB."""
    unit = 1024 if sys.platform == "linux" else 1
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def fault(name: str, folder) -> str | None:
    """What is wrong with how a loader takes the folder; None: nothing."""
    before = peak()
    PROGRESS.clear()
    report_progress()
    try:
        LOADERS[name].read(folder)
    except UserError as error:
        message = str(error)
        if len(message) > MOST_CHARACTERS or not message.isprintable():
            return f"a message of {len(message)} characters: {message!r}"
    except TooLong as error:
        return str(error)
    except Exception:
        return traceback.format_exc(limit=-3)
    PROGRESS.append((time.process_time(), time.perf_counter()))
    seconds, waited = np.diff(PROGRESS, axis=0).max(axis=0)
    if seconds > SECONDS or waited > 10 * SECONDS:
        return f"took {seconds:.1f} s of computing, {waited:.1f} s in all"
    if (grown := peak() - before) > MEGABYTES:
        return f"took {grown:.0f} MB"
    return None


@pytest.fixture(scope="module", params=LOADERS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def sample(name, tmp_path_factory):
    """The folder of a loader's good sample."""
    folder = tmp_path_factory.mktemp("good")
    LOADERS[name].write(folder)
    return folder


def files(name: str, folder) -> list:
    paths = {p for pattern in LOADERS[name].files for p in folder.glob(pattern) if p.is_file()}
    return sorted(paths)


@pytest.fixture(autouse=True)
def no_progress():
    PROGRESS.clear()


def test_a_good_sample_is_read(name, sample, tmp_path):
    assert files(name, sample)
    copy = shutil.copytree(sample, tmp_path / "copy")
    try:
        LOADERS[name].read(copy)
    except UserError as error:
        # The folder of pickles has one that could run code.
        assert name == "pickle" and "holds more than weights" in str(error)


def put_folder(path):
    (path / "inside").mkdir(parents=True)


STREAMS = "settings in a PNG", "server", "form of the server", "prompt loop"
"""Loaders that get the contents of their files, not the files."""


@pytest.mark.timeout(60)
@pytest.mark.parametrize("put", [os.mkfifo, put_folder, lambda path: path.symlink_to("/dev/zero")])
def test_what_is_no_file_ends_in_one_line(name, sample, tmp_path, put):
    faults = []
    for i, path in enumerate([] if name in STREAMS else files(name, sample)[:8]):
        folder = shutil.copytree(sample, tmp_path / str(i))
        other = folder / path.relative_to(sample)
        other.unlink()
        put(other)
        if found := fault(name, folder):
            faults.append(f"{other.name}: {found}")
    assert not faults, "\n".join(faults)


def test_a_loop_that_reports_progress_for_ever_ends(monkeypatch):
    def read(folder):
        while True:
            report_progress()

    monkeypatch.setattr(loaders, "MOST_SECONDS", 0.1)
    monkeypatch.setitem(LOADERS, "for ever", Loader(lambda folder: None, read))
    assert re.fullmatch(r"took \d+ s of computing, with progress", fault("for ever", None))


@pytest.mark.timeout(24 * 3600 if "SNAPGEN_FUZZ" in os.environ else 300)
def test_damaged_inputs_end_in_one_line(name, sample, tmp_path):
    faults = []
    for number in numbers(name):
        rng = random.Random(number)
        folder = shutil.copytree(sample, tmp_path / "input")
        for path in rng.sample(files(name, folder), 1):
            path.write_bytes(damaged(path.read_bytes(), path.name, rng))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = fault(name, folder)
        if found is not None:
            faults.append(f"input {number}, {name}, {path.name}: {found}")
        shutil.rmtree(folder)
    assert not faults, f"{len(faults)} faults\n" + "\n".join(faults[:40])
