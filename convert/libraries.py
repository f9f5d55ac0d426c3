"""Other libraries: whether they are installed, and how to run them without their noise."""

import contextlib
import importlib.util
import logging
import warnings
from collections.abc import Iterable, Iterator
from typing import Any
from unittest import mock

import numpy as np
from tqdm import tqdm

from mlx_snapgen._interrupts import interrupts_deferred
from mlx_snapgen.errors import UserError


def require(extra: str, *packages: str) -> None:
    """`UserError` unless all packages are installed. None of them is imported.

    Args:
        extra: group of optional dependencies that holds them.
    """
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise UserError(f"this needs {', '.join(missing)}: pip install 'mlx_snapgen[{extra}]'")


def require_coremltools() -> None:
    """`UserError` unless Core ML packages can be written with what is installed."""
    require("coreml", "coremltools", "torch", "safetensors")
    if np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        # Shape arithmetic fails there: apple/coremltools#2633.
        raise UserError(
            f"coremltools does not work with numpy {np.__version__}: pip install 'numpy<2.4'"
        )


def import_coremltools() -> Any:
    """coremltools, without its warnings about the versions of other libraries; Ctrl-C waits."""
    require_coremltools()
    logging.getLogger("coremltools").setLevel(logging.ERROR)
    with warnings.catch_warnings(), interrupts_deferred():
        warnings.simplefilter("ignore")
        import coremltools
        import torch  # noqa: F401  its converters need it, and import it late
    return coremltools


@contextlib.contextmanager
def quiet_coremltools(label: str) -> Iterator[None]:
    """Hide warnings of coremltools and torch, and show its progress in one line with `label`."""
    from coremltools.converters.mil.frontend.torch import ops
    from coremltools.converters.mil.mil.passes import pass_pipeline
    from coremltools.optimize.coreml import _quantization_passes

    def bar(items: Iterable[Any], desc: str = "", **_: Any) -> Iterable[Any]:
        stages = {"Converting": "convert", "Running MIL": "optimize"}
        stage = next((s for start, s in stages.items() if desc.startswith(start)), "palettize")
        return tqdm(items, desc=f"{label}: {stage}", leave=False, disable=None)

    with (
        warnings.catch_warnings(),
        mock.patch.object(ops, "_tqdm", bar),
        mock.patch.object(pass_pipeline, "tqdm", bar),
        mock.patch.object(_quantization_passes, "tqdm", bar),
    ):
        warnings.simplefilter("ignore")
        yield
