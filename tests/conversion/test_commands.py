"""What the commands of `convert` have in common: checks before heavy imports, help, old names."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "coremltools", "diffusers", "transformers", "sklearn", "mlx_lm"}
BAD = {
    "from_torch": ["no-such-folder", "{new}"],
    "to_torch": ["no-such-folder", "{new}"],
    "coreml": ["no-such-folder", "{new}"],
    "coreml.compare": ["no-such-folder", "a cat"],
    "autoencoder": ["no-such-folder", "{new}", "--model", "no-such-folder"],
    "teacher": ["no-such-folder", "{new}"],
    "sample_teacher": ["no-such-folder", "a cat", "--output", "{new}/a.png"],
    "random_model": ["no-such-preset", "{new}"],
    "parity": ["--source", "no-such-folder"],
    "mil.interpreter": ["no-such-package"],
}

CODE = """
import importlib, json, sys
found = {}
for name, arguments in json.loads(sys.argv[1]).items():
    module = importlib.import_module(f"convert.{name}")
    if hasattr(module, "__path__"):
        module = importlib.import_module(f"convert.{name}.__main__")
    sys.argv = [name, *arguments]
    try:
        module.main()
        said = "nothing"
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    found[name] = [said, sorted({m.partition(".")[0] for m in sys.modules})]
print(json.dumps(found))
"""


def test_bad_arguments_are_one_line_before_heavy_libraries_are_imported(tmp_path):
    arguments = {
        name: [word.replace("{new}", str(tmp_path / "new")) for word in words]
        for name, words in BAD.items()
    }
    done = subprocess.run(
        [sys.executable, "-c", CODE, json.dumps(arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name, (said, modules) in json.loads(done.stdout.splitlines()[-1]).items():
        assert said.startswith(("UserError: ", "ModelError: ")) and "\n" not in said, name
        assert not HEAVY & set(modules), name
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("to_torch", ["--width", "small"], "--width is now --model-width"),
        ("coreml", ["--width", "small"], "--width is now --model-width"),
        ("coreml", ["--widths", "small"], "--widths is now --model-widths"),
        ("coreml", ["--prompts", "x"], "--prompts is now --prompts-file"),
        ("coreml", ["--resolution", "64"], "--resolution is now --height and --width"),
        ("from_torch", ["--bits", "4"], "--bits is now --quantize"),
        ("teacher", ["--bits", "4"], "--bits is now --quantize"),
        ("random_model", ["--bits", "4"], "--bits is now --quantize"),
    ],
)
def test_old_names_of_options_warn_in_one_line(name, old, new, tmp_path, monkeypatch, capsys):
    import importlib

    from mlx_snapgen.errors import UserError

    module = importlib.import_module(f"convert.{name}")
    if hasattr(module, "__path__"):
        module = importlib.import_module(f"convert.{name}.__main__")
    command = [name, "no-such-folder", "--output", str(tmp_path / "new"), *old]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(UserError, match=r"no-such-folder|cannot read x|this needs"):
        module.main()
    assert capsys.readouterr().err.splitlines()[0] == f"warning: {new}"


@pytest.mark.parametrize(("command", "library"), [("to_torch", "torch"), ("coreml", "coremltools")])
def test_a_library_that_is_missing_is_one_line(command, library, tmp_path):
    code = (
        f"import runpy, sys; sys.modules[{library!r}] = None; "
        f"sys.argv = [{command!r}, 'model', {str(tmp_path / 'out')!r}]; "
        f"runpy.run_module('convert.{command}', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: this needs {library}")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("output", [[], ["out", "--output", "out"]])
def test_the_output_is_named_once(output, monkeypatch):
    from convert import to_torch
    from mlx_snapgen.errors import UserError

    monkeypatch.setattr(sys, "argv", ["to_torch", "model", *output])
    with pytest.raises(UserError, match="name the output once"):
        to_torch.main()
