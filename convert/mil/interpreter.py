"""Print the contents of a Core ML package: functions, inputs, outputs, operations and weights.

    python -m convert.mil.interpreter Transformer.mlpackage

To run a package in numpy, see convert/mil/execution.py.
"""

from pathlib import Path

from convert.mil.summary import LAYOUT_OPS, summary
from mlx_snapgen.cli.options import Parser
from mlx_snapgen.errors import run_command


def _printed(path: Path) -> str:
    found = summary(path)
    lines = [f"{path}, specification version {found['specification_version']}"]
    for name, function in found["functions"].items():
        default = " (default)" if name == found["default_function"] else ""
        lines.append(f"function {name}{default}")
        for what in ("inputs", "outputs"):
            lines += [f"  {what[:-1]:6} {n}: {kind}" for n, kind in function[what].items()]
        counts = function["operations"]
        layout = ", ".join(f"{n} {kind}" for kind, n in function["layout_operations"].items())
        lines.append(f"  {sum(counts.values())} operations, of these {layout}")
        others = [f"{n} {kind}" for kind, n in counts.items() if kind not in LAYOUT_OPS]
        lines.append(f"  {', '.join(others)}")
    lines.append(
        f"weights: {found['weight_bytes']:,} bytes, {found['weights']:,} numbers at "
        f"{found['bits_per_weight']:g} bits, {found['palettized_weights']} in "
        f"{found['palettes']} palettes of {found['bits_per_index']:g} bits"
    )
    return "\n".join(lines)


def main() -> None:
    parser = Parser(prog="python -m convert.mil.interpreter", description=__doc__)
    parser.add_argument("package", type=Path, metavar="PACKAGE", help="a .mlpackage folder")
    print(_printed(parser.parse_args().package))


if __name__ == "__main__":
    run_command(main)
