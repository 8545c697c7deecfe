"""What is public stands in ``__all__``; documents and examples use nothing else."""

import ast
import importlib
import inspect
import json
import re
from pathlib import Path

import pytest

import jlrp

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "docs" / "reference"
PUBLIC = re.findall(r"^\| `(jlrp[\w.]*)`", (REFERENCE / "public.md").read_text(), re.M)


def names_of(module):
    return importlib.import_module(module).__all__


def code_of(path):
    """The Python of a document, notebook or program; magics of notebooks left out."""
    text = path.read_text()
    if path.suffix == ".md":
        return "\n".join(re.findall(r"^```python\n(.*?)^```", text, re.M | re.S))
    if path.suffix == ".ipynb":
        cells = [c["source"] for c in json.loads(text)["cells"]]
        kinds = [c["cell_type"] for c in json.loads(text)["cells"]]
        code = [s for s, kind in zip(cells, kinds, strict=True) if kind == "code"]
        text = "\n".join("".join(source) for source in code)
        return re.sub(r"^[%!].*", "", text, flags=re.M)
    return text


def dotted(node):
    """``a.b.c`` as ["a", "b", "c"]; None for what does not start with a name."""
    if isinstance(node, ast.Name):
        return [node.id]
    if isinstance(node, ast.Attribute) and (before := dotted(node.value)):
        return [*before, node.attr]
    return None


def uses_of(code):
    """The dotted names of jlrp that a program reads, whatever it calls them."""
    tree, bound = ast.parse(code), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "jlrp":
                    yield alias.name
                    bound[alias.asname or "jlrp"] = (
                        alias.name if alias.asname else "jlrp"
                    )
        elif isinstance(node, ast.ImportFrom) and not node.level:
            if node.module.split(".")[0] == "jlrp":
                for alias in node.names:
                    yield f"{node.module}.{alias.name}"
                    bound[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        name = dotted(node)
        if isinstance(node, ast.Attribute) and name and name[0] in bound:
            yield ".".join([bound[name[0]], *name[1:]])


def is_public(name):
    """Each part is a public module, or a name in the ``__all__`` of the one before.

    What such a name has for attributes is its class's to say.
    """
    parts = name.split(".")
    module = parts[0]
    for part in parts[1:]:
        inside = f"{module}.{part}"
        if inside in PUBLIC or any(p.startswith(f"{inside}.") for p in PUBLIC):
            module = inside
        else:
            return module in PUBLIC and part in names_of(module)
    return True


DOCUMENTS = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "docs").rglob("*.ipynb")),
    *sorted((ROOT / "examples").glob("*.py")),
]
WITH_CODE = {p.relative_to(ROOT).as_posix(): c for p in DOCUMENTS if (c := code_of(p))}


@pytest.mark.parametrize("document", WITH_CODE)
def test_documents_use_public_names_alone(document):
    private = [u for u in uses_of(WITH_CODE[document]) if not is_public(u)]
    assert not private, f"{document} uses {private}"


def test_that_private_names_are_found():
    code = "import jlrp.jobs.store as s\nfrom jlrp.promise import Promise\njlrp = 1\n"
    assert [u for u in uses_of(code) if not is_public(u)] == [
        "jlrp.jobs.store",
        "jlrp.promise.Promise",
    ]
    code = (
        "import jlrp as j\nfrom jlrp import rules\nj.api\nrules.base.Rule\nrules.Pass"
    )
    assert {u for u in uses_of(code) if not is_public(u)} == {
        *("jlrp.api", "jlrp.rules.base", "jlrp.rules.base.Rule")
    }
    assert is_public("jlrp.integrations.flax.nnx") and is_public("jlrp.rules.Pass")


def test_the_page_lists_every_module_with_public_names():
    files = {p.relative_to(ROOT): p.read_text() for p in ROOT.glob("jlrp/**/*.py")}
    with_names = [
        ".".join(path.with_suffix("").parts).removesuffix(".__init__")
        for path, text in files.items()
        if re.search("^__all__", text, re.M)
    ]
    assert sorted(PUBLIC) == sorted(with_names)


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names_are_there_and_have_docstrings(module):
    holder = importlib.import_module(module)
    assert inspect.getdoc(holder)
    assert len(set(holder.__all__)) == len(holder.__all__)
    for name in holder.__all__:
        value = getattr(holder, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert inspect.getdoc(value), f"{module}.{name}"


PAGES = "\n".join(path.read_text() for path in REFERENCE.glob("*.md"))


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names_are_in_the_reference(module):
    """By an automodule with all members, or by their own entry."""
    options = re.search(rf"automodule:: {re.escape(module)}\n((?:   :.*\n)*)", PAGES)
    if options and ":members:\n" in options[1]:
        return
    for name in names_of(module):
        value = getattr(importlib.import_module(module), name)
        if not inspect.ismodule(value):
            entry = rf"auto\w+:: (?:{re.escape(module)}\.)?{name}\b"
            inherited = f"automodule:: {getattr(value, '__module__', '')}\n"
            assert re.search(entry, PAGES) or inherited in PAGES, f"{module}.{name}"


# Every error is one of jlrp's.


ALLOWED = {
    # What the language asks for: of an abstract method, and of a command.
    "NotImplementedError",
    "click.ClickException",
    "click.UsageError",
}


def foreign_raises(tree):
    """What is raised and is no error of jlrp, nor one that was caught."""
    ours = {name for name in ERRORS if issubclass(ERRORS[name], jlrp.JlrpError)}
    caught = {
        handler.name
        for handler in ast.walk(tree)
        if isinstance(handler, ast.ExceptHandler)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and node.exc is not None:
            error = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            name = ast.unparse(error)
            known = name.split(".")[-1].lstrip("_") in ours
            if not known and name not in caught | ALLOWED:
                yield node.lineno, name


ERRORS = {
    name: value
    for module in ("jlrp.errors", "jlrp.jobs")
    for name, value in vars(importlib.import_module(module)).items()
    if inspect.isclass(value) and issubclass(value, Exception)
}
FILES = sorted((ROOT / "jlrp").rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_every_error_is_one_of_jlrps(path):
    tree = ast.parse(path.read_text())
    assert not list(foreign_raises(tree))
    abstract = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    for function in abstract:
        for node in ast.walk(function):
            if isinstance(node, ast.Raise) and node.exc is not None:
                if ast.unparse(node.exc) == "NotImplementedError":
                    assert function.body[-1] is node and len(function.body) <= 2


def test_that_other_errors_are_found():
    code = "try: f()\nexcept OSError as e: raise e\nraise ValueError\nraise X.y\n"
    assert [name for _, name in foreign_raises(ast.parse(code))] == [
        "ValueError",
        "X.y",
    ]
