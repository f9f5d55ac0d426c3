"""The import graph: modules, arrows (who imports whom), floors and circles.

    python tests/layout/graph.py [FOLDER] [--arrows]

prints the figures of each package of the checkout in FOLDER (default: this one); --arrows also
prints the floor and the imports of every part. A part is a module or a folder directly under the
package. A part's floor is 1 + the highest floor that it imports from its package.
"""

import argparse
import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("mlx_snapgen", "train", "convert", "apps")

Graph = dict[str, set[str]]


def find_modules(root: Path = ROOT) -> dict[str, Path]:
    """Dotted name -> file of every module of the packages."""
    found = {}
    for package in PACKAGES:
        for path in (root / package).rglob("*.py"):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def is_command(tree: ast.Module) -> bool:
    """Whether the module runs something as `python -m`."""
    return any(
        isinstance(node, ast.If) and "__name__" in ast.unparse(node.test) for node in tree.body
    )


def imported_names(tree: ast.Module) -> Iterator[tuple[str, str | None]]:
    """(module, name) of every import, also inside functions; name is None for `import module`.

    Imports under `if TYPE_CHECKING:` do not count, as they never run.
    """
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from ((node.module, alias.name) for alias in node.names)
        waiting += ast.iter_child_nodes(node)


def import_graph(root: Path = ROOT) -> Graph:
    """Module -> the modules of the four packages that it imports."""
    modules = find_modules(root)
    graph = {}
    for module, path in modules.items():
        arrows = set()
        for source, name in imported_names(ast.parse(path.read_text())):
            submodule = f"{source}.{name}"
            arrows.add(submodule if submodule in modules else source)
        graph[module] = (arrows & set(modules)) - {module}
    return graph


def parts(graph: Graph, package: str) -> Graph:
    """The graph between what stands directly under `package`: its modules and its folders."""
    depth = package.count(".") + 1
    inside = package + "."
    found: Graph = {}
    for module, arrows in graph.items():
        if module.startswith(inside):
            part = module.split(".")[depth]
            arrows = {arrow.split(".")[depth] for arrow in arrows if arrow.startswith(inside)}
            found.setdefault(part, set()).update(arrows - {part})
    return found


def within(graph: Graph, package: str) -> Graph:
    """The graph between all modules below `package`, without the package's own __init__."""
    inside = package + "."
    return {
        module: {arrow for arrow in arrows if arrow.startswith(inside)}
        for module, arrows in graph.items()
        if module.startswith(inside)
    }


def components(graph: Graph) -> list[list[str]]:
    """Strongly connected components (Tarjan), each after those that it points to."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        order[node] = low[node] = len(order)
        stack.append(node)
        for target in sorted(graph[node]):
            if target not in order:
                visit(target)
            if target in stack:
                low[node] = min(low[node], low[target])
        if low[node] == order[node]:
            start = stack.index(node)
            found.append(sorted(stack[start:]))
            del stack[start:]

    for node in sorted(graph):
        if node not in order:
            visit(node)
    return found


def circles(graph: Graph) -> list[list[str]]:
    """Groups of nodes that import each other."""
    return [group for group in components(graph) if len(group) > 1]


def floors(graph: Graph) -> dict[str, int]:
    """Node -> its floor, counted from 1; the nodes of a circle share one."""
    found: dict[str, int] = {}
    for group in components(graph):
        below = {target for node in group for target in graph[node]} - set(group)
        found |= dict.fromkeys(group, 1 + max((found[target] for target in below), default=0))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Print the import graph of the packages.")
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT, metavar="FOLDER")
    parser.add_argument("--arrows", action="store_true", help="print the imports of every part")
    args = parser.parse_args()
    graph = import_graph(args.folder)
    print(f"{'package':12} {'nodes':8} {'count':>6} {'arrows':>7} {'floors':>7}  circles")
    for package in PACKAGES:
        views = {"modules": within(graph, package), "parts": parts(graph, package)}
        for kind, view in views.items():
            arrows = sum(len(targets) for targets in view.values())
            top = max(floors(view).values(), default=0)
            rings = "; ".join(" <-> ".join(ring) for ring in circles(view)) or "none"
            print(f"{package:12} {kind:8} {len(view):6} {arrows:7} {top:7}  {rings}")
    if args.arrows:
        for package in PACKAGES:
            view = parts(graph, package)
            print(f"\n{package}")
            for part, floor in sorted(floors(view).items(), key=lambda item: (-item[1], item[0])):
                print(f"  {floor:2} {part:14} -> {' '.join(sorted(view[part])) or '-'}")


if __name__ == "__main__":
    main()
