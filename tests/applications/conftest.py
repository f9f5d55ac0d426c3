"""The window in a virtual screen."""

import os
import shutil
import subprocess
import sys

import pytest

from apps.desktop.settings import Settings, save_settings
from mlx_snapgen.settings import DrawSettings, ModelChoice
from tests.applications.windows import wait


@pytest.fixture(scope="session")
def screen():
    """An X server of our own, as the environment; Tk stays connected to it until the end."""
    pytest.importorskip("tkinter", reason="this Python has no tkinter")
    if sys.platform == "darwin":
        pytest.skip("a Mac has no virtual screen")
    if shutil.which("Xvfb") is None:
        pytest.skip("Xvfb is not installed (apt install xvfb)")
    reading, writing = os.pipe()
    server = subprocess.Popen(
        ["Xvfb", "-displayfd", str(writing), "-screen", "0", "1280x900x24", "-nolisten", "tcp"],
        pass_fds=[writing],
        stderr=subprocess.DEVNULL,
    )
    os.close(writing)
    with os.fdopen(reading) as pipe:
        number = pipe.readline().strip()
    if not number:
        pytest.skip("Xvfb does not start")
    yield {"DISPLAY": f":{number}"}
    server.terminate()
    server.wait()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def window(screen, model_folder, data):
    from apps.desktop.window import Window

    choice = ModelChoice(str(model_folder), model_width="tiny")
    start = Settings(draw=DrawSettings(), choice=choice, appearance="light")
    save_settings(data / "settings.json", start)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISPLAY", screen["DISPLAY"])
        window = Window(data)
        wait(window, lambda: window.run is None, "the model")
        # No window manager hands out the focus here.
        window.focus_force()
        yield window
        pid = window.worker.pid
        window.close()
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
