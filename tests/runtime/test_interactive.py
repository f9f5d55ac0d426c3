"""The prompt loop: settings by colon lines, mistakes that do not end it, completion, a terminal."""

import contextlib
import io
import os
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlx_snapgen.cli.interactive import SETTINGS, Session
from mlx_snapgen.errors import UserError
from mlx_snapgen.generate import main
from mlx_snapgen.metadata import read_metadata
from mlx_snapgen.settings import DrawSettings, ModelChoice

ROOT = Path(__file__).parents[2]


@pytest.fixture
def say(model_folder, tmp_path, monkeypatch, capsys):
    """Runs the loop over lines; (stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mlx_snapgen.cli.notices.PATIENCE", 60)

    def say(*lines, options=()):
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
        assert main(["--interactive", "--model", str(model_folder), "--steps", "1", *options]) == 0
        return capsys.readouterr()

    return say


def settings_of(name):
    return read_metadata(f"{name}.png")


def test_prompts_are_drawn_with_the_settings_so_far(say):
    out, err = say(
        "a red apple",
        ":seed 7",
        ":width tiny",
        ":steps 2",
        ":size 32x64",
        ":negative a blue car",
        "a blue cat",
        ":seed",
        ":size",
        ":width",
        "a green car",
        ":quit",
        "never drawn",
        options=["--seed", "3"],
    )
    assert err == ""
    assert [line.split()[0] for line in out.splitlines()[:3]] == [
        "a-red-apple.png",
        "a-blue-cat.png",
        "a-green-car.png",
    ]
    names = ("seed", "model_width", "num_inference_steps", "width", "height", "negative_prompt")
    first, second, third = (
        tuple(settings_of(name)[key] for key in names)
        for name in ("a-red-apple", "a-blue-cat", "a-green-car")
    )
    assert first == (3, "full", 1, 64, 32, "")
    assert second == (7, "tiny", 2, 32, 64, "a blue car")
    assert third[1:] == ("full", 2, 64, 32, "a blue car")
    assert not Path("never-drawn.png").exists()


def test_mistakes_are_one_line_and_the_loop_goes_on(say):
    wrong = {
        ":sede 7": "no setting ':sede' (did you mean 'seed'?); see :help",
        ":seed many": "a whole number expected, not 'many'",
        ":size " + "9" * 5000 + "x1": "the size must be like 192x128",
        ":size big": "the size must be like 192x128 (width x height), not 'big'",
        ":width huge": "'huge' is not full, small or tiny",
        ":model /no/such/folder": "no model folder /no/such/folder",
        ":lora missing.safetensors 0.5": "missing.safetensors",
        ":output picture.jpg": "neither a name ending in .png nor a folder",
    }
    out, err = say(*wrong, "a red apple", options=["--seed", "1"])
    lines = err.splitlines()
    assert len(lines) == len(wrong)
    for line, words in zip(lines, wrong.values(), strict=True):
        assert line.startswith("error: ")
        assert words in line
    assert "a-red-apple.png" in out
    assert settings_of("a-red-apple")["seed"] == 1


def test_a_size_that_the_machine_cannot_hold_does_not_end_the_loop(say):
    _, err = say(":size 16384x16384", "a red apple", ":size", "a blue cat", options=["--seed", "1"])
    assert err == (
        "error: 16384 x 16384 is more than the 134217728 pixels that a picture can have: choose a "
        "smaller size\n"
    )
    assert Path("a-blue-cat.png").exists() and not Path("a-red-apple.png").exists()


def test_odd_lines_do_not_end_the_loop(model_folder, tmp_path):
    """Bytes that are not UTF-8, a byte-order mark, long paths, a value with a dash, a home."""
    lines = [
        b"\xef\xbb\xbf:seed 7",
        b"a caf\xe9 apple",
        b":output " + b"a" * 300 + b".png",
        b":output \xff/",
        b":negative -5 cars",
        b":output ~/pictures/",
        b"a red apple",
    ]
    result = subprocess.run(
        [sys.executable, "-m", "mlx_snapgen.generate", "-i", "--model", str(model_folder),
         "--steps", "1", "--guidance", "2"],
        input=b"\n".join(lines), cwd=tmp_path, capture_output=True, check=False,
        env=os.environ | {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT),
                          "PYTHONIOENCODING": "utf-8:strict"},
    )  # fmt: skip
    lines = re.sub("a{9,}( ... a+.png)?", "aaa", result.stderr.decode()).splitlines()
    errors = [line for line in lines if line.startswith("error")]
    assert result.returncode == 0
    assert errors == [
        "error: the line has characters that are not valid UTF-8",
        "error: cannot use aaa: File name too long",
        "error: the line has characters that are not valid UTF-8",
    ]
    values = read_metadata(tmp_path / "pictures" / "a-red-apple.png")
    assert (values["seed"], values["negative_prompt"]) == (7, "-5 cars")
    assert set(os.listdir(tmp_path)) - {".cache"} == {"pictures"}


def test_help_and_show_name_every_setting(say):
    out, _ = say(":help", ":seed 5", ":show")
    for name in SETTINGS:
        assert out.count(f":{name} ") == 2
    assert ":seed       5" in out
    assert ":size       default" in out


def test_the_model_is_loaded_once_unless_it_changes():
    class Pipeline:
        def __init__(self):
            self.vocabulary = {
                "nouns": ["apple", "ice cream cone"],
                "other_words": {"apples": "apple", "apels": "apple"},
                "colours": ["amber"],
                "misspelled": ["apels"],
                "replaced": {"aapple": "apple"},
                "ignored": ["again"],
            }

    loads, drawn = [], []
    session = Session(
        DrawSettings(seed=1),
        ModelChoice("here"),
        output=None,
        load=lambda choice, settings: loads.append(choice) or Pipeline(),
        draw=lambda pipeline, settings, output: drawn.append((settings, output)),
    )
    for line in ("a cat", "", ":seed 3", ":output x.png", "a dog"):
        session.take(line)
    assert loads == [ModelChoice("here")]
    assert drawn == [
        (DrawSettings("a cat", seed=1), None),
        (DrawSettings("a dog", seed=3), "x.png"),
    ]
    session.take(":width small")
    assert loads[1:] == [ModelChoice("here", model_width="small")]
    assert session.complete(":s", "") == [":seed", ":steps", ":strength", ":size", ":show"]
    assert session.complete("t", ":width ") == ["tiny"]
    assert session.complete("a", "a red ") == ["amber", "apple", "apples"]
    assert session.complete("", "") == []


def test_wrong_together():
    with pytest.raises(UserError, match="cannot be combined with --prompts-file or --json"):
        main(["--interactive", "--json"])


def test_a_terminal_completes_remembers_and_survives_ctrl_c(model_folder, tmp_path):
    pty = pytest.importorskip("pty", reason="this system has no pseudo-terminals")
    pytest.importorskip("readline", reason="this Python has no readline")
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "mlx_snapgen.generate", "-i", "--model", str(model_folder)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "XDG_STATE_HOME": str(tmp_path), "TERM": "dumb"}
    process = subprocess.Popen(
        [*command, "--steps", "1", "--seed", "1"],
        cwd=tmp_path, env=env, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    seen = ""

    def until(words, seconds=120):
        nonlocal seen
        end = time.monotonic() + seconds
        while words not in seen:
            if time.monotonic() > end:
                raise TimeoutError(seen)
            if select.select([ours], [], [], 0.1)[0]:
                seen += os.read(ours, 4096).decode(errors="replace")
        seen = seen.partition(words)[2]

    try:
        until("> ")
        os.write(ours, b":wi\tti\t\n")  # completes to ":width tiny"
        until("> ")
        os.write(ours, b"a red app\t\n")
        until("a-red-apple.png")
        until("> ")
        for _ in range(10):
            # Python does not notice a signal between the prompt and its wait for a key.
            process.send_signal(2)
            with contextlib.suppress(TimeoutError):
                until("> ", seconds=5)
                break
        else:
            pytest.fail(f"no prompt after Ctrl-C: {seen}")
        os.write(ours, b"\x04")
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        os.close(ours)
    assert read_metadata(tmp_path / "a-red-apple.png")["model_width"] == "tiny"
    remembered = (tmp_path / "mlx_snapgen" / "prompts").read_text()
    assert ":width tiny" in remembered
    assert "a red apple" in remembered
