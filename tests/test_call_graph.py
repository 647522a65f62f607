"""README says how many calls lead from a script's main() to its loss. Counted in the syntax trees."""

import ast
import re
from collections import deque
from functools import cache

from tests.support.tiny_run import ROOT

NUMBERS = {"two": 2, "three": 3, "four": 4, "five": 5}
LOSSES = {
    "run_sft": ("train.weighted_cross_entropy", "linear_weighted_cross_entropy"),
    "run_ppo": ("rl.ppo_loss", "policy_loss"),
}


@cache
def module_tree(module: str) -> ast.Module | None:
    """The syntax tree of a module of this repository; None for one of another package."""
    path = ROOT / (module.replace(".", "/") + ".py")
    return ast.parse(path.read_text(encoding="utf-8")) if path.is_file() else None


@cache
def callees(module: str, function: str) -> set[tuple[str, str]]:
    """(module, function) of every call by name in the body of a function, its nested functions included."""
    tree = module_tree(module)
    if tree is None:
        return set()
    defined = {node.name: (module, node.name) for node in tree.body if isinstance(node, ast.FunctionDef)}
    imported = {
        alias.asname or alias.name: (node.module, alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    bodies = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function]
    names = {
        node.func.id
        for body in bodies
        for node in ast.walk(body)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    return {(imported | defined)[name] for name in names if name in imported or name in defined}


def shortest_path(start: tuple[str, str], end: tuple[str, str]) -> list[str]:
    """Names of the functions on the shortest chain of calls, start and end included; empty if there is none."""
    paths = deque([[start]])
    seen = {start}
    while paths:
        path = paths.popleft()
        if path[-1] == end:
            return [function for _, function in path]
        for each in sorted(callees(*path[-1]) - seen):
            seen.add(each)
            paths.append([*path, each])
    return []


def test_the_counting_itself():
    assert shortest_path(("train.optimizer", "make_adamw"), ("train.optimizer", "decay_groups")) == [
        "make_adamw",
        "decay_groups",
    ]
    assert shortest_path(("train.optimizer", "decay_groups"), ("train.optimizer", "make_adamw")) == []


def test_sft_reaches_its_loss_as_the_page_says():
    path = shortest_path(("run_sft", "main"), LOSSES["run_sft"])
    assert path == ["main", "train_sft", "train_step", "linear_weighted_cross_entropy"]


def test_ppo_reaches_its_loss():
    path = shortest_path(("run_ppo", "main"), LOSSES["run_ppo"])
    assert path[:2] == ["main", "train_ppo"] and path[-1] == "policy_loss"


def test_readme_states_the_number_of_calls():
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    stated = {script: number for number, script in re.findall(r"(\w+) calls from `(run_\w+)\.main`", readme)}
    assert "run_sft" in stated
    for script, number in stated.items():
        path = shortest_path((script, "main"), LOSSES[script])
        assert len(path) - 1 == NUMBERS[number], f"{' -> '.join(path)}; README.md says {number}"
