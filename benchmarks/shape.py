"""How large the library is, and of what shape: numbers of a checkout, by its text.

    python benchmarks/shape.py [CHECKOUT ...]

prints a table with a column for each checkout (by default this one).
"""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parents[1]
APPS = (  # built on the library: all else is its core
    *("baselines", "cli", "flow", "integrations", "jobs", "metrics", "plotting"),
    *("testing", "__main__"),
)
_PRIMITIVE = re.compile(r"\w+_p")
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


class Checkout:
    """The Python files of a checkout's package, parsed.

    Args:
      root: the folder that has the folder ``jlrp``.
    """

    def __init__(self, root: Path):
        self.root, self.package = root, root / "jlrp"
        self.texts = {
            path.relative_to(self.package).with_suffix("").as_posix(): path.read_text()
            for path in sorted(self.package.rglob("*.py"))
        }
        self.trees = {name: ast.parse(text) for name, text in self.texts.items()}

    def rows(self) -> dict[str, str]:
        core = [t for n, t in self.texts.items() if n.split("/")[0] not in APPS]
        tables = list(self.tables())
        others = [t for t in tables if not t[0].endswith("primitives")]
        length, where = max(self.functions())
        code, where_code = max(self.functions(documented=False))
        fields, most_fields = max((f, name) for f, _, name in self.classes())
        methods, most_methods = max((m, name) for _, m, name in self.classes())
        return {
            "lines": f"{sum(t.count(chr(10)) for t in self.texts.values()):,}",
            "of these, the core": f"{sum(t.count(chr(10)) for t in core):,}",
            "files": str(len(self.texts)),
            "levels of imports": self.levels(),
            "longest chain of imports": str(self.chain()),
            "files that name `mul_p`": str(
                sum("mul_p" in names(tree) for tree in self.trees.values())
            ),
            "tables of primitives beside the one": f"{len(others)} in "
            f"{len({t[0] for t in others})} files, {sum(t[1] for t in others)} lines",
            "longest function": f"{length} lines: `{where}`",
            "longest function without its docstring": f"{code} lines: `{where_code}`",
            "functions over 70 lines without docstring": str(
                sum(n > 70 for n, _ in self.functions(documented=False))
            ),
            "most attributes of a class": f"{fields}: `{most_fields}`",
            "most methods of a class": f"{methods}: `{most_methods}`",
            "lines with `Any`": str(
                sum(
                    bool(re.search(r"\bAny\b", line))
                    for text in self.texts.values()
                    for line in text.splitlines()
                )
            ),
        }

    def levels(self) -> str:
        """How many the layout's test has; files beside each other are one."""
        tree = ast.parse((self.root / "tests/test_layout.py").read_text())
        for node in tree.body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in LEVELS:
                assert isinstance(node.value, ast.Dict | ast.List | ast.Tuple)
                held = node.value
                return str(len(held.keys if isinstance(held, ast.Dict) else held.elts))
        return "none"

    def chain(self) -> int:
        """How many files import each other in a row, circles cut where they close."""
        imports = {name: set(self.imported(name)) - {name} for name in self.trees}
        depth: dict[str, int] = {}

        def of(name: str, above: tuple[str, ...] = ()) -> int:
            if name not in depth:
                below = imports[name].difference(above, (name,))
                depth[name] = 1 + max((of(n, (*above, name)) for n in below), default=0)
            return depth[name]

        return max(map(of, imports))

    def imported(self, name: str) -> Iterator[str]:
        """The files of the package that a file imports when it is imported."""
        folder = name.split("/")[:-1]
        for node in self.trees[name].body:
            if not isinstance(node, ast.ImportFrom):
                continue
            base = folder[: len(folder) + 1 - node.level] if node.level else []
            path = [*base, *(node.module or "").split(".")] if node.module else base
            path = path[1:] if path[:1] == ["jlrp"] else path
            for parts in ([*path, alias.name] for alias in node.names):
                for found in ("/".join(parts), "/".join(parts[:-1])):
                    if found in self.trees:
                        yield found
                        break

    def tables(self) -> Iterator[tuple[str, int]]:
        """Constants of files that name two primitives or more: file and lines."""
        for name, tree in self.trees.items():
            for node in tree.body:
                if not isinstance(node, ast.Assign | ast.AnnAssign) or not node.value:
                    continue
                found = {n for n in names(node.value) if _PRIMITIVE.fullmatch(n)}
                if len(found) > 1:
                    yield name, (node.end_lineno or 0) - node.lineno + 1

    def functions(self, documented: bool = True) -> Iterator[tuple[int, str]]:
        for name, tree in self.trees.items():
            for node in ast.walk(tree):
                if isinstance(node, FUNCTIONS):
                    doc = node.body[0] if ast.get_docstring(node) else None
                    length = span(node) - (span(doc) if doc and not documented else 0)
                    yield length, f"{name}.{node.name}"

    def classes(self) -> Iterator[tuple[int, int, str]]:
        """How many attributes and methods classes have."""
        for name, tree in self.trees.items():
            for node in ast.walk(tree):
                if isinstance(node, ast.ClassDef):
                    methods = [n for n in node.body if isinstance(n, FUNCTIONS)]
                    fields = {
                        ast.unparse(n.target)
                        for n in node.body
                        if isinstance(n, ast.AnnAssign)
                    }
                    fields |= {a for m in methods for a in assigned(m)}
                    yield len(fields), len(methods), f"{name}.{node.name}"


LEVELS = ("LAYERS", "LEVELS")  # as the layout's test called and calls them


def span(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def names(tree: ast.AST) -> set[str]:
    """The names and attributes in a tree."""
    nodes = list(ast.walk(tree))
    return {n.id for n in nodes if isinstance(n, ast.Name)} | {
        n.attr for n in nodes if isinstance(n, ast.Attribute)
    }


def assigned(method: ast.AST) -> set[str]:
    """The attributes of self that a method assigns."""
    return {
        n.attr
        for n in ast.walk(method)
        if isinstance(n, ast.Attribute)
        and isinstance(n.ctx, ast.Store)
        and ast.unparse(n.value) == "self"
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkouts", nargs="*", type=Path, default=[HERE])
    columns = [Checkout(root).rows() for root in parser.parse_args().checkouts]
    print(f"| |{' |' * len(columns)}\n|---|{'---|' * len(columns)}")
    for name in columns[0]:
        print(f"| {name} | {' | '.join(column[name] for column in columns)} |")


if __name__ == "__main__":
    main()
