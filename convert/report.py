"""The printed report of `convert.from_torch`: sizes, keys, memory, quantization errors."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_snapgen.checkpoint.module import listed


def error_table(errors: Mapping[str, float]) -> str:
    """Table of relative quantization errors, with one row for a layer of all blocks."""
    rows: dict[str, list[tuple[float, str]]] = {}
    for layer, error in errors.items():
        rows.setdefault(re.sub(r"\.\d+(?=\.|$)", ".*", layer), []).append((error, layer))
    width = max(map(len, rows))
    lines = [f"{'layer':<{width}}  count   mean error  worst"]
    for name, row in rows.items():
        mean = sum(error for error, _ in row) / len(row)
        worst, where = max(row)
        at = f"  ({where})" if len(row) > 1 else ""
        lines.append(f"{name:<{width}}  {len(row):>5}   {mean:>10.4f}  {worst:.4f}{at}")
    return "\n".join(lines)


def summary(report: Mapping[str, Any], out: Path) -> str:
    """The report as text."""
    keys = report["keys"]
    lines = [
        f"{out}: {report['kind']}, {report['source_bytes'] / 1e6:.1f} MB -> "
        f"{report['bytes'] / 1e6:.1f} MB, peak memory {report['peak_process_bytes'] / 2**20:.0f} "
        "MiB",
        f"keys: {len(keys['used'])} used, {len(keys['renamed'])} renamed, {len(keys['ignored'])} "
        f"ignored, {len(keys['missing'])} missing",
    ]
    reasons = sorted(set(keys["ignored"].values()))
    for reason in reasons:
        some = [key for key, why in keys["ignored"].items() if why == reason]
        lines.append(listed(f"ignored, {reason}:", some))
    if report["relative_errors"]:
        lines += ["", error_table(report["relative_errors"])]
    return "\n".join(lines)
