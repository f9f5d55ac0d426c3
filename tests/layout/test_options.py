"""The options of all commands: none takes a number that is none, or one too large for mlx."""

import argparse
import dataclasses
import importlib
import math
import re

import pytest

from convert.coreml.options import parse_bits
from mlx_snapgen.cli.options import Parser
from tests.layout.graph import ROOT
from tests.layout.test_layout import commands
from train.loop.config import TrainingConfig, name_of

HUGE = "9" * 30


class Built(Exception):
    """Ends a command when its parser is complete."""


def parser_of(module, monkeypatch):
    def stop(self, *_):
        raise Built(self)

    monkeypatch.setattr(Parser, "parse_known_args", stop)
    with pytest.raises(Built) as built:
        importlib.import_module(module).main()
    return built.value.args[0]


WITHOUT = {"apps.ios.vectors"}
"""Commands without a parser."""


@pytest.mark.parametrize("module", sorted(commands() - WITHOUT))
def test_numbers_are_finite_and_bounded(module, monkeypatch):
    for action in parser_of(module, monkeypatch)._actions:
        if action.type is None or action.choices is not None:
            continue
        for text in ("nan", "inf", HUGE):
            try:
                value = action.type(text)
            except Exception:
                continue
            name = f"{action.option_strings} takes {text}"
            assert not isinstance(value, float) or math.isfinite(value), name
            assert not isinstance(value, int) or value < 2**63, name


@pytest.mark.parametrize("module", sorted(commands() - WITHOUT))
def test_quantize_none_is_taken_wherever_it_means_something(module, monkeypatch):
    found = parser_of(module, monkeypatch)._option_string_actions.get("--quantize")
    if found is None or module == "train.palettes":
        return
    assert "none" in found.help and " 0" not in found.help
    if module == "convert.coreml.__main__":  # its default is in the model
        assert parse_bits("none", None) is parse_bits("0", None) is None
    else:
        assert found.type("none") == found.type("0") == 0 and found.type("8") == 8
        with pytest.raises(argparse.ArgumentTypeError, match="or none, not '7'"):
            found.type("7")


def test_settings_of_the_loop_are_named_as_options_if_they_are_some(monkeypatch):
    silent = {"keep_checkpoints", "log_every"}  # may change without a line
    names = {name_of(f.name) for f in dataclasses.fields(TrainingConfig) if f.name not in silent}
    known = parser_of("train.flow", monkeypatch)._option_string_actions
    assert names >= {"--steps", "weight decay"}
    assert [name for name in names if name.startswith("--") and name not in known] == []


def changelog_rows():
    """(command, old name, new name) of the table of renamed options."""
    text = (ROOT / ".github" / "CHANGELOG.md").read_text()
    command: list[str] = []
    for line in text.split("### Renamed options")[1].split("###")[0].splitlines():
        cells = [re.findall("`([^`]+)`", cell) for cell in line.split("|")[1:-1]]
        if len(cells) == 3:
            command = cells[0] or command
            for old, new in zip(cells[1], cells[2], strict=False):
                yield from ((name, old.split()[0], new.split()[0]) for name in command)


@pytest.mark.parametrize("module", sorted(commands() - WITHOUT))
def test_the_changelog_lists_the_renamed_options(module, monkeypatch):
    command = module.removesuffix(".__main__")
    renamed = parser_of(module, monkeypatch).renamed
    listed = {old: new for name, old, new in changelog_rows() if name == command}
    assert listed.pop("--resolution", None) == ("--height" if command == "convert.coreml" else None)
    assert listed == renamed
