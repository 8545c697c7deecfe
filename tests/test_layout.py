"""The package imports only downwards, and knows JAX's internals in one file."""

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "jlrp"

# Low to high: what a file imports of the library is of its own level or a lower one.
# The files of one level may import each other, without a cycle.
LEVELS = {
    "base": [
        *["typing", "errors", "arguments", "fields", "promise", "tactics"],
        "ir/jax_compat",
    ],
    "ir": ["ir"],
    "analysis": ["analysis"],
    "ops": ["ops"],
    "rules": ["rules", "tactics/contributions"],
    "plan": ["plan", "composites"],
    "engine": [
        *["interpreter", "delivered", "recompute", "context"],
        *["references", "options", "request", "caching"],
    ],
    "api": ["api", "reports", "notices"],
    "apps": [
        *["__init__", "choosing"],
        *["baselines", "flow", "integrations", "jobs", "metrics", "plotting"],
        "testing",
        *["cli", "__main__"],
    ],
}
LEVEL = {part: i for i, parts in enumerate(LEVELS.values()) for part in parts}

DEPENDENCIES = {"jax", "numpy"}

# What an integration or a picture may import besides, inside its functions.
FRAMEWORKS = {
    "choosing": {"tqdm"},
    "plotting/drawing": {"matplotlib"},
    "plotting/faithfulness": {"matplotlib"},
    "plotting/flows": {"matplotlib"},
    "plotting/images": {"matplotlib"},
    "plotting/inside": {"matplotlib"},
    "plotting/measured": {"matplotlib"},
    "plotting/words": {"matplotlib"},
    "integrations/equinox": {"equinox"},
    "integrations/flax": {"flax"},
    "integrations/haiku": {"haiku"},
    "integrations/keras": {"keras"},
    "integrations/torchax": {"torch", "torchax"},
    "jobs/pictures": {"matplotlib"},
}

# What the files on top of the library may import any_unbatched: the extra `jobs`.
JOBS = {"jobs": {"tensorstore", "tqdm"}, "cli": {"click", "tensorstore"}}

FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = [path.relative_to(PACKAGE).with_suffix("").as_posix() for path in FILES]


def walk(node, into_functions):
    """A tree; without what an import of the file does not run."""
    yield node
    later = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    later |= isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    if into_functions or not later:
        for child in ast.iter_child_nodes(node):
            yield from walk(child, into_functions)


def imports(module, into_functions=True):
    """The absolute names of all that a file imports, wherever in it."""
    folder = ["jlrp", *module.split("/")[:-1]]
    tree = ast.parse((PACKAGE / f"{module}.py").read_text())
    for node in walk(tree, into_functions):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = folder[: len(folder) + 1 - node.level] if node.level else []
            origin = ".".join([*base, *filter(None, [node.module])])
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def imported_modules(module):
    """The files of the package that a file imports, such as "rules/linear"."""
    for name in imports(module):
        top, *rest = name.split(".")
        if top != "jlrp":
            continue
        # `from jlrp.a import b` names the file a/b, or b in a.py or in a/__init__.py.
        candidates = ["/".join(rest[:n]) for n in range(len(rest), 0, -1)]
        files = [c + end for c in candidates for end in ("", "/__init__")]
        yield next((c for c in files if c in MODULES), "__init__")


def level(module):
    """The level of a file: its own, or that of its folder."""
    return LEVEL.get(module, LEVEL.get(module.split("/")[0]))


@pytest.mark.parametrize("module", MODULES)
def test_imports_only_downwards(module):
    assert level(module) is not None, f"jlrp/{module}.py is missing from LEVELS"
    upwards = [m for m in imported_modules(module) if level(m) > level(module)]
    assert not upwards, f"jlrp/{module}.py imports upwards: {upwards}"


def test_no_import_cycles():
    # A folder's __init__ gathers its files, which may import what it defines first.
    edges = {
        module: [m for m in imported_modules(module) if not m.endswith("__init__")]
        for module in MODULES
        if not module.endswith("__init__")
    }
    done = set()

    def visit(module, path):
        assert module not in path, f"import cycle: {[*path, module]}"
        if module not in done:
            for other in edges[module]:
                visit(other, [*path, module])
            done.add(module)

    for module in edges:
        visit(module, [])


@pytest.mark.parametrize("module", MODULES)
def test_depends_on_jax_and_numpy_alone(module):
    known = DEPENDENCIES | {"jlrp"} | sys.stdlib_module_names
    known |= JOBS.get(module.split("/")[0], set())
    for into_functions in (False, True):
        tops = {name.split(".")[0] for name in imports(module, into_functions)}
        foreign = tops - known
        assert not foreign, f"jlrp/{module}.py imports {foreign}"
        known |= FRAMEWORKS.get(module, set())


@pytest.mark.parametrize("path", FILES, ids=MODULES)
def test_jax_internals_stay_in_one_file(path):
    if path.name != "jax_compat.py":
        assert "jax._src" not in path.read_text()
