"""The documentation names real things: equations stand where docs/math.md says, tests and links exist."""

import ast
import json
import re
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest

from command_line import read_config
from rl.ppo_config import PPOConfig
from train.sft_config import SFTConfig

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("assets/*.md"), *ROOT.glob("train/cuda/csrc/*.md")]
)
EQUATIONS = [f"E{number}" for number in range(1, 36)]
PLACE = re.compile(r"`([\w/]+\.py):(\w+)`")
TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def math_rows() -> dict[str, str]:
    """Equation -> its table row in docs/math.md."""
    text = (ROOT / "docs/math.md").read_text(encoding="ascii")
    return {match[1]: match[0] for match in re.finditer(r"^\| \*\*(E\d+)\*\*.*$", text, re.MULTILINE)}


@cache
def definitions(path: Path) -> dict[str, list[str]]:
    """Name -> source lines of every function and class of that name in a file, methods included."""
    text = path.read_text(encoding="utf-8")
    lines, found = text.splitlines(), {}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.setdefault(node.name, []).append("\n".join(lines[node.lineno - 1 : node.end_lineno]))
    return found


def names_equation(source: str, equation: str) -> bool:
    """A comment `# ...E9...` on a line, or (for what PyTorch computes) `(E9)` in the docstring."""
    number = re.escape(equation) + r"(?!\d)"
    return re.search(rf"#[^\n]*\b{number}", source) is not None or re.search(rf"\({number}\)", source) is not None


def test_every_equation_has_one_row():
    assert sorted(math_rows(), key=lambda name: int(name[1:])) == EQUATIONS


@pytest.mark.parametrize("equation", EQUATIONS)
def test_equation_stands_where_the_page_says(equation):
    places = PLACE.findall(math_rows()[equation])
    assert places, f"{equation}: no `file.py:function` in its row"
    for file, function in places:
        sources = definitions(ROOT / file).get(function, [])
        assert sources, f"{equation}: {file} has no {function}"
        is_named = any(names_equation(source, equation) for source in sources)
        assert is_named, f"{file}:{function} does not name {equation}"
    where = re.split(r"(?<!\\)\|", math_rows()[equation])[-3]  # the last cell but one
    assert PLACE.search(where), f"{equation}: its row names no place before its tests"
    for file, function in PLACE.findall(where):
        if equation != "E13":  # AdamW, which PyTorch computes
            source = "\n".join(definitions(ROOT / file)[function])
            assert re.search(rf"#[^\n]*\b{equation}(?!\d)", source), f"{file}:{function} has no line with # {equation}"


def test_marks_in_the_code_are_numbers_of_the_page():
    for folder in ("data", "model", "train", "eval", "rl"):
        for path in (ROOT / folder).glob("*.py"):
            marks = set(re.findall(r"# (E\d+)\b", path.read_text(encoding="utf-8")))
            assert marks <= set(EQUATIONS), f"{path.name}: {marks - set(EQUATIONS)} not in docs/math.md"


def test_every_equation_names_a_test():
    for equation, row in math_rows().items():
        assert TEST.search(row), f"{equation}: no `tests/file.py::test` in its row"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_named_code_and_tests_exist(document):
    text = document.read_text(encoding="utf-8")
    for file, function in PLACE.findall(text) + TEST.findall(text):
        assert (ROOT / file).is_file(), f"{document.name} names {file}"
        assert function in definitions(ROOT / file), f"{document.name} names {file}:{function}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_local_links_resolve(document):
    text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:", target):
            path, _, anchor = target.partition("#")
            linked = (document.parent / path).resolve() if path else document
            assert linked.exists(), f"{document.name} links to {target}"
            if anchor and linked.suffix == ".md":
                assert anchor in headings(linked), f"{document.name} links to {target}"


def headings(document: Path) -> set[str]:
    """Anchors of a Markdown file as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


# ---------------------------------------------------------------------------------------------------------------------
# Shipped configs

SECTIONS = [("sft", SFTConfig, "one field per difference"), ("ppo", PPOConfig, "one setting per difference")]


def read_shipped(name: str, section: str, config_class: type) -> tuple[SFTConfig | PPOConfig, dict]:
    path = ROOT / "configs" / f"{name}.json"
    config = read_config(config_class, "test", ["--config", str(path)], section=section)
    return config, json.loads(path.read_text(encoding="utf-8"))[section]


@pytest.mark.parametrize(("section", "config_class", "title"), SECTIONS, ids=["sft", "ppo"])
def test_paper_and_released_differ_exactly_where_the_page_says(section, config_class, title):
    (paper, paper_keys), (released, released_keys) = (
        read_shipped(name, section, config_class) for name in ("paper", "released")
    )
    assert paper_keys.keys() == released_keys.keys()
    names = [each.name for each in fields(config_class)]
    differing = {name for name in names if getattr(paper, name) != getattr(released, name)}
    page = (ROOT / "docs/ppo_details.md").read_text(encoding="utf-8")
    table = page.partition(title)[2].partition("\n#")[0]
    assert differing == set(re.findall(r"\| `(\w+)`: `", table))
    for name in differing:
        row = next(line for line in table.splitlines() if f"`{name}`:" in line)
        assert f"`{name}`: `{getattr(paper, name)}` / `{getattr(released, name)}`" in row


@pytest.mark.parametrize(("section", "config_class", "title"), SECTIONS, ids=["sft", "ppo"])
def test_one_gpu_changes_where_things_lie_and_nothing_that_is_learned(section, config_class, title):
    (paper, _), (one_gpu, _) = (read_shipped(name, section, config_class) for name in ("paper", "paper_one_gpu"))
    names = [each.name for each in fields(config_class)]
    assert {name for name in names if getattr(paper, name) != getattr(one_gpu, name)} == {"offload", "reduce_gradients"}


def test_values_of_the_papers_section_on_training():
    paper, _ = read_shipped("paper", "sft", SFTConfig)
    assert (paper.learning_rate, paper.schedule, paper.warmup_ratio) == (1e-6, "cosine", 0.01)
    assert (paper.global_batch_size, paper.epochs, paper.max_key_token_weight) == (4, 1, 9.0)
    paper, _ = read_shipped("paper", "ppo", PPOConfig)
    assert (paper.policy_learning_rate, paper.value_learning_rate) == (2e-6, 1e-6)
    assert (paper.rollout_batch_size, paper.minibatch_size, paper.epochs) == (8, 8, 3)


def test_checkpoints_page_names_every_setting_that_may_change():
    page = (ROOT / "docs/checkpoints.md").read_text(encoding="utf-8").partition("You may change between starts")[2]
    named = set(re.findall(r"`--(\w+)`", page.partition("ends a run early")[0]))
    free = {field.name for config in (SFTConfig, PPOConfig) for field in fields(config) if field.metadata.get("free")}
    assert named == free - {"output", "resume"}
