"""The command: files, metadata, repeatability, and one line for every mistake."""

import io
import json
import os
import re
import struct
import subprocess
import sys
import time
import types
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from mlx_snapgen import files
from mlx_snapgen.cli.generate_options import build_parser
from mlx_snapgen.cli.notices import announce
from mlx_snapgen.cli.options import Parser
from mlx_snapgen.errors import UserError, run_command
from mlx_snapgen.generate import main
from mlx_snapgen.metadata import read_metadata, read_settings, save_picture, slug
from mlx_snapgen.pipeline import SnapGenPipeline
from mlx_snapgen.settings import BUILT_IN, DrawSettings, ModelChoice, machine_memory
from tests.tiny import COMMIT, write_hub_cache

ROOT = Path(__file__).parents[2]
FAST = ("--steps", "1")


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch):
    """Every test draws into its own folder."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr("mlx_snapgen.cli.notices.PATIENCE", 60)
    return folder


@pytest.fixture
def run(model_folder):
    def run(*arguments):
        return main([*arguments, "--model", str(model_folder)])

    return run


def pixels(path):
    return np.array(Image.open(path))


def fails(capsys, *arguments):
    """The one line on stderr of a command that fails with exit code 2."""
    with pytest.raises(SystemExit) as exit_:
        run_command(lambda: main(list(arguments)))
    captured = capsys.readouterr()
    assert exit_.value.code == 2
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err


# --- pictures -----------------------------------------------------------------------------------


def test_the_command_draws_what_the_pipeline_draws(run, model_folder, capsys):
    assert run("a red apple", "--seed", "3", "--guidance", "2", "--negative-prompt", "blue") == 0
    pipe = SnapGenPipeline.from_pretrained(model_folder)
    [expected] = pipe("a red apple", seed=3, guidance_scale=2, negative_prompt="blue")
    assert np.array_equal(pixels("a-red-apple.png"), np.array(expected))
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("a-red-apple.png (seed 3, ")
    assert out[1].startswith("peak memory: ")


def test_files_are_numbered_and_never_overwritten(run):
    Path("a-red-apple.png").write_text("mine")
    run("a red apple", *FAST, "--num-images", "2", "--seed", "1")
    run("a red apple", *FAST, "--seed", "2")
    assert Path("a-red-apple.png").read_text() == "mine"
    numbered = [f"a-red-apple-{i}.png" for i in (1, 2, 3)]
    assert sorted(os.listdir()) == [*numbered, "a-red-apple.png"]
    assert np.array_equal(pixels("a-red-apple-2.png"), pixels("a-red-apple-3.png"))


@pytest.mark.parametrize(
    ("output", "expected"),
    [("b/c/x.png", "b/c/x.png"), ("new/", "new/a-red-apple.png"), (".", "a-red-apple.png")],
)
def test_outputs(run, output, expected):
    run("a red apple", *FAST, "--output", output)
    assert pixels(expected).shape == (32, 64, 3)


def test_width_in_pixels_and_width_of_the_network(run):
    run("a red apple", *FAST, "--width", "32", "--height", "64", "--model-width", "tiny")
    assert pixels("a-red-apple.png").shape == (64, 32, 3)
    assert read_metadata("a-red-apple.png")["model_width"] == "tiny"


def test_a_random_seed_is_printed_and_kept(run, capsys):
    run("a red apple", *FAST)
    seed = read_metadata("a-red-apple.png")["seed"]
    assert f"(seed {seed}," in capsys.readouterr().out
    run("a red apple", *FAST, "--seed", str(seed))
    assert np.array_equal(pixels("a-red-apple.png"), pixels("a-red-apple-1.png"))


def test_stepwise_pictures(run):
    run("a red apple", "--steps", "3", "--seed", "5", "--stepwise-dir", "steps/all")
    names = [f"a-red-apple-seed-5-step-{i:02d}.png" for i in (1, 2, 3)]
    assert sorted(os.listdir("steps/all")) == names
    final = pixels("a-red-apple.png")
    assert np.array_equal(pixels(f"steps/all/{names[2]}"), final)
    assert not np.array_equal(pixels(f"steps/all/{names[0]}"), final)


def test_json_lines_are_all_of_stdout(run, capsys):
    run("a red apple", *FAST, "--num-images", "2", "--seed", "8", "--json")
    results = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(r["path"], r["seed"]) for r in results] == [
        ("a-red-apple.png", 8),
        ("a-red-apple-1.png", 9),
    ]
    assert all(r["seconds"] > 0 and r["peak_mlx_bytes"] > 0 for r in results)
    assert results[0]["prompt"] == "a red apple"


def test_vocabulary(run, capsys):
    run("--vocabulary")
    assert "nouns (4): apple, car, cat, ice cream cone" in capsys.readouterr().out
    run("--vocabulary", "--json")
    assert json.loads(capsys.readouterr().out)["colours"] == ["red", "blue", "green"]


def test_notices_are_one_line_on_stderr(run, capsys):
    run("a red ice", *FAST)
    err = capsys.readouterr().err
    assert err.startswith("note: the prompt names nothing")
    assert err.count("\n") == 1


def test_only_slow_work_is_announced(monkeypatch, capsys):
    with announce("loading ..."):
        pass
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("mlx_snapgen.cli.notices.PATIENCE", 0.01)
    with announce("drawing ...", enabled=False):
        time.sleep(0.2)
    with announce("loading ..."):
        time.sleep(0.5)
    assert capsys.readouterr().err == "loading ...\n"


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("A red  apple!", "a-red-apple"),
        ("../../etc/passwd", "etc-passwd"),
        ("ein Käse", "ein-käse"),
        ("???", "snapgen"),
        ("two \N{DOG FACE}\N{DOG FACE}", "two-dog-face-dog-face"),
        ("蘋" * 100, "蘋" * 26),
        ("a " * 100, "-".join("a" * 40)),
    ],
)
def test_slugs(prompt, name):
    assert slug(prompt) == name


# --- prompts files ------------------------------------------------------------------------------


def test_prompts_file(run, model_folder, monkeypatch):
    monkeypatch.setattr("mlx_snapgen.cli.notices.PATIENCE", 0)
    Path("prompts.txt").write_text("\ufeff# two\na red apple\n\n  a blue cat  \n# end\n", "utf-8")
    loads, said = [], []
    load = SnapGenPipeline.from_pretrained
    monkeypatch.setattr("mlx_snapgen.cli.notices.write_line", said.append)
    monkeypatch.setattr(
        SnapGenPipeline, "from_pretrained", lambda *a, **k: loads.append(a) or load(*a, **k)
    )
    run("--prompts-file", "prompts.txt", *FAST, "--seed", "1", "--output", "out/")
    assert sorted(os.listdir("out")) == ["a-blue-cat.png", "a-red-apple.png"]
    assert len(loads) == 1
    assert "drawing 1/2 ..." in said


def test_prompts_are_read_as_they_come(run, monkeypatch):
    def lines():
        yield "a red apple\n"
        assert os.listdir() == ["a-red-apple.png"]
        yield "a blue cat\n"

    source = lines()
    stdin = types.SimpleNamespace(readline=lambda most: next(source, ""))
    monkeypatch.setattr(sys, "stdin", stdin)
    run("--prompts-file", "-", *FAST)
    assert sorted(os.listdir()) == ["a-blue-cat.png", "a-red-apple.png"]


def test_progress_over_all_prompts(run, monkeypatch, capsys):
    Path("prompts.txt").write_text("a red apple\n\na blue cat\na red cat\n")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    more = (*FAST, "--num-images", "2", "--batch-size", "4", "--output", "out/")

    def shown():
        return re.findall(r"([-0-9/]+)(?: seed [0-9]+)?: +0%", capsys.readouterr().err)

    run("--prompts-file", "prompts.txt", *more)
    assert shown() == ["1/6", "5/6"]
    # From a pipe, nobody knows how many follow.
    monkeypatch.setattr("sys.stdin", io.StringIO("a red apple\na blue cat\n"))
    run("--prompts-file", "-", *more)
    assert shown() == ["1", "3"]
    run("a red apple", *more)
    assert shown() == ["1/2"]


@pytest.mark.parametrize(
    ("content", "message"), [(b"# nothing\n", "has no prompts"), (b"\xff\xfe\n", "cannot read")]
)
def test_bad_prompts_files(capsys, monkeypatch, model_folder, content, message):
    monkeypatch.setattr("mlx_snapgen.pipeline.load_pretrained", None)
    Path("prompts.txt").write_bytes(content)
    arguments = ("--prompts-file", "prompts.txt", "--model", str(model_folder))
    assert message in fails(capsys, *arguments)


def test_sizes_that_the_machine_cannot_hold_are_refused_before_the_model_is_loaded(
    capsys, monkeypatch, model_folder, components
):
    monkeypatch.setattr("mlx_snapgen.pipeline.load_pretrained", None)
    for height, width in ((16384, 16384), (32, 1048576 * 8), (2**40, 2**40)):
        line = fails(
            capsys, "a cat", "--model", str(model_folder),
            "--height", str(height), "--width", str(width),
        )  # fmt: skip
        assert "choose a smaller size" in line and len(line) < 300
    monkeypatch.setattr("mlx_snapgen.settings.machine_memory", lambda: 1 << 30)
    settings = DrawSettings(height=1024, width=1024).resolved(components.config)
    assert settings.height == 1024
    with pytest.raises(UserError, match=r"takes at least 2\.3 GiB .* this machine has 1\.0"):
        DrawSettings(height=2048, width=2048).resolved(components.config)


@pytest.mark.skipif(sys.platform != "linux", reason="control groups are Linux's")
def test_memory_is_that_of_the_control_group(monkeypatch):
    whole = machine_memory()
    assert 2**28 < whole <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    files = {"/proc/self/cgroup": "1:name=x:/\n0::/service\n", "/sys/fs/cgroup/memory.max": "max"}

    def read_text(path, *_, **__):
        if str(path) not in files:
            raise FileNotFoundError
        return files[str(path)]

    monkeypatch.setattr(Path, "read_text", read_text)
    assert machine_memory() == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    files["/sys/fs/cgroup/service/memory.max"] = "1048576\n"
    assert machine_memory() == 1 << 20


# --- metadata -----------------------------------------------------------------------------------


def test_config_from_image_repeats_the_picture(run):
    run("a red apple", "--seed", "7", "--steps", "2", "--guidance", "0", "--width", "32")
    run(
        "a blue cat",
        "--num-images",
        "2",
        "--model-width",
        "small",
        "--quantize",
        "8",
        "--seed",
        "4",
    )
    for name in ("a-red-apple", "a-blue-cat-1"):
        again = ["--config-from-image", f"{name}.png", "--output", "again.png"]
        assert main([*again, "--trust-settings"]) == 0
        assert np.array_equal(pixels("again.png"), pixels(f"{name}.png"))
        assert read_metadata("again.png") == read_metadata(f"{name}.png")
        assert Path("again.png").read_bytes() == Path(f"{name}.png").read_bytes()
        os.remove("again.png")


def test_pictures_of_the_first_version_are_read():
    """They have no few-step mode, attention modulation, LoRAs or chosen text encoders."""
    old = {"mlx_snapgen": "0.1.0", "mlx": "0.32.0", "device": "cpu", "model": None,
           "revision": None, "model_name": "stickers", "model_width": "tiny", "quantize": 8,
           "dtype": "float32", "prompt": "two owls", "negative_prompt": "a cat", "height": 128,
           "width": 96, "num_inference_steps": 6, "guidance_scale": 2, "time_shift": 4.0,
           "seed": 4}  # fmt: skip
    save_picture(Image.new("RGB", (8, 8)), "old.png", metadata=old)
    settings, choice, values = read_settings("old.png")
    assert settings == DrawSettings(
        "two owls",
        "a cat",
        height=128,
        width=96,
        num_inference_steps=6,
        guidance_scale=2.0,
        few_step=False,
        force_size=True,
        seed=4,
    )
    assert choice == ModelChoice("stickers", model_width="tiny", quantize=8)
    assert values == old
    for name, bad in {"seed": None, "loras": [{"path": "x"}], "few_step": 1, "width": "w"}.items():
        save_picture(Image.new("RGB", (8, 8)), f"{name}.png", metadata=old | {name: bad})
        with pytest.raises(UserError, match=f"no usable '{name}'"):
            read_settings(f"{name}.png")


def test_options_win_over_the_picture(run):
    run("a red apple", "--seed", "7", *FAST)
    run("a blue cat", "--config-from-image", "a-red-apple.png", "--seed", "8", "--guidance", "0")
    before, after = read_metadata("a-red-apple.png"), read_metadata("a-blue-cat.png")
    changed = {key: after[key] for key in after if after[key] != before[key]}
    assert changed == {"prompt": "a blue cat", "seed": 8, "guidance_scale": 0.0}


def test_a_picture_of_other_versions_is_repeated_with_a_notice(run, capsys):
    run("a red apple", *FAST)
    old = read_metadata("a-red-apple.png") | {"mlx": "0.1", "device": "elsewhere"}
    save_picture(Image.open("a-red-apple.png"), "old.png", metadata=old)
    run("--config-from-image", "old.png")
    err = capsys.readouterr().err
    assert "made with mlx 0.1, this is" in err
    assert "made with device elsewhere" in err
    assert np.array_equal(pixels("a-red-apple.png"), pixels("a-red-apple-1.png"))


def test_metadata_says_all_that_matters(run, model_folder):
    run("a red 蘋果 apple", *FAST, "--seed", "7")
    found = read_metadata("a-red-蘋果-apple.png")
    assert found["prompt"] == "a red 蘋果 apple"
    expected = {"seed": 7, "num_inference_steps": 1, "guidance_scale": 3.0, "time_shift": 2.0}
    expected |= {"height": 32, "width": 64, "model_name": "random", "model_width": "full"}
    expected |= {"model": str(model_folder), "quantize": None, "negative_prompt": ""}
    assert {key: found[key] for key in expected} == expected


def test_no_metadata(run, capsys):
    run("a red apple", *FAST, "--no-metadata")
    assert Image.open("a-red-apple.png").info == {}
    capsys.readouterr()
    assert "carries no settings" in fails(capsys, "--config-from-image", "a-red-apple.png")


def test_pictures_that_cannot_be_repeated(capsys):
    image = Image.new("RGB", (8, 8))
    image.save("photo.jpg")
    foreign = PngImagePlugin.PngInfo()
    foreign.add_text("parameters", "a cat\nSteps: 20, Sampler: Euler a")
    image.save("foreign.png", pnginfo=foreign)
    save_picture(image, "partial.png", metadata={"mlx_snapgen": "0.1", "prompt": 3})
    Path("text.png").write_text("no picture")
    for name, message in {
        "photo.jpg": "is a JPEG",
        "foreign.png": "another program",
        "partial.png": "no usable 'prompt'",
        "text.png": "not a readable picture",
        "missing.png": "no picture missing.png",
    }.items():
        assert message in fails(capsys, "--config-from-image", name)


# --- writing ------------------------------------------------------------------------------------


def test_a_name_taken_meanwhile_is_not_overwritten(monkeypatch):
    """Another process creates the file after it was seen to be free."""
    link = os.link

    def race(source, target):
        if Path(target).name == "x.png":
            Path(target).write_text("theirs")
        link(source, target)

    monkeypatch.setattr(files.os, "link", race)
    assert save_picture(Image.new("RGB", (8, 8)), "x.png").name == "x-1.png"
    assert Path("x.png").read_text() == "theirs"


def test_a_file_system_without_links(monkeypatch):
    def refuse(source, target):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(files.os, "link", refuse)
    for name in ("x.png", "x-1.png"):
        assert save_picture(Image.new("RGB", (8, 8)), "x.png") == Path(name)
    assert sorted(os.listdir()) == ["x-1.png", "x.png"]
    assert pixels("x-1.png").shape == (8, 8, 3)


def test_a_write_that_fails_leaves_nothing(monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match="No space left"):
        save_picture(Image.new("RGB", (8, 8)), "x.png")
    assert os.listdir() == []


# --- mistakes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "say what to draw"),
        ([" "], "prompt is empty"),
        (["a", "--width", "tiny"], "use --model-width tiny"),
        (["a", "--model-width", "64"], "in pixels is --width"),
        (["a", "--model-width", "huge"], "not full, small or tiny"),
        (["a", "--steps", "0"], "not between 1 and"),
        (["a", "--steps", "few"], "a whole number expected, not 'few'"),
        (["a", "--guidance", "nan"], "finite"),
        (["a", "--guidance", "-1"], "-1 is below 0"),
        (["a", "--seed", "1", ".6"], "'.6': a number goes right after"),
        (["a", "--seed", "-1"], "-1 is below 0"),
        (["a", "--num-images", "0"], "0 is below 1"),
        (["a", "--quantize", "3"], "takes 4, 8 or none"),
        (["a", "--ouput", "x.png"], "unknown option --ouput (did you mean '--output'?)"),
        (["a", "red", "apple"], "quotes"),
        (["a", "--output", "x.jpg"], "ending in .png"),
        (["a", "--output", "x"], "neither a name ending in .png nor a folder ending in /"),
        (["a", "--output", "file/x.png"], "file is a file, not a folder"),
        (["a", "--stepwise-dir", "file"], "file is a file, not a folder"),
        (["a", "--prompts-file", "file"], "either a prompt or --prompts-file"),
        (["--prompts-file", "missing"], "cannot read missing"),
        (
            ["a", "--seed", str(2**63 - 1), "--num-images", "2"],
            "seed must be a whole number from 0",
        ),
    ],
)
def test_mistakes_are_one_line_before_the_model_is_loaded(
    capsys, model_folder, monkeypatch, arguments, message
):
    Path("file").write_text("")
    monkeypatch.setattr(SnapGenPipeline, "from_pretrained", None)
    assert message in fails(capsys, *arguments, "--model", str(model_folder))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--width", "100"], "100 is not, 96 is"),
        (["--model", "nowhere"], "no model folder nowhere"),
        (["--model", "https://huggingface.co/a/b/tree/main"], "give the repository as a/b"),
        (["--revision", "main"], "only a Hugging Face repository has revisions"),
    ],
)
def test_models_and_sizes_that_do_not_fit(capsys, model_folder, monkeypatch, arguments, message):
    monkeypatch.setattr(SnapGenPipeline, "from_pretrained", None)
    assert message in fails(capsys, "a", "--model", str(model_folder), *arguments)


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    text = capsys.readouterr().out
    assert exit_.value.code == 0
    for action in build_parser()._actions:
        assert action.help
        assert all(option in text for option in action.option_strings)


def command(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "mlx_snapgen.generate", *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command_line_exits_with_2_and_no_traceback(model_folder):
    done = command("a red apple", "--model", str(model_folder), "--height", "33")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "error: height must be a positive multiple of 32 pixels: 33 is not, 32 is\n"
    )


def test_a_cached_repository_draws_offline(model_folder, tmp_path):
    write_hub_cache(tmp_path / "hub", model_folder)
    offline = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = command("a red apple", *FAST, "--model", "someone/random", "--json", **offline)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["model"], result["revision"]) == ("someone/random", COMMIT)
    assert Image.open(io.BytesIO(Path(result["path"]).read_bytes())).size == (64, 32)


def test_one_command_reads_the_config_once_and_looks_the_hub_up_twice(model_folder, monkeypatch):
    asked, opened = [], []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda repo, **_: asked.append(repo) or model_folder
    )
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: "config.json")
    recording = True

    def record(event, arguments):
        # The opener of `open` raises the event again, without a mode.
        is_first = recording and event == "open" and arguments[1] is not None
        if is_first and str(arguments[0]).endswith("config.json"):
            opened.append(arguments[0])

    sys.addaudithook(record)
    try:
        main(["a red apple", *FAST, "--model", "someone/random", "--num-images", "2"])
    finally:
        recording = False
    assert asked == ["someone/random"] * 2, "for its configs, then for its weights"
    assert opened == [str(model_folder / "config.json")]


def test_the_built_in_model_has_a_name(capsys):
    assert main(["a red apple", *FAST, "--model", BUILT_IN, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["model"], result["model_name"]) == (None, BUILT_IN)


def test_drawing_imports_no_more_than_it_uses(tmp_path):
    """What takes long to import is put off until a model, an option or a terminal needs it."""
    code = (
        "import sys\n"
        "from mlx_snapgen import generate\n"
        "generate.main(['a red apple', '--steps', '1', '--output', sys.argv[1]])\n"
        "print(*sorted(sys.modules), file=sys.stderr)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "apple.png")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    imported = set(done.stderr.splitlines()[-1].split())
    assert {"mlx.core", "mlx_snapgen.pipeline"} < imported
    unused = "tqdm huggingface_hub mlx_lm transformers torch readline mlx_snapgen.public"
    unused += " mlx_snapgen.teachers mlx_snapgen.public_config mlx_snapgen.public_pipeline"
    unused += " mlx_snapgen.quantize mlx_snapgen.cli.interactive mlx_snapgen.networks.flux2"
    assert not imported & set(unused.split())


@pytest.mark.parametrize(
    ("given", "hint"),
    [("--modle", ""), ("--model", ""), ("--dat", " (did you mean '--data'?)"), ("--x", "")],
)
def test_only_a_near_name_of_an_option_is_suggested(given, hint):
    parser = Parser(prog="x")
    parser.add_argument("--data")
    with pytest.raises(UserError) as error:
        parser.parse_args([given, "y"])
    assert str(error.value) == f"unknown option {given}{hint}; see --help"


@pytest.mark.parametrize("size", [(0, 0), (0, 60), (24, 0), (24, 60)])
def test_a_terminal_that_reports_no_size_shows_the_bar(size):
    fcntl, termios = pytest.importorskip("fcntl"), pytest.importorskip("termios")
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
    code = "import mlx_snapgen; from tqdm import tqdm; [k for k in tqdm(range(3), desc='work')]"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, stderr=theirs, check=True)
    said = os.read(ours, 10_000).decode()
    os.close(ours)
    os.close(theirs)
    assert "work: 100%|" in said and "3/3" in said
