"""eval/run_page.py: its numbers by another reading, hostile text, missing and damaged files, determinism, access."""

import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean

import pytest

from eval.reports.evaluation_page import choose_records
from eval.reports.page_parts import marked_differences
from eval.reports.run_folders import read_run_folders
from eval.run_page import main, render_page
from svg import DARK, DARK_AREAS, LIGHT, LIGHT_AREAS
from tests.support.eval_runs import flags_of
from tests.support.eval_runs import run_here as run_eval_here
from tests.support.pictures import contrast
from tests.support.run_folders import write_evaluation, write_ppo, write_sft
from tests.support.tiny_ppo import run_ppo_here
from tests.support.tiny_run import run_here as run_sft_here

VOID = {"meta", "rect", "line", "path", "polyline", "polygon", "circle"}


class Page(HTMLParser):
    """What a reader of the page finds: elements with their attributes and texts, tables as rows of cells."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict, list[str]]] = []
        self.open: list[tuple[str, dict, list[str]]] = []
        self.feed(source)
        self.close()
        assert not self.open, f"not closed: {[each[0] for each in self.open]}"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attributes]
        assert len(names) == len(set(names)), f"{tag} has an attribute twice: {names}"
        element = (tag, dict(attributes), [])
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes), []))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1][0] == tag, f"</{tag}> closes {self.open[-1][0] if self.open else 'nothing'}"
        self.open.pop()

    def handle_data(self, text: str) -> None:
        for element in self.open:
            element[2].append(text)

    def all(self, tag: str) -> list[tuple[dict, str]]:
        return [(attributes, "".join(texts)) for name, attributes, texts in self.elements if name == tag]

    def texts(self, tag: str) -> list[str]:
        return [text for _, text in self.all(tag)]

    def tables(self) -> dict[str, list[list[str]]]:
        """Caption -> rows of cells, the head first."""
        found: dict[str, list[list[str]]] = {}
        rows: list[list[str]] = []
        for tag, _, texts in self.elements:
            if tag == "caption":
                rows = found.setdefault("".join(texts), [])
            elif tag == "tr":
                rows.append([])
            elif tag in ("th", "td"):
                rows[-1].append("".join(texts))
        return found


def page_of(*folders: Path) -> Page:
    return Page(render_page(read_run_folders(list(folders))))


@pytest.fixture
def folders(tmp_path) -> list[Path]:
    """SFT, PPO, and the evaluations base and sft of ten records: 3 right, then 9; one of the three is lost."""
    return [
        write_sft(tmp_path / "sft"),
        write_ppo(tmp_path / "ppo"),
        write_evaluation(tmp_path / "base", [1, 1, 1] + [0] * 7),
        write_evaluation(tmp_path / "tuned", [0] + [1] * 9),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


def test_curves_as_numbers_are_those_of_the_file(folders):
    rows = page_of(folders[0]).tables()["Means of up to 4 steps each, of 40 logged"]
    assert rows[0][:2] == ["steps", "Loss, nats"]
    metrics = [json.loads(line) for line in (folders[0] / "metrics.jsonl").read_text().splitlines()]
    for number, row in enumerate(rows[1:]):
        stretch = metrics[4 * number : 4 * number + 4]
        assert row[0] == f"{stretch[0]['step']} to {stretch[-1]['step']}"
        assert float(row[1]) == pytest.approx(fmean(each["sft/loss"] for each in stretch), rel=1e-3)
    assert [row[1] for row in rows[1:3]] == ["2.875", "2.675"] and rows[1][2:] == ["0.0004", "2", "1,500"]


def test_settings_and_data_report(folders):
    tables = page_of(folders[0]).tables()
    assert tables["Settings that differ from their defaults"][1:] == [
        ["max_steps", "40", "0"],
        ["data", "x", "train.json"],
    ]
    assert ["learning_rate", "0.0004"] in tables["All 4 settings"]
    assert tables["Settings changed on the way (--override)"][1:] == [["learning_rate", "20", "0.001", "x"]]
    assert tables["What the run read"][1:] == [["trajectories", "1,217"]]
    assert tables["Assistant turns masked because their call failed (MAE)"][1:] == [["x", "x", "12"]]
    assert tables["First masked turns of each rule"][1:] == [["x", "3", "x", "x", "x", "x"]]


def test_a_short_run_shows_each_step(tmp_path):
    rows = page_of(write_sft(tmp_path / "sft", n_steps=3)).tables()["Every logged step"]
    assert [row[:2] for row in rows] == [["steps", "Loss, nats"], ["1", "2.95"], ["2", "2.9"], ["3", "2.85"]]


def test_an_evaluation_has_no_errors_of_a_benchmark_that_it_lacks(tmp_path):
    one = write_evaluation(tmp_path / "one", [1, 0])
    other = write_evaluation(tmp_path / "other", [0, 0], benchmark="tiny-unseen")
    assert page_of(one, other).tables()["Records or calls by error"][1:] == [
        ["tiny-seen", "x", "1 (50.0 %)", "-"],
        ["tiny-unseen", "x", "-", "2 (100.0 %)"],
    ]


def test_rates_and_paired_differences_by_hand(folders):
    tables = page_of(*folders[2:]).tables()
    rates = tables["Rates of all evaluations"]
    assert rates[0] == ["benchmark", "metric", "base, % [95 %]", "tuned, % [95 %]"]
    # Wilson: (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n) at 3 and 9 of 10
    assert rates[3] == ["tiny-seen", "right calls (CF)", "30.0 [10.8, 60.3], n = 10", "90.0 [59.6, 98.2], n = 10"]
    pairs = tables["Paired differences"]
    # 7 won, 1 lost: p = 2 (C(8, 0) + C(8, 1)) / 2^8 = 18 / 256
    assert pairs[3] == ["tiny-seen: tuned against base", "right calls (CF)", "10", "+60.0", "7", "1", "0.07"]
    assert tables["Records or calls by error"][1:] == [["tiny-seen", "x", "7 (70.0 %)", "1 (10.0 %)"]]


def test_summary_says_what_happened_in_words(folders):
    words = page_of(*folders).texts("p")
    assert "This page shows 2 training runs and 2 evaluations." in words
    assert (
        "sft is an SFT run, finished, 40 of 40 optimizer steps. The training loss fell from 2.925 to 1.025 nats (means "
        "of the first and the last 2 of 40 steps). Lower is better." in words
    )
    [ppo] = [each for each in words if each.startswith("ppo is a PPO run, not finished, 40 of 459 optimizer steps.")]
    assert "Up to step 10 it trains the critic alone" in ppo and "the intervals overlap, so this shows no change" in ppo
    assert (
        "was -0.50 [-2.20, 1.20] in the first 2 of 40 iterations (n = 4 responses)" in ppo
    )  # sd 3 / sqrt 3, over sqrt 4
    [scores] = [each for each in words if each.startswith("tiny-seen, right calls (CF): ")]
    assert scores == (
        "tiny-seen, right calls (CF): base 3 of 10 (30.0 %), tuned 9 of 10 (90.0 %). Between tuned and base there is "
        "no clear difference (7 won, 1 lost, p 0.07)."
    )


def test_charts_of_ppo(folders):
    page = page_of(folders[1])
    titles = page.texts("title")[1:]
    assert titles[:3] == ["Reward of a response, before KL", "Categories of the responses", "KL to the reference"]
    reward, categories, kl = page.texts("desc")[:3]
    assert "Up to step 10 only the critic is trained." in reward and "held-out, greedy: 0.5 at step 0." in reward
    assert categories.endswith("unparsable 0.25 then 0.25, wrong tool 0.25 then 0.25, correct 0.50 then 0.50.")
    assert kl.startswith("Means of 2 iterations, nats per response: 0.05 up to step 2, 3.85 up to step 40;")
    assert page.texts("h4")[0] == "Step 1: unparsable, reward -2.00, KL 0.50 nats"


def test_prompts_are_side_by_side_with_the_differing_words_marked(folders):
    page = page_of(*folders[2:])
    assert page.texts("h5") == [f"tiny-seen, record {index}" for index in (0, 1, 2, 3, 4)]
    assert page.texts("dt")[:2] == ["base: right", "tuned: wrong, wrong tool"]
    assert page.texts("pre")[:2] == ["call(a=1, x)", "call(a=0, x)"] and page.texts("mark")[:2] == ["1", "0"]
    first = json.loads((Path(__file__).resolve().parents[2] / "assets/tiny_data/test_seen.jsonl").open().readline())
    assert f"Asked: {first['messages'][-1]['content']}" in page.texts("p")
    assert any(words.startswith(f"Right: {first['gold'][0]['calls'][0]['name']}(") for words in page.texts("p"))


def test_records_on_which_evaluations_differ_come_first(folders):
    evaluations = read_run_folders(folders[2:])
    assert choose_records(evaluations, "tiny-seen", range(10)) == [0, 1, 2, 3, 4]
    for folder, right in zip(evaluations, ((1, 0, 1, 0, 1, 0, 0, 0, 0, 0), (1, 0, 1, 0, 0, 1, 1, 1, 1, 1))):
        folder.results["tiny-seen"] = {i: {"CF": value} for i, value in enumerate(right)}
    # both right 0 2, both wrong 1 3, lost 4, won 5 to 9: one of each, then a second one of a change
    assert choose_records(evaluations, "tiny-seen", range(10)) == [0, 1, 4, 5, 6]


def test_marks_by_hand():
    assert marked_differences("f(a=1)", "f(b=1)") == "f(<mark>a</mark>=1)"
    assert marked_differences("same <b>", "same <b>") == "same &lt;b&gt;"
    assert marked_differences("one two", "one") == "one<mark> two</mark>"


def test_a_run_that_went_on_after_its_end_is_not_finished(folders):
    with open(folders[0] / "metrics.jsonl", "a") as file:
        file.write('{"step": 41, "sft/loss": 1.0}\n')
    assert page_of(folders[0]).texts("h2")[1] == "sft: SFT run, not finished, 41 of 40 optimizer steps"


def test_held_out_evaluations_of_sft_are_curves(folders):
    rows = [
        {"step": step, "held_out/loss": 3.0 - step, "held_out/right_calls": step, "held_out/calls": 20}
        for step in (0, 1)
    ]
    (folders[0] / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = page_of(folders[0])
    assert page.texts("title")[-2:] == ["Loss on held-out data", "Right greedy calls on held-out data"]
    assert page.texts("desc")[-1].startswith("Values, of 20: 0 up to step 0, 1 up to step 1;")
    assert "Right greedy calls on held-out data, of 20" in page.texts("text")


@pytest.mark.slow
def test_folders_of_real_runs_lack_nothing(tmp_path):
    """The folders of the other tests are written by hand; these are not."""
    assert run_sft_here(tmp_path / "sft", max_steps=2)[0] == 0
    assert run_ppo_here(tmp_path / "ppo", max_steps=2)[0] == 0
    assert run_eval_here(flags_of("assets/tiny_data", tmp_path / "eval", limit=2))[0] == 0
    page = page_of(tmp_path / "sft", tmp_path / "ppo", tmp_path / "eval")
    assert problems_of(page) == []
    sft, ppo, evaluations = page.texts("h2")[1:]
    assert sft.startswith("sft: SFT run, finished, 2 of ") and ppo.startswith("ppo: PPO run, finished, ")
    assert evaluations == "Evaluations" and len(page.all("figure")) == 4 + 12 + 3
    assert len(page.texts("h5")) == 2 and any(words.startswith("Asked: ") for words in page.texts("p"))


# ---------------------------------------------------------------------------------------------------------------------
# Hostile text


HOSTILE = "</pre></title><script>alert(1)</script><img src=x onerror=alert(1)>'\"&amp;\u202e\x1b[2J\x00"


def test_only_a_page_is_replaced(tmp_path, capsys):
    run, page = write_sft(tmp_path / "sft"), tmp_path / "page.html"
    metrics = (run / "metrics.jsonl").read_bytes()
    assert main([str(run), "--html", str(run / "metrics.jsonl")]) == 2
    assert "found no HTML page" in capsys.readouterr().err
    assert (run / "metrics.jsonl").read_bytes() == metrics
    os.mkfifo(tmp_path / "pipe")
    for odd in (tmp_path, tmp_path / "pipe", Path("/dev/zero")):
        assert main([str(run), "--html", str(odd)]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and "found no HTML page" in err
    page.touch()
    for _ in range(2):
        assert main([str(run), "--html", str(page)]) == 0 and page.read_text().startswith("<!DOCTYPE html>")


def test_hostile_text_is_text(tmp_path):
    names = ["<script>alert(1)</script>".replace("/", "_"), "b"]
    paths = [
        write_sft(tmp_path / "s", word=HOSTILE),
        write_ppo(tmp_path / "p", word=HOSTILE),
        write_evaluation(tmp_path / names[0], [1, 0], word=HOSTILE),
        write_evaluation(tmp_path / names[1], [0, 1], word=HOSTILE),
    ]
    source = render_page(read_run_folders(paths))
    page = Page(source)
    plain = render_page(read_run_folders([write_sft(tmp_path / "q" / "s"), write_ppo(tmp_path / "q" / "p")]))
    harmless = {tag for tag, *_ in Page(plain).elements} | {"dl", "dt", "dd", "h5", "pre", "mark"}
    assert {tag for tag, *_ in page.elements} <= harmless and "script" not in harmless and "img" not in harmless
    attributes = {name for _, each, _ in page.elements for name in each}
    assert not [name for name in attributes if name.startswith("on") or name in ("src", "action", "xlink:href")]
    assert all(each.get("href", "#").startswith("#") for _, each, _ in page.elements)
    assert all(character.isprintable() or character == "\n" for character in source)
    shown = "".join(each if each.isprintable() else ascii(each)[1:-1] for each in HOSTILE)
    texts = [text for tag in ("td", "th", "p", "pre", "li") for text in page.texts(tag)]
    assert sum(shown in text for text in texts) > 20
    assert "http" not in source.replace("http-equiv", "") and "default-src 'none'" in source


def test_a_benchmark_may_have_any_name(tmp_path):
    path = write_evaluation(tmp_path / "run", [1, 0], benchmark="<b>&")
    page = page_of(path)
    assert page.tables()["Rates of all evaluations"][1][0] == "<b>&" and not page.all("b")


# ---------------------------------------------------------------------------------------------------------------------
# What is missing or damaged


def problems_of(page: Page) -> list[str]:
    return [text for attributes, text in page.all("ul") if attributes.get("class") == "problems"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("metrics.jsonl", None, "metrics.jsonl: found no such file; the run made no step"),
        ("metrics.jsonl", "", "metrics.jsonl: found no step; the run ended before its first one"),
        ("metrics.jsonl", '{"step": 1, "sft/loss": 2.5}\n{"step": 2, "sft/lo', "the last line is torn"),
        (
            "metrics.jsonl",
            'null\n{"step": 1, "sft/loss": 2.5}\n',
            "1 damaged lines are left out; the first: metrics.jsonl:1",
        ),
        ("config.json", "{", "config.json: found the end at column 2, expected JSON"),
        ("environment.json", "[]", "environment.json: found a list, expected one JSON object"),
        ("run_identity.json", None, "run_identity.json: found No such file or directory"),
        ("data_report.json", "\x00", "data_report.json: found "),
    ],
)
def test_damaged_training_folders_are_described(tmp_path, name, content, words):
    folder = write_sft(tmp_path / "sft")
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    page = page_of(folder)
    assert any(words in each for each in problems_of(page)), problems_of(page)
    assert any("1 file is missing or damaged" in each for each in page.texts("p"))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("summary.json", None, "summary.json: found No such file or directory"),
        ("summary.json", '{"benchmarks": {"tiny-seen": {}}}', "summary.json: found other contents"),
        ("results/tiny-seen.jsonl", '{"index": 0}\n', "results/tiny-seen.jsonl:1: found another row"),
        ("predictions/tiny-seen.jsonl", None, "predictions/tiny-seen.jsonl: found no such file"),
        ("predictions/tiny-seen.jsonl", '{"index": 0, "output": "f()"}\n{"index', "the last line is torn"),
    ],
)
def test_damaged_evaluation_folders_are_described(tmp_path, name, content, words):
    folder = write_evaluation(tmp_path / "base", [1, 0])
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    page = page_of(folder, write_evaluation(tmp_path / "other", [1, 1]))
    assert any(words in each for each in problems_of(page)), problems_of(page)


def test_runs_of_other_records_are_not_paired(tmp_path):
    words = "No two evaluations scored the same records, so there are no paired differences."
    folders = [write_evaluation(tmp_path / "a", [1, 0]), write_evaluation(tmp_path / "b", [1, 0, 1])]
    assert words in page_of(*folders).texts("p")
    folders[1] = write_evaluation(tmp_path / "c", [0, 1])
    assert words not in page_of(*folders).texts("p")
    summary = (folders[1] / "summary.json").read_text()
    (folders[1] / "summary.json").write_text(re.sub(r'("answers_sha256": ")', r"\g<1>0", summary))
    assert words in page_of(*folders).texts("p")


def test_a_changed_benchmark_file_is_not_shown(tmp_path):
    folder = write_evaluation(tmp_path / "a", [1, 0])
    summary = json.loads((folder / "summary.json").read_text())
    summary["benchmarks"]["tiny-seen"]["answers_sha256"] = "0"
    (folder / "summary.json").write_text(json.dumps(summary))
    page = page_of(folder)
    assert any("The benchmark's file is missing or was changed since" in each for each in page.texts("p"))
    assert not any(each.startswith("Asked: ") for each in page.texts("p"))


def test_a_folder_that_is_no_run_is_one_line(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for path, found in ((tmp_path / "empty", "no run"), (tmp_path / "none", "no folder")):
        assert main([str(path), "--html", str(tmp_path / "page.html")]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and err.startswith(f"{path}: found {found}, expected ")
    assert not (tmp_path / "page.html").exists()


def replaced(value: object, by: object) -> list[object]:
    """Copies of a JSON value, each with one of its parts replaced."""
    copies = [by]
    if isinstance(value, dict):
        copies += [{**value, key: copy} for key, part in value.items() for copy in replaced(part, by)]
    if isinstance(value, list):
        copies += [[*value[:i], copy, *value[i + 1 :]] for i, part in enumerate(value) for copy in replaced(part, by)]
    return copies


@pytest.mark.slow
@pytest.mark.parametrize("by", [None, [], {}, "x", -1, 1e14], ids=ascii)
def test_no_value_of_any_file_ends_the_program(tmp_path, by, monkeypatch):
    monkeypatch.setattr("eval.reports.run_folders.BENCHMARKS", {})  # reading the benchmark's file takes longest
    for folder in (
        write_sft(tmp_path / "sft", n_steps=3),
        write_ppo(tmp_path / "ppo", n_steps=3),
        write_evaluation(tmp_path / "base", [1, 0]),
    ):
        other = [write_evaluation(tmp_path / "other", [1, 0])] if folder.name == "base" else []
        for path in sorted(path for path in folder.rglob("*.json*") if path.parent.name != "final"):
            content = path.read_text()
            lines = content.splitlines()
            for copy in replaced(json.loads(lines[0]), by):
                path.write_text("\n".join([json.dumps(copy), *lines[1:]]))
                render_page(read_run_folders([*other, folder, *other]))
            path.write_text(content)


# ---------------------------------------------------------------------------------------------------------------------
# The page


def test_same_folders_give_the_same_bytes(folders, tmp_path, capsys):
    for name in ("a.html", "b.html"):
        assert main([*map(str, folders), "--html", str(tmp_path / name)]) == 0
        assert capsys.readouterr().out == f"page: {tmp_path / name}\n"
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_the_page_is_accessible(folders):
    page = page_of(*folders)
    levels = [int(tag[1]) for tag, *_ in page.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:])), levels
    ids = [each["id"] for _, each, _ in page.elements if "id" in each]
    assert len(ids) == len(set(ids))
    [(html, _)] = page.all("html")
    assert html["lang"] == "en"
    links = [each["href"] for each, _ in page.all("a")]
    assert links[0] == "#main" and all(link[1:] in ids for link in links)
    for attributes, _ in page.all("svg"):
        if attributes.get("aria-hidden") != "true":
            assert attributes["role"] == "img" and set(attributes["aria-labelledby"].split()) <= set(ids)
    assert all(page.texts("title")) and all(page.texts("desc")) and len(page.texts("desc")) == len(page.all("figure"))
    assert all(each.get("scope") in ("col", "row") for each, _ in page.all("th"))
    assert len(page.all("table")) == len(page.all("caption")) and all(page.texts("caption"))
    for tag, attributes, _ in page.elements:
        if attributes.get("role") == "region":
            assert attributes["aria-label"] and attributes["tabindex"] == "0", tag
        for name in ("aria-labelledby", "aria-label"):
            assert attributes.get(name) != ""
    assert not page.all("script") and not page.all("link")


@pytest.mark.parametrize(("colors", "tints"), [(LIGHT, LIGHT_AREAS), (DARK, DARK_AREAS)], ids=["light", "dark"])
def test_contrast_of_both_schemes(folders, colors, tints):
    """Text: ink and faint on the page, links, marked words. The focus ring and the bar of problems are no text."""
    source = render_page(read_run_folders(folders[:1]))
    assert all(f"--{name}: {colors[name]};" in source for name in ("page", "ink", "faint", "a", "b", "rule"))
    assert f"--mark: {tints[3]};" in source and "mark { background: var(--mark); color: var(--ink);" in source
    for text, background in ((colors["ink"], colors["page"]), (colors["faint"], colors["page"])):
        assert contrast(text, background) >= 4.5
    assert contrast(colors["a"], colors["page"]) >= 4.5 and contrast(colors["ink"], tints[3]) >= 4.5
    assert contrast(colors["b"], colors["page"]) >= 3


def test_names_tell_folders_apart(tmp_path):
    for parent in "ab":
        write_sft(tmp_path / parent / "sft")
    paths = [tmp_path / "a" / "sft", tmp_path / "b" / "sft"]
    assert [folder.name for folder in read_run_folders(paths)] == ["a/sft", "b/sft"]
    assert [folder.name for folder in read_run_folders([paths[0]] * 2)] == ["sft (1)", "sft (2)"]
