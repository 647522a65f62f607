"""The README and the asset page name files that exist, with the line counts and hashes that they have."""

import hashlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "assets" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_paths_exist(page):
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (page.parent / link).exists(), f"{page.name}: link to {link}"
    for path in re.findall(
        r"`((?:model|train|data|rl|eval|tests|benchmarks|examples|assets|configs|docs)/[\w./]+\.\w+)(?:[:`])", text
    ):
        assert (ROOT / path).exists(), f"{page.name}: {path}"


def test_line_counts_of_the_reading_order():
    rows = re.findall(r"^\| `([\w/]+\.py)` \| (\d+) \|", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) == 14
    for path, stated in rows:
        lines = len((ROOT / path).read_text(encoding="utf-8").splitlines())
        assert lines == int(stated), f"README.md: {path} has {lines} lines, stated {stated}"


def test_modules_named_in_commands_exist():
    for page in PAGES:
        for module in re.findall(
            r"python -m ((?:data|train|rl|eval|model|benchmarks)\.\w+)", page.read_text(encoding="utf-8")
        ):
            assert (ROOT / (module.replace(".", "/") + ".py")).exists(), f"{page.name}: {module}"


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
        "tiny_data/test_multi.jsonl",
    }
    for path, stated in rows:
        assert hashlib.sha256((ROOT / "assets" / path).read_bytes()).hexdigest() == stated, path


def test_bundled_weights_are_small():
    assert (ROOT / "assets" / "tiny_model" / "model.safetensors").stat().st_size <= 10 * 2**20
