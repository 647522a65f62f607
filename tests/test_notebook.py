"""examples/walkthrough.ipynb has text and numbers of docs/walkthrough.md, and its cells print what is stored."""

import json
import re
from html import unescape
from pathlib import Path

import pytest

from examples import make_notebook

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs/walkthrough.md").read_text(encoding="ascii")
TEXT = (ROOT / "examples/walkthrough.ipynb").read_text(encoding="ascii")
NOTEBOOK = json.loads(TEXT)


def printed(cell: dict) -> str:
    return "".join(output["text"] for output in cell["outputs"] if output["output_type"] == "stream")


def texts(picture: str) -> list[str]:
    return [unescape(each) for each in re.findall(r"<text[^>]*>([^<]*)", picture)]


def section_cells() -> list[tuple[str, dict]]:
    """(text of a section of the page, its code cell)."""
    parts = re.split(r"^(?=## \d)", PAGE, flags=re.MULTILINE)[1:]
    return list(zip(parts, [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"][1:], strict=True))


def figures(text: str) -> list[float]:
    return [float(each) for each in re.findall(r"(?<![\w.])[-+]?\d+(?:\.\d+)?", text)]


def test_text_and_code_are_those_of_the_page_and_the_program():
    """Of the stored notebook only outputs and their counts are not in the new one. A changed page is seen here."""
    emptied = [
        cell | {"execution_count": None, "outputs": []} if cell["cell_type"] == "code" else cell
        for cell in NOTEBOOK["cells"]
    ]
    assert NOTEBOOK | {"cells": emptied} == make_notebook.make_notebook(PAGE)


def test_every_cell_was_run_in_order_without_an_error():
    code = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, 12))
    kinds = [output["output_type"] for cell in code for output in cell["outputs"]]
    assert set(kinds) == {"stream", "display_data"} and "stderr" not in TEXT


def test_no_trace_of_the_machine_or_the_hour():
    assert str(ROOT) not in TEXT and not re.search(r"/(?:tmp|home|root|usr)/|20\d\d-\d\d-\d\d|\"version\"", TEXT)


def test_printed_prompt_and_numbers_are_those_of_the_section():
    """Each figure that a cell prints is in the text of its section, rounded to 3 digits in one of the two."""
    (_, messages), (prompt, prompt_cell), *others = section_cells()
    assert printed(messages).count("ToolCall(") == 3 and printed(prompt_cell).strip() in prompt
    for section, cell in others:
        found, stated = figures(re.sub(r"'[^']*'|\(.*\)", " ", printed(cell))), figures(section.replace("`", " "))
        assert found
        assert [each for each in found if min(abs(each - other) for other in stated) > 6e-4] == [], section[:40]


def test_pictures_are_the_committed_ones():
    shown = [
        "".join(output["data"]["image/svg+xml"])
        for _, cell in section_cells()
        for output in cell["outputs"]
        if output["output_type"] == "display_data"
    ]
    named = re.findall(r"\]\(figures/(\w+\.svg)\)", PAGE)
    files = [(ROOT / "docs/figures" / name).read_text(encoding="ascii") for name in named]
    assert len(shown) == len(files) == 5
    for ours, file in zip(shown, files, strict=True):
        assert texts(ours) == texts(file)


@pytest.mark.slow
def test_cells_print_again_what_is_stored():
    """In a kernel of their own. Numbers with a tolerance, because CPUs round differently."""
    for package in ("nbclient", "nbformat", "ipykernel"):
        pytest.importorskip(package, reason=f"{package} is not installed (requirements-optional.txt)")
    again = make_notebook.run_cells(make_notebook.make_notebook(PAGE))
    pairs = [pair for pair in zip(again["cells"], NOTEBOOK["cells"], strict=True) if pair[1]["cell_type"] == "code"]
    for new, stored in pairs:
        assert figures(printed(new)) == pytest.approx(figures(printed(stored)), abs=2e-3)
        assert re.sub(r"[\d.]+", "", printed(new)) == re.sub(r"[\d.]+", "", printed(stored))
        assert len(new["outputs"]) == len(stored["outputs"])
