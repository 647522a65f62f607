"""README, CONTRIBUTING, docs/ and the other pages name files, modules, flags and hashes that exist."""

import hashlib
import re
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest

from data.inspect_loss_weights import main as inspect_loss_weights
from rl.ppo_config import PPOConfig
from run_eval import EvalConfig
from tests.test_import_rules import MAY_IMPORT
from train.sft_config import SFTConfig

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="ascii")
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/*.md"),
        ROOT / "assets/README.md",
        ROOT / "train/cuda/csrc/README.md",
        ROOT / "benchmarks/cuda_kernel_ladder/README.md",
    ]
)
PACKAGES = "benchmarks|data|eval|model|rl|toolbox|train"
SCRIPT_FLAGS = {"run_sft": SFTConfig, "run_ppo": PPOConfig, "run_eval": EvalConfig}
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def commands(text: str) -> list[tuple[str, list[str]]]:
    """(what runs, its flags without dashes) of every `python ...` or `torchrun ...` on one line or continued by \\."""
    lines = text.replace("\\\n", " ").splitlines()
    pattern = re.compile(r"(?:python|torchrun[^#`]*?) (?:-m )?((?:[\w.]+/)*[\w.]+)((?: [^#`;]*)?)")
    found = [(match[1], match[2]) for line in lines for match in pattern.finditer(line)]
    return [(target.removesuffix(".py"), re.findall(r"--(\w+)", rest)) for target, rest in found]


@each_page
def test_named_paths_exist(page):
    text = page.read_text(encoding="ascii")
    folders = f"{PACKAGES}|assets|configs|docs|examples|tests"
    for path in re.findall(rf"[`>]((?:{folders})/[\w./]+\.\w+)(?:[:`\"<]|$)", text, re.MULTILINE):
        assert "NAME" in path or (ROOT / path).exists(), f"{page.name}: {path}"


@each_page
def test_commands_name_modules_and_flags_that_exist(page):
    for target, flags in commands(page.read_text(encoding="ascii")):
        if target in SCRIPT_FLAGS:
            known = {field.name for field in fields(SCRIPT_FLAGS[target])} | {"config", "help"}
            assert not set(flags) - known, f"{page.name}: {target} has no {set(flags) - known}"
        elif re.match(rf"(?:{PACKAGES})[./]", target):
            file = ROOT / (target.replace(".", "/") + ".py")
            assert file.is_file(), f"{page.name}: {target}"
            shared = (
                [path.read_text(encoding="utf-8") for path in (ROOT / "eval").glob("*.py")]
                if target.startswith("eval")
                else []
            )
            source = "".join([file.read_text(encoding="utf-8"), *shared])
            assert all(f'"--{flag}"' in source for flag in flags), f"{page.name}: {target} {flags}"


def test_flags_that_pages_name_exist():
    fields_of_all = {field.name for config in SCRIPT_FLAGS.values() for field in fields(config)}
    sources = [
        path.read_text("utf-8")
        for folder in (*PACKAGES.split("|"), "examples")
        for path in (ROOT / folder).rglob("*.py")
    ]
    parsed = set(re.findall(r"\"--(\w+)\"", "".join(sources)))
    others = {"check", "fresh", "config", "help", "durations", "fix", "case"}
    others |= {"nproc_per_node", "standalone", "nnodes", "rdzv_id", "max_restarts", "shutdown_timeout"}  # of torchrun
    for page in PAGES:
        named = set(re.findall(r"`--(\w+)", page.read_text(encoding="ascii")))
        assert named <= fields_of_all | parsed | others, f"{page.name}: {named - fields_of_all - parsed - others}"


def test_commands_are_found():
    found = dict(commands(README))
    assert {"run_sft", "run_ppo", "run_eval", "data.inspect_loss_weights", "eval.evaluate_rotbench"} <= found.keys()
    assert "endpoint" in found["eval.collect_trajectories"]


def test_the_house_table_is_the_import_rule():
    rows = re.findall(r"^\| `(\w+)/` \|.*\| ([^|]+) \|$", (ROOT / "CONTRIBUTING.md").read_text("ascii"), re.MULTILINE)
    stated = {folder: set(re.findall(r"`(\w+)`", may)) for folder, may in rows if may != "everything"}
    assert stated == {folder: may for folder, may in MAY_IMPORT.items() if folder != "benchmarks"}


def test_the_picture_names_the_file_of_each_stage():
    picture = README.partition("```mermaid\n")[2].partition("```")[0]
    files = re.findall(r"<br>([\w/]+\.py)", picture)
    assert len(files) >= 8 and all((ROOT / file).is_file() for file in files)


def test_the_shown_trajectory_is_what_the_command_prints(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    section = README.partition("## See what is trained\n")[2].partition("The failed call stays")[0]
    command, *shown = [line.strip() for line in section.splitlines() if line.startswith("    ")]
    arguments = command.removeprefix("python -m data.inspect_loss_weights ").split()
    assert inspect_loss_weights([*arguments, "--no_color"]) == 0
    printed = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert len(shown) == 6 and printed[printed.index(shown[0]) :][:6] == shown


def test_all_pages_and_requirement_files_are_in_the_readme():
    for page in ROOT.glob("docs/*.md"):
        assert f"](docs/{page.name})" in README.partition("## All pages")[2], page.name
    for requirements in ROOT.glob("requirements*.txt"):
        assert f"`{requirements.name}`" in README


@pytest.mark.parametrize("page", sorted(ROOT.glob("docs/*.md")), ids=lambda page: page.name)
def test_each_page_begins_with_who_needs_it(page):
    title, blank, first, *_ = page.read_text(encoding="ascii").splitlines()
    assert title.startswith("# ") and not blank and re.match("Read this page (to|before) ", first), first


def test_pytest_markers_that_pages_name_exist():
    markers = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["markers"]
    names = {marker.partition(":")[0] for marker in markers}
    for page in PAGES:
        for expression in re.findall(r"pytest -m \"?((?:not )?\w+)", page.read_text(encoding="ascii")):
            assert expression.removeprefix("not ") in names, f"{page.name}: pytest -m {expression}"


def test_asset_hashes():
    text = (ROOT / "assets" / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w/.]+)` \|.*\| `([0-9a-f]{64})` \|$", text, re.MULTILINE)
    assert {path for path, _ in rows} == {
        "tiny_model/model.safetensors",
        "tiny_model/config.json",
        "tiny_model/tokenizer.model",
        "tiny_data/train.json",
        "tiny_data/test_seen.jsonl",
        "tiny_data/test_unseen.jsonl",
        "tiny_data/test_hard.jsonl",
        "tiny_data/test_alike.jsonl",
        "tiny_data/test_multi.jsonl",
    }
    for path, stated in rows:
        assert hashlib.sha256((ROOT / "assets" / path).read_bytes()).hexdigest() == stated, path


def test_bundled_weights_are_small():
    assert (ROOT / "assets" / "tiny_model" / "model.safetensors").stat().st_size <= 10 * 2**20
