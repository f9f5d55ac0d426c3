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
from PIL import Image

from mlx_snapgen.cli.generate_options import Saving, build_parser
from mlx_snapgen.cli.interactive import (
    OPTIONS,
    REFUSED,
    SETTINGS,
    Session,
    as_settings,
    as_typed,
)
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
        ":model-width tiny",
        ":steps 2",
        ":size 32x64",
        ":negative a blue car",
        "a blue cat",
        ":seed",
        ":size",
        ":model-width",
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
        ":guidance -1": "-1 is below 0",
        ":width huge": "a whole number expected, not 'huge'",
        ":model-width huge": "'huge' is not full, small or tiny",
        ":model-width 64": "the picture's width in pixels is :width",
        ":force-size yes": "error: :force-size takes on or off, not 'yes'",
        ":low_memory on": "no setting ':low_memory' (did you mean 'low-memory'?)",
        ":json": ":json cannot change here: type :quit, and start the command with --json",
        ":prompts-file a.txt": ":prompts-file cannot change here",
        ":revision main": "only a Hugging Face repository has revisions",
        ":base someone/x": ":base takes a model that is one .safetensors file",
        ":text-encoders t5": "t5",
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
    _, err = say(":size 16384x16384", "a blue cat", options=["--seed", "1"])
    assert err == (
        "error: 16384 x 16384 is more than the 134217728 pixels that a picture can have: choose a "
        "smaller size\n"
    )
    assert Path("a-blue-cat.png").exists()


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
    lines = [line.split() for line in out.splitlines()]
    for name in SETTINGS:
        assert sum(words[0] == f":{name}" for words in lines) == 2
    assert [":seed", "5"] in lines and [":size", "default"] in lines
    assert [":force-size", "off"] in lines and [":metadata", "on"] in lines


def test_every_option_is_a_setting_or_refused():
    options = {
        name.removeprefix("--")
        for action in build_parser()._actions
        for name in action.option_strings
        if name.startswith("--") and not name.startswith("--no-")
    }
    assert options == {*OPTIONS, *REFUSED, "vocabulary", "help"}


def test_sizes_and_switches(say):
    out, err = say(
        ":width 96",
        ":height 32",
        ":metadata off",
        ":stepwise-dir steps",
        "a red apple",
        ":width",
        ":num-images 2",
        ":metadata",
        ":stepwise-dir",
        ":attention-modulation on",
        ":keep-text-encoders on",
        ":force-size on",
        "a blue cat",
        options=["--seed", "3"],
    )
    assert err == ""
    assert [line.split()[0] for line in out.splitlines()[:3]] == [
        *("a-red-apple.png", "a-blue-cat.png", "a-blue-cat-1.png")
    ]
    with pytest.raises(UserError, match="carries no settings"):
        settings_of("a-red-apple")
    assert Image.open("a-red-apple.png").size == (96, 32)
    assert os.listdir("steps") == ["a-red-apple-seed-3-step-01.png"]
    values = settings_of("a-blue-cat")
    assert (values["width"], values["height"]) == (64, 32)
    assert values["attention_modulation"] and values["force_size"]


def test_what_the_model_cannot_do_is_refused_at_once(say):
    out, err = say(
        ":few-step on",
        ":size 100x64",
        "a red apple",
        ":mask last",
        ":edit last",
        ":show",
        options=["--seed", "3"],
    )
    faults = (
        "no few-step mode",
        "width must be",
        "a mask needs",
        "cannot edit",
    )
    for line, fault in zip(err.splitlines(), faults, strict=True):
        assert fault in line
    shown = dict(line.split(maxsplit=1) for line in out.splitlines()[1:])
    names = ":few-step", ":size", ":mask", ":edit"
    assert {shown[name] for name in names} == {"default"} and shown[":steps"] == "1"


def test_settings_are_shown_as_they_are_typed():
    settings = DrawSettings(edit=("a b.png", "c.png"), image="a b.png", guidance_scale=2.5)
    choice = ModelChoice(loras=(("a.safetensors", 0.5), ("b.safetensors", 1.0)), quantize=0)
    values = vars(settings) | vars(choice) | {"text_encoders": ("clip", "gemma"), "json": False}
    expected = {
        "edit": "'a b.png' c.png",
        "image": "'a b.png'",
        "guidance_scale": 2.5,
        "loras": "a.safetensors 0.5 b.safetensors 1",
        "quantize": "none",
        "text_encoders": "clip,gemma",
        "low_memory": "off",
        "few_step": "default",
    }
    assert {name: as_typed(name, values[name]) for name in expected} == expected


def test_the_old_name_of_the_network_width(say):
    _, err = say(":width tiny", "a red apple", options=["--seed", "1"])
    assert err == "warning: :width tiny is now :model-width tiny\n"
    assert settings_of("a-red-apple")["model_width"] == "tiny"


def test_messages_name_settings(say):
    _, err = say("a zebra", ":vocabulary", options=["--seed", "1"])
    assert "; :vocabulary lists all words" in err
    for text, expected in {
        "--force-size draws any size": ":force-size on draws any size",
        "choose --model-width tiny or --quantize 4": "choose :model-width tiny or :quantize 4",
        "convert it with convert.from_torch --quantize": None,
        "give --something, or a--fit; see --help": "give --something, or a--fit; see :help",
        "--image FILE STRENGTH": ":image FILE STRENGTH",
    }.items():
        assert as_settings(text) == (expected or text)


def test_several_loras():
    session = Session(
        DrawSettings(), ModelChoice(), saving=Saving(), load=lambda choice, _: choice,
        draw=lambda pipeline, settings, *, saving: choices.append(pipeline),
    )  # fmt: skip
    choices = []
    for line in (":lora a.safetensors 0.5 b.safetensors c.safetensors -1", "a cat"):
        session.take(line)
    assert choices[0].loras == (("a.safetensors", 0.5), ("b.safetensors", 1), ("c.safetensors", -1))


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
        saving=Saving(),
        load=lambda choice, settings: loads.append(choice) or Pipeline(),
        draw=lambda pipeline, settings, saving: drawn.append((settings, saving.output)),
    )
    for line in ("a cat", "", ":seed 3", ":output x.png", "a dog"):
        session.take(line)
    assert loads == [ModelChoice("here")]
    assert drawn == [
        (DrawSettings("a cat", seed=1), None),
        (DrawSettings("a dog", seed=3), "x.png"),
    ]
    session.take(":model-width small")
    assert loads[1:] == [ModelChoice("here", model_width="small")]
    assert session.complete(":s", "") == [
        *(":seed", ":steps", ":strength", ":stepwise-dir", ":size", ":show")
    ]
    assert session.complete("t", ":model-width ") == ["tiny"]
    assert session.complete("o", ":low-memory ") == ["on", "off"]
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
        os.write(ours, b":model-w\tti\t\n")  # completes to ":model-width tiny"
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
    assert ":model-width tiny" in remembered
    assert "a red apple" in remembered
