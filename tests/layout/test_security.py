"""What SECURITY.md promises about the code: weights of others are data, never code."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = [
    f for name in ("mlx_snapgen", "train", "convert", "apps") for f in ROOT.glob(f"{name}/**/*.py")
]
TEXT = (ROOT / ".github/SECURITY.md").read_text(encoding="utf-8")
RUNS_CODE = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "pickle.load"),
    *("pickle.loads", "pickle.Unpickler", "marshal.loads", "yaml.load", "shelve.open"),
    *("runpy.run_path", "joblib.load", "dill.load"),
}
ALWAYS = {"weights_only": True}
"""Keywords that `torch.load` must have."""
NEVER = {"shell": True, "allow_pickle": True, "trust_remote_code": True, "weights_only": False}


def dotted(node):
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join(reversed([*parts, node.id])) if isinstance(node, ast.Name) else ""


def faults(source):
    """Lines of calls that could run code out of data."""
    tree = ast.parse(source)
    # `load = torch.load` is another name of it.
    others = {
        target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and dotted(node.value).endswith("torch.load")
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func)
        given = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
        torch_load = name.endswith("torch.load") or name in others
        if (
            name in RUNS_CODE
            or any(given.get(key) is value for key, value in NEVER.items())
            or (torch_load and not ALWAYS.items() <= given.items())
        ):
            yield f"line {node.lineno}: {name}"


def test_no_code_comes_out_of_data():
    found = {f.relative_to(ROOT): list(faults(f.read_text(encoding="utf-8"))) for f in FILES}
    assert {path: lines for path, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "load = self.torch.load\nload(path)",
        "np.load(path, allow_pickle=True)",
        "AutoTokenizer.from_pretrained(path, trust_remote_code=True)",
        "subprocess.run(command, shell=True)",
        "eval(text)",
        "pickle.load(file)",
    ],
)
def test_the_check_finds(line):
    assert list(faults(line))


def test_the_numbers_and_files_in_the_text_are_true():
    pytest.importorskip("starlette", reason="the server extra is not installed")
    from apps.server import app, uploads
    from mlx_snapgen import metadata

    assert f"{app.MAX_BODY >> 10} KiB of JSON" in TEXT
    assert f"within {app.BODY_SECONDS:.0f} s" in TEXT
    assert f"{uploads.MAX_FORM >> 20} MiB within {uploads.FORM_SECONDS:.0f} s" in TEXT
    assert f"{uploads.MAX_STORED >> 20} MiB together" in TEXT
    assert f"At most {metadata.MAX_TEXT >> 20} MiB" in TEXT
    assert f"over {metadata.MAX_PIXELS >> 20} megapixels" in TEXT
    for target in re.findall(r"\]\(([^)]+)\)", TEXT):
        assert (ROOT / ".github" / target).exists()
    for option in ("--trust-settings", "--no-metadata", "--revision", "--url-lifetime"):
        assert option in TEXT
