"""Dependencies point one way, and the config modules stay free of mlx."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("mlx_snapgen", "train", "convert", "apps")
FORBIDDEN = {
    "mlx_snapgen": {"train", "convert", "apps", "tests", "torch", "coremltools"},
    "train": {"convert", "apps", "tests", "torch", "coremltools"},
    "apps": {"convert", "train", "tests", "torch", "coremltools"},
    "convert": {"train", "apps", "tests"},
}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("package", PACKAGES)
def test_dependencies_point_one_way(package):
    for path in (ROOT / package).rglob("*.py"):
        wrong = FORBIDDEN[package] & set(imported(path))
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


def test_config_and_package_import_no_mlx():
    code = "import mlx_snapgen, mlx_snapgen.config, sys; assert 'mlx.core' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_top_level_is_the_agreed_one():
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if tracked.returncode:
        pytest.skip("not a git checkout")
    top = {name.split("/")[0] for name in tracked.stdout.splitlines()}
    agreed = {*PACKAGES, "tests", "pyproject.toml", "README.md", "LICENSE"}
    assert {name for name in top if not name.startswith(".")} <= agreed
