"""Reports, the paper's tables, comparison of runs and of prediction files, plots."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from data.json_records import DataError, write_json_lines
from eval.rates import summarize_results
from eval.reports.compare import main as compare_main
from eval.reports.paper_tables import read_published, unattainable_cells
from eval.reports.plots import figure4_bars, figure5_bars, group_bars, write_plots
from eval.reports.plots import main as plots_main
from eval.reports.report import format_comparison, format_report, metrics_of, unattainable_rates
from printable import markdown_text
from tests.support.pictures import SVG
from tests.support.rotbench_records import react, rotbench_record

pytestmark = pytest.mark.slow  # the file as a whole takes several seconds


def rows_of(levels):
    """One row per level 0 to 3: TS, PI, CF right up to it."""
    return [
        {
            "index": i,
            "TS": int(level > 0),
            "PI": int(level > 1),
            "CF": int(level > 2),
            "reason": "" if level == 3 else "wrong tool: x",
        }
        for i, level in enumerate(levels)
    ]


def general(metric, count, n, **more):
    return {
        "n": n,
        metric: count,
        f"{metric}_percent": round(100 * count / n, 2),
        f"{metric}_interval_95": [0.0, 100.0],
        "errors": {},
        "answers_sha256": "",
        **more,
    }


def run_of(**summaries):
    return {
        "model": "m",
        "predictions": None,
        "prompt_format": "tl",
        "benchmarks": {
            name.replace("_", "-"): {"answers_sha256": "", **summary} for name, summary in summaries.items()
        },
    }


def write_run(folder, run, results):
    for name, rows in results.items():
        write_json_lines(folder / "results" / f"{name}.jsonl", rows)
    (folder / "summary.json").write_text(json.dumps(run))
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# Report


def test_published_rows_as_printed():
    published = read_published()
    assert [len(published[table]) for table in ("table1", "table3", "table4", "table5")] == [7, 10, 9, 8]
    last = published["table3"][-1]
    assert (last["model"], last["toolalpaca"]) == ("TL-CodeLLaMA-2", [87.72, 78.07, 57.89])
    # The tables' own "Avg." rows are the means of the rows above, to rounding: a slip of the pen here would show.
    for table in ("table3", "table4"):
        for benchmark, means in published[f"{table}_average"].items():
            if benchmark not in ("model", "size"):
                columns = zip(*(row[benchmark] for row in published[table]))
                assert means == pytest.approx([sum(column) / len(published[table]) for column in columns], abs=0.0051)
    full = published["table5"][-1]
    assert full["toolalpaca"] == last["toolalpaca"] and full["tooleyes"] == published["table4"][-1]["tooleyes"]


def test_unattainable_cells_are_the_six_of_the_page():
    assert [(table, cell, percent) for table, _, cell, percent in unattainable_cells()] == [
        ("table3", "toolalpaca TS", 75.56),
        ("table4", "tooleyes VA", 43.45),
        ("table5", "tooleyes VA", 59.32),
        ("table5", "toolalpaca CF", 43.68),
        ("table5", "toolalpaca TS", 77.78),
        ("table5", "toolalpaca PI", 71.72),
    ]


def test_report_has_the_papers_tables_where_data_allow():
    summary = summarize_results(rows_of([3] * 34 + [2] * 6 + [1] * 13 + [0] * 52))
    report = format_report(run_of(rotbench_clean=summary, gsm8k=general("exact_match", 1, 8, primary="exact_match")))
    lines = report.splitlines()
    assert any(line.startswith("| rotbench-clean | 105 | 50.5 [41.1, 59.9] |") for line in lines)
    assert "| gsm8k     | exact_match (primary) | 8 | 12.5 [0.0, 100.0] |" in lines
    assert "## Table 3: single-turn" in lines and "## Table 5: ablation" in lines and "Table 4" not in report
    assert any(
        line.split() == ["|", "TL-CodeLLaMA-2", "7B", "|", "83.81", "|", "54.29", "|", "42.86", "|"] for line in lines
    )
    ours = ["|", "this", "run", "|", "50.48", "|", "38.10", "|", "32.38", "|"]
    assert sum(line.split() == ours for line in lines) == 2
    assert "not comparable" not in report and "toolalpaca" not in report and "Warnings" not in report


def test_report_of_part_of_a_benchmark_and_variants():
    summary = summarize_results(rows_of([3, 0]))
    rates = {key: value for key, value in summary.items() if key != "errors"}
    report = format_report(
        run_of(toolalpaca={**summary, "primary": "first_call", "variants": {"first_call": rates, "any_call": rates}})
    )
    assert "toolalpaca: 2 of 114 records were run; not comparable." in report
    assert "| toolalpaca | first_call (primary) | 2 |" in report
    assert "| toolalpaca | any_call             | 2 |" in report
    assert "75.56?" in report and "?: no whole number of records gives this percentage." in report


def test_first_call_is_shown_below_the_papers_rows_for_formats_of_one_call():
    """90 of 240 records want several calls, so 150 of 240 is the most that one call per turn can get by order_free."""
    summary = summarize_results(rows_of([3] * 150 + [0] * 90)) | {"primary": "order_free"}
    first = summarize_results(rows_of([3] * 212 + [2] * 13 + [1] * 6 + [0] * 9))  # TL-CodeLLaMA-2's row of Table 3
    del first["errors"]
    tables = {}
    for one_call in (True, False):
        bfcl = {**summary, "one_call_per_turn": one_call, "variants": {"order_free": summary, "first_call": first}}
        tables[one_call] = format_report(run_of(bfcl_exec=bfcl, rotbench_clean=summarize_results(rows_of([3] * 105))))
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in tables[True].splitlines() if "|" in line]
    paper = next(row for row in cells if row[0] == "TL-CodeLLaMA-2 7B")
    ours = cells[cells.index(paper) + 1 : cells.index(paper) + 3]
    assert paper[4:] == ["96.25", "93.75", "88.33"]
    assert ours[0] == ["this run", "100.00", "100.00", "100.00", "62.50", "62.50", "62.50"]
    assert ours[1] == ["this run, first_call of bfcl-exec", "-", "-", "-", "96.25", "93.75", "88.33"]
    assert "bfcl-exec: the outputs hold one call per turn" in tables[True]
    assert "first_call of" not in tables[False] and "one call per turn" not in tables[False]


def test_percentages_that_cannot_be_are_warned_of():
    summary = summarize_results(rows_of([3, 0, 0]))
    assert unattainable_rates(summary) == [] and metrics_of(summary) == ["TS", "PI", "CF"]
    report = format_report(run_of(tiny_seen={**summary, "CF_percent": 43.0}))
    assert "* tiny-seen CF: found 43.0 %, expected 1 of 3" in report


# ---------------------------------------------------------------------------------------------------------------------
# Comparison


@pytest.fixture
def two_runs(tmp_path):
    folders = []
    for name, levels in (("a", [3, 0, 0, 0, 0, 0, 0, 1]), ("b", [0, 3, 3, 3, 3, 3, 0, 1])):
        rows = rows_of(levels)
        folders.append(write_run(tmp_path / name, run_of(tiny_seen=summarize_results(rows)), {"tiny-seen": rows}))
    return folders


def test_comparison_with_mcnemar(two_runs, capsys):
    assert compare_main([*map(str, two_runs), "--mcnemar"]) == 0
    captured = capsys.readouterr()
    assert captured.err == "" and captured.out.count("p 0.22 (1 lost, 5 won)") == 3  # 14/64
    assert compare_main([str(run) for run in two_runs]) == 0
    assert "McNemar" not in capsys.readouterr().out


def test_examples_are_calls_that_the_last_run_alone_has_right(two_runs, capsys):
    """The first run has record 0 right, the second records 1 to 5; with two of five, every second one is shown."""
    for run in two_runs:
        (run / "predictions").mkdir()
        lines = [json.dumps({"index": index, "output": f" {run.name}{index}\x1b()"}) for index in range(8)]
        (run / "predictions/tiny-seen.jsonl").write_text("\n".join(lines) + "\n")
    assert compare_main([*map(str, two_runs), "--examples", "2"]) == 0
    table, *examples = capsys.readouterr().out.split("\ntiny-seen, record 1\n")
    assert "McNemar" not in table and len(examples) == 1
    lines = examples[0].splitlines()
    assert [line.split(",")[0] for line in lines] == [
        r"  a: 'a1\x1b()'",
        r"  b: 'b1\x1b()'",
        "tiny-seen",
        r"  a: 'a3\x1b()'",
        r"  b: 'b3\x1b()'",
    ]
    assert compare_main([*map(str, two_runs[::-1]), "--examples", "5"]) == 0
    assert capsys.readouterr().out.count("tiny-seen, record") == 1
    (two_runs[0] / "predictions/tiny-seen.jsonl").unlink()
    assert compare_main([*map(str, two_runs), "--examples", "1"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(SystemExit, match="2"):
        compare_main([*map(str, two_runs), "--examples", "-1"])


def test_comparison_warns_and_refuses(two_runs, capsys):
    path = two_runs[1] / "summary.json"
    path.write_text(path.read_text().replace('"CF_percent": 62.5', '"CF_percent": 62.4'))
    assert compare_main([str(run) for run in two_runs]) == 0
    assert capsys.readouterr().err == "b: tiny-seen CF: found 62.4 %, expected 5 of 8\n"
    results = two_runs[1] / "results/tiny-seen.jsonl"
    for text, expected in (
        ("", "found 0 rows, expected 8"),
        ('{"index": 0, "TS": 2}\n', ":1: found another row"),
        ("[]", ":1: found a list"),
    ):
        results.write_text(text)
        assert compare_main([*map(str, two_runs), "--mcnemar"]) == 2
        assert expected in capsys.readouterr().err
    for summary in ({}, {"n": 0}, {"n": 1, "TS": "1"}, {"n": 1, "TS": 1, "TS_percent": "x", "TS_interval_95": [0, 1]}):
        path.write_text(json.dumps({"benchmarks": {"tiny-seen": {"answers_sha256": "", **summary}}}))
        assert compare_main([str(run) for run in two_runs]) == 2
        assert "found other contents" in capsys.readouterr().err


def test_a_summary_that_is_no_json_object_of_ours_is_one_line(two_runs, capsys):
    path = two_runs[1] / "summary.json"
    whole = path.read_text()
    for text, words in (
        (whole.replace('"CF_percent": 62.5', '"CF_percent": NaN'), "found NaN"),
        (whole.replace('"CF_percent": 62.5', '"CF_percent": 1e999'), "found other contents"),
        (whole.replace("{", '{"benchmarks": {}, ', 1), "twice in one object"),
        (whole.replace("{", '{"dtype": ["float32"], ', 1), "found other contents"),
        (whole.replace('"answers_sha256": "', '"answers_sha256": 1, "other": "', 1), "found other contents"),
        ("[]", "found a list"),
        ("", "expected JSON"),
    ):
        path.write_text(text)
        assert text != whole and compare_main([str(run) for run in two_runs]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and words in error, error


def test_results_that_contradict_the_summary_are_refused(two_runs, capsys):
    results = two_runs[1] / "results/tiny-seen.jsonl"
    whole = results.read_text()
    for text, words in (
        (whole.replace('"CF": 0', '"CF": 1', 1), "found 6 rows with CF, expected 5 as in summary.json"),
        (whole.replace('"CF": 0', '"CF": false', 1), ":1: found another row"),
    ):
        results.write_text(text)
        assert compare_main([*map(str, two_runs), "--mcnemar"]) == 2 and words in capsys.readouterr().err


def test_runs_of_one_name_are_told_apart_and_no_example_is_said(two_runs, capsys, monkeypatch):
    monkeypatch.chdir(two_runs[0].parent)
    two_runs[0].rename("eval")
    Path("other").mkdir()
    two_runs[1].rename("other/eval")
    assert compare_main(["eval", "other/eval"]) == 0
    assert "| other/eval vs eval |" in capsys.readouterr().out
    assert compare_main(["eval", "eval", "--examples", "1", "--names", "x,y"]) == 0
    assert capsys.readouterr().out.endswith("\nno call that y has right and x wrong\n")


def test_paired_rows_must_be_the_same_records():
    runs = [run_of(tiny_seen=summarize_results(rows_of([3, 0])))] * 2
    results = [{"tiny-seen": {0: {"TS": 1}, 1: {"TS": 0}}}, {"tiny-seen": {0: {"TS": 1}, 2: {"TS": 0}}}]
    with pytest.raises(DataError, match="b: found results of other tiny-seen records"):
        format_comparison(["a", "b"], runs, results)


def test_prediction_files_are_compared(tmp_path, capsys):
    answers = tmp_path / "clean.json"
    gold = react("get_weather", {"city": "Oslo"})
    answers.write_text(json.dumps([rotbench_record([gold])] * 105))
    for name, right in (("a", range(60)), ("b", range(50, 105))):
        (tmp_path / name).write_text(
            json.dumps([{"conversations": [{"value": gold if i in right else "no"}]} for i in range(105)])
        )
    assert compare_main(["--answers", str(answers), str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    out = capsys.readouterr().out
    assert out.count("(50 lost, 45 won)") == 3 and "| rotbench-clean | 105 | TS     |" in out
    assert compare_main(["--answers", str(answers), str(tmp_path / "none")]) == 2


# ---------------------------------------------------------------------------------------------------------------------
# Dialogues


def dialogue_summary(n, n_calls, de, ce, va, *, de_dialogues=None, **more):
    """Counts in the shape of the dialogue metrics, intervals as wide as a point on each side."""
    summary = {"n": n, "n_calls": n_calls}
    for metric, count, of in (
        ("DE", de, n_calls),
        ("CE", ce, n_calls),
        ("VA", va, n),
        ("DE_dialogues", min(de, n) if de_dialogues is None else de_dialogues, n),
    ):
        percent = round(100 * count / of, 2)
        summary |= {
            metric: count,
            f"{metric}_percent": percent,
            f"{metric}_interval_95": [max(percent - 1, 0.0), min(percent + 1, 100.0)],
        }
    return {**summary, **more}


def test_report_of_dialogues_says_what_is_of_calls_and_who_answered():
    part = dialogue_summary(2, 4, 1, 0, 2)
    report = format_report(
        run_of(
            tooleyes=dialogue_summary(
                382, 1000, 10, 50, 191, executors={"local": 250, "simulated": 750}, by_scenario={"TG": part}
            )
        )
    )
    lines = report.splitlines()
    assert "| tooleyes  | 382       | 1000  | 1.0 [0.0, 2.0] | 5.0 [4.0, 6.0] | 50.0 [49.0, 51.0] |" in lines
    assert "| tooleyes  | DE_dialogues | lower  | 382       | 2.6 [1.6, 3.6] |" in lines
    assert (
        "| tooleyes  | TG       | 2         | 4     | 25.0 [24.0, 26.0] | 0.0 [0.0, 1.0] | 100.0 [99.0, 100.0] |"
        in lines
    )
    assert "| tooleyes  | local     | 250   | 25.0 |" in lines and "| tooleyes  | simulated | 750   | 75.0 |" in lines
    assert "is not that of the real tool" in report and "## Table 4: multi-turn" in lines
    assert any(line.split() == ["|", "TL-CodeLLaMA-2", "|", "0.82", "|", "4.84", "|", "77.75", "|"] for line in lines)
    assert any(line.split() == ["|", "this", "run", "|", "1.00", "|", "5.00", "|", "50.00", "|"] for line in lines)
    assert "750 of its 1000 calls were answered by the simulated executor" in report and "Warnings" not in report


def test_shares_of_calls_are_checked_against_the_calls():
    summary = dialogue_summary(10, 30, 1, 2, 5)
    assert unattainable_rates(summary) == []
    assert unattainable_rates({**summary, "DE_percent": 10.0}) == ["DE: found 10.0 %, expected 1 of 30"]  # 1 of the n
    silent = {**summary, "n_calls": 0, "DE": 0, "CE": 0, "DE_percent": 0.0, "CE_percent": 0.0}
    assert unattainable_rates(silent) == []
    rows = [line.split() for line in format_report(run_of(tiny_multi=silent)).splitlines()]
    assert "| tiny-multi | 10 | 0 | - | - | 50.0 [49.0, 51.0] |".split() in rows
    paper = [line.split() for line in format_report(run_of(tooleyes=silent)).splitlines() if "this run" in line]
    assert ["|", "this", "run", "|", "-", "|", "-", "|", "50.00", "|"] in paper
    table = format_comparison(["a", "b"], [run_of(tiny_multi=silent), run_of(tiny_multi=summary)]).splitlines()
    assert [cell.strip() for cell in table[2].split("|")[3:7]] == ["DE, lower is better", "-", "3.3 [2.3, 4.3]", "-"]


def test_prompts_that_do_not_fit_are_counted():
    calls = summarize_results(
        [*rows_of([3, 3, 0]), {**rows_of([0])[0], "reason": "no output: the prompt does not fit"}]
    )
    report = format_report(
        run_of(tiny_seen=calls, tiny_multi=dialogue_summary(8, 4, 0, 0, 2, ends={"prompt_too_long": 2}))
    )
    table, note = report.partition("## Prompts that do not fit\n")[2].split("\n\n")[:2]
    table = table.strip().splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table]
    assert cells[2:] == [["tiny-seen", "1", "25.0"], ["tiny-multi", "2", "25.0"]]
    assert "a dialogue ends there" in note and "model's context" not in report  # its earlier turns have outputs
    assert "do not fit" not in format_report(run_of(tiny_seen=summarize_results(rows_of([3]))))


# ---------------------------------------------------------------------------------------------------------------------
# Names and data of strangers

HOSTILE = (
    "\x1b[31mred\x1b[0m",
    "a\rb\nc\u2028d\x85e",
    "\u202egnp.exe\u202c\u200f",
    "a|b",
    "`code`",
    "[link](javascript:alert)",
    "![image](http://host/x.png)",
    "<script>alert(1)</script><!--",
    "**bold** ~~gone~~ &lt;",
    "$x_1$ $",
    "__init__",
    "\\| \\`",
    "\x00\x07\ud800",
)
MARKUP = re.compile(r"(?<!\\)(?:\\\\)*[`*\[\]<>~&$]")  # not escaped: an even number of backslashes in front


def assert_harmless(text: str, n_columns: int | None = None) -> None:
    assert all(character.isprintable() or character == "\n" for character in text)
    for line in text.splitlines():
        if line.startswith("|") and n_columns:
            assert len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) == n_columns + 1, line


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_names_in_report_comparison_and_plots(text, tmp_path, capsys):
    calls = summarize_results(rows_of([3, 0]))
    part = {key: value for key, value in calls.items() if key != "errors"}
    run = run_of(tiny_seen={**calls, "by_scenario": {text: part}, "errors": {text: 1}})
    report = format_report({**run, "model": text})
    assert_harmless(report)
    cells = [line.split(" | ")[1].strip() for line in report.splitlines() if line.startswith("| tiny-seen | ")]
    shown = [cell for cell in cells if cell not in ("1", "2", "8", "50")]
    assert markdown_text(text) in [cell.strip() for cell in shown] and not MARKUP.search(markdown_text(text))
    assert_harmless(format_report({**run, "predictions": text}))
    run["benchmarks"][text] = run["benchmarks"].pop("tiny-seen")
    assert_harmless(format_comparison([text, text], [run, run]), n_columns=6)
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        write_run(folder, run, {})
    name = "name" if re.search(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", text) else text  # such flags are refused
    flags = [str(tmp_path / "a"), str(tmp_path / "b"), "--names", f"{name},{name}"]
    assert compare_main(flags) == 0
    assert_harmless(capsys.readouterr().out, n_columns=6)
    run["benchmarks"][text]["TS_percent"] = 12.0  # warned of on stderr
    write_run(tmp_path / "a", run, {})
    assert compare_main(flags) == 0
    assert_harmless(capsys.readouterr().err)
    write_run(tmp_path / "a", plot_run(), {})
    assert plots_main([str(tmp_path / "a"), "--names", name, "--output", str(tmp_path / "plots")]) == 0
    assert_harmless(capsys.readouterr().out)


def test_comparison_calls_fewer_errors_better(tmp_path, capsys):
    """Base with errors in 8 of 10 dialogues, then with none: the lower rate is the better one, and those are won."""
    folders = []
    for name, errors, answers in (("base", 8, 2), ("SFT", 0, 9)):
        rows = [
            {
                "index": i,
                "calls": 3,
                "DE": 2 * (i < errors),
                "CE": 0,
                "VA": int(i < answers),
                "DE_dialogues": int(i < errors),
            }
            for i in range(10)
        ]
        summary = dialogue_summary(10, 30 if errors else 24, 2 * errors, 0, answers, de_dialogues=errors)
        folders.append(str(write_run(tmp_path / name, run_of(tiny_multi=summary), {"tiny-multi": rows})))
    assert compare_main([*folders, "--mcnemar"]) == 0
    cells = [[cell.strip() for cell in line.split("|")][1:-1] for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[1:3] for row in cells] == [
        ["30 / 24", "DE, lower is better"],
        ["30 / 24", "CE, lower is better"],
        ["10", "VA"],
        ["10", "DE_dialogues, lower is better"],
    ]
    assert [row[5] for row in cells] == [
        "lower (better), intervals disjoint",
        "intervals overlap",
        "higher, intervals disjoint",
        "lower (better), intervals disjoint",
    ]
    assert [row[6] for row in cells] == ["-", "-", "p 0.016 (0 lost, 7 won)", "p 0.0078 (0 lost, 8 won)"]
    assert compare_main([*folders[::-1], "--mcnemar"]) == 0
    out = capsys.readouterr().out
    assert out.count("higher (worse), intervals disjoint") == 2 and "p 0.0078 (8 lost, 0 won)" in out


# ---------------------------------------------------------------------------------------------------------------------
# Plots


def plot_run():
    summary = summarize_results(rows_of([3, 2, 1, 0]))
    return run_of(
        **{f"rotbench_{name}": summary for name in ("slight", "medium", "heavy", "union")},
        gsm8k=general("exact_match", 2, 8),
        mmlu=general("accuracy", 1, 4),
    )


def test_bars_are_the_summaries_numbers():
    summaries = plot_run()["benchmarks"]
    bars = figure4_bars(summaries)
    assert [bar[0] for bar in bars["TS"]] == ["slight", "medium", "heavy", "union"]
    assert [bars[metric][0][1] for metric in ("TS", "PI", "CF")] == [75.0, 50.0, 25.0]
    assert bars["CF"][0][2:] == tuple(summaries["rotbench-slight"]["CF_interval_95"])
    assert figure5_bars(summaries) == [("mmlu", 25.0, 0.0, 100.0), ("gsm8k", 25.0, 0.0, 100.0)]


def test_plots_are_files_or_a_notice(tmp_path, capsys):
    assert write_plots(["a"], [run_of(tiny_seen=summarize_results(rows_of([3])))], tmp_path) == []
    assert not list(tmp_path.iterdir())
    for name in "ab":
        (tmp_path / name).mkdir()
        write_run(tmp_path / name, plot_run(), {})
    assert plots_main([str(tmp_path / "a"), str(tmp_path / "b"), "--output", str(tmp_path / "plots")]) == 0
    written = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert [path.name for path in written] == ["figure4.svg", "figure5.svg"]
    texts = [element.text for element in ElementTree.parse(written[0]).getroot().iter(f"{SVG}text")]
    assert texts.count("a") == texts.count("b") == 12 and texts.count("75.0") == 8  # four environments, three metrics
    assert plots_main([str(tmp_path / "none")]) == 2


def test_groups_of_runs_with_other_benchmarks():
    first, second = [("slight", 50.0, 40.0, 60.0)], [("heavy", 1.0, 0.0, 2.0), ("slight", 7.0, 6.0, 8.0)]
    assert group_bars(["x", "y"], [first, second]) == {
        "heavy": [("y", 1.0, 0.0, 2.0)],
        "slight": [("x", 50.0, 40.0, 60.0), ("y", 7.0, 6.0, 8.0)],
    }
