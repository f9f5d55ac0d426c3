"""Fixtures of the tests that run training commands in this process."""

import sys

import mlx.core as mx
import pytest

import train.loop.trainer


@pytest.fixture
def quick(monkeypatch):
    """No curves, and no compiler, which would take longer than the few steps."""
    monkeypatch.setattr(train.loop.trainer, "plot_log", lambda run_dir: None)
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture
def run(monkeypatch):
    """Runs a command with its options."""

    def call(command, *options):
        monkeypatch.setattr(sys, "argv", ["command", *map(str, options)])
        command.main()

    return call
