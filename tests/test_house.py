"""Rules of the house that a tool can check: size of functions, legends of shapes, one style of rulers."""

import ast
import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAX_PARAMETERS = 7  # self and cls not counted
MAX_LINES = 60
SUFFIXED = re.compile(r"\b[a-z][a-z0-9]*(?:_[a-z0-9]+)*_([1-9A-Z]{1,5})_?\b")
RULER = re.compile(r"^# ?-{3,}.*(?:\n.*)?", re.MULTILINE)
FULL_RULER = re.compile(r"# -{117}\n# \S.*")


def python_files() -> list[str]:
    """Python files of the repository, as git knows them."""
    done = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "*.py"], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode != 0:
        pytest.skip("needs a git checkout")
    return [path for path in done.stdout.split() if (ROOT / path).is_file()]


def product_files() -> list[str]:
    return [path for path in python_files() if not path.startswith("tests/")]


@cache
def tree_of(path: str) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


@cache
def syntax_trees() -> dict[str, ast.Module]:
    return {path: tree_of(path) for path in product_files()}


@cache
def functions() -> list[tuple[str, ast.FunctionDef]]:
    """("file.py:name", node) of every function and method, nested ones included."""
    return [
        (f"{path}:{node.name}", node)
        for path, tree in syntax_trees().items()
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]


def n_parameters(node: ast.FunctionDef) -> int:
    given = node.args
    names = [
        each.arg for each in (*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg) if each
    ]
    return len([name for name in names if name not in ("self", "cls")])


def test_no_function_takes_more_than_seven_parameters():
    found = {name for name, node in functions() if n_parameters(node) > MAX_PARAMETERS}
    assert found == set()


def test_no_function_is_longer_than_a_page():
    found = {name for name, node in functions() if node.end_lineno - node.lineno + 1 > MAX_LINES}
    assert found == set()


def test_every_suffix_of_a_tensor_is_in_the_legend_of_its_file():
    """The module docstring explains each letter once: `B batch, T tokens, ...`."""
    found = set()
    for path, tree in syntax_trees().items():
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        names |= {node.arg for node in ast.walk(tree) if isinstance(node, (ast.arg, ast.keyword)) and node.arg}
        names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        letters = {letter for name in names if (match := SUFFIXED.fullmatch(name)) for letter in match[1]}
        docstring = " ".join((ast.get_docstring(tree) or "").split())
        legend = docstring[docstring.find("Shape ") :] if "Shape " in docstring else ""
        explained = re.findall(r"(?:[:,;] |\band )([A-Z])(?: =)? [a-z(*]", legend)
        assert len(explained) == len(set(explained)), f"{path}: a letter with two meanings: {legend}"
        if missing := {letter for letter in letters if letter.isalpha()} - set(explained):
            print(f"{path}: no legend for {sorted(missing)}")
            found.add(path)
    assert found == set()


def test_rulers_have_one_style():
    """A line of 117 dashes, then a title line of its own."""
    found = set()
    for path in python_files():
        text = (ROOT / path).read_text(encoding="utf-8")
        if any(not FULL_RULER.fullmatch(ruler[0]) for ruler in RULER.finditer(text)):
            found.add(path)
    assert found == set()


def test_no_private_name_is_imported():
    found = {
        f"{path}: {alias.name}"
        for path in python_files()
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.name.startswith("_") and not alias.name.startswith("__")
    }
    assert found == set()
