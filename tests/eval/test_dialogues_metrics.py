"""eval/dialogues/metrics.py: 20 dialogues counted by hand, what a valid answer is, the interval of shares of calls."""

import math
import random
from pathlib import Path

import pytest

from eval.confidence import Z_95, wilson_interval
from eval.dialogues.journal import RecordedDialogue
from eval.dialogues.metrics import (
    GIVE_UPS,
    answer_fault,
    call_categories,
    clustered_interval,
    score_dialogue,
    score_dialogues,
)
from eval.dialogues.play import format_reminder
from eval.dialogues.tools import ExecutorSettings, ToolExecutor, ToolResult
from eval.evaluate_tiny_multi import load_tiny_multi
from tests.support.dialogue_doubles import FINISH, TOOLS, call, play, task

ROOT = Path(__file__).resolve().parents[2]
# Feedback by the called city: the words of the paper's Table 14 and of ToolEyes' executor.
FEEDBACK = {
    "down": "HTTPSConnectionPool(host='x', port=443): Max retries exceeded with url: /",
    "bad": '{"error": "Response error."}',
    "other": "get_weather() got an unexpected keyword argument 'city'",
    "Oslo": '{"film": "The Comedy of Errors", "error": null}',
}
OK, BAD, DOWN, OTHER = (call("get_weather", city=city) for city in ("Oslo", "bad", "down", "other"))
NO_TOOL, NO_TOOL_BAD = call("get_climate", city="Oslo"), call("get_climate", city="bad")
NO_PARAMETER, MISSING, BOTH = call("get_weather", city="Oslo", days=3), call("get_weather"), call("get_weather", days=3)
ASK, TEXT = call("ask_to_user", question="Where?"), "It rains."

# What each dialogue says, and by hand: attempted calls, DE, CE, VA.
BY_HAND = [
    ([OK, FINISH], 1, 0, 0, 1),
    ([FINISH], 0, 0, 0, 1),
    ([NO_TOOL, OK, FINISH], 2, 1, 0, 1),
    ([NO_PARAMETER, OK, FINISH], 2, 1, 0, 1),
    ([MISSING, OK, FINISH], 2, 1, 0, 1),
    ([DOWN, DOWN, DOWN, FINISH], 3, 0, 3, 1),
    ([BAD, FINISH], 1, 0, 1, 1),
    ([TEXT, OK, FINISH], 2, 0, 1, 1),
    ([OK] * 9, 9, 0, 0, 0),
    ([TEXT] * 9, 9, 0, 9, 0),
    ([NO_TOOL] * 7 + [FINISH], 7, 7, 0, 1),
    ([ASK, OK, FINISH], 1, 0, 0, 1),
    ([ASK] * 9, 0, 0, 0, 0),
    ([OK, call("finish")], 1, 0, 0, 0),
    ([OK, call("finish", answer=" ")], 1, 0, 0, 0),
    ([OK, call("finish", answer="I am sorry, I cannot handle the task.")], 1, 0, 0, 0),
    ([NO_TOOL_BAD, FINISH], 1, 1, 0, 1),  # "Response error.", but the documents speak first
    ([OTHER, FINISH], 1, 1, 0, 1),  # documented, but the tool knows no such parameter
    ([BOTH, BAD, FINISH], 2, 1, 1, 1),  # two faults of one call are one error
    ([OK, call("Finish", final_answer="x")], 1, 0, 0, 1),
]


def scripted(request):
    text = FEEDBACK[request.call.arguments["city"]] if "city" in request.call.arguments else '{"error": "x"}'
    return ToolResult(text, "simulated")


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory):
    tasks = [task(index, scenario="TG" if index < 12 else "FT") for index in range(20)]
    path = tmp_path_factory.mktemp("by_hand") / "p.jsonl"
    dialogues, _, _ = play(path, tasks, lambda dialogue, turn, _: BY_HAND[dialogue][0][turn - 1], execute=scripted)
    return dialogues, tasks


def test_twenty_dialogues_counted_by_hand(by_hand):
    rows, summary = score_dialogues(*by_hand)
    for row, (_, calls, de, ce, va) in zip(rows, BY_HAND, strict=True):
        assert (row["calls"], row["DE"], row["CE"], row["VA"]) == (calls, de, ce, va), row
    assert (summary["n"], summary["n_calls"], summary["DE"], summary["CE"], summary["VA"]) == (20, 47, 13, 15, 14)
    assert (summary["DE_percent"], summary["CE_percent"], summary["VA_percent"]) == (27.66, 31.91, 70.0)
    assert (summary["DE_dialogues"], summary["CE_dialogues"]) == (7, 5)
    assert summary["errors"] == {
        "tool_hallucination": 9,
        "parameter_hallucination": 3,
        "parameter_missing": 1,
        "tool_call_failure": 2,
        "tool_instability": 3,
        "unparsable": 10,
    }
    assert summary["executors"] == {"simulated": 37}  # all but the ten outputs that are no call
    assert summary["ends"] == {"finish": 17, "max_turns": 3}
    assert summary["no_answer"] == {"empty answer": 2, "give-up": 1, "no finish: max_turns": 3}
    assert summary["turns"] == {"1": 1, "2": 8, "3": 6, "4": 1, "8": 1, "9": 3}
    first, second = summary["by_scenario"]["FT"], summary["by_scenario"]["TG"]
    assert (first["n"], first["n_calls"], first["DE"], first["CE"], first["VA"]) == (8, 8, 3, 1, 4)
    assert (second["n"], second["n_calls"], second["DE"], second["CE"], second["VA"]) == (12, 39, 10, 14, 10)
    assert summary["VA_interval_95"] == [round(100 * bound, 2) for bound in wilson_interval(14, 20, Z_95)]
    assert rows[18]["categories"] == ["parameter_hallucination", "tool_call_failure"] and rows[9]["reason"] != ""


def test_official_finish_and_questions_are_no_attempted_calls(by_hand):
    for name in ("finish", "FINISH", "ask_to_user", "Ask_To_User"):
        turn = {
            "output": "",
            "fault": "",
            "calls": [{"name": name, "arguments": {"no": 1}, "feedback": None, "executor": ""}],
        }
        assert call_categories(RecordedDialogue(0, [turn], "max_turns"), TOOLS) == []


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"answer": "x"}, ""),
        ({"answer": 0}, ""),
        ({"answer": False}, ""),
        ({"answer": ["x"]}, ""),
        ({"final_answer": "x", "return_type": "give_answer"}, ""),
        ({"answer": "I can handle the task"}, ""),
        ({"answer": "The hall cannot be booked"}, ""),
        ({}, "empty answer"),
        ({"answer": ""}, "empty answer"),
        ({"answer": "\n\t "}, "empty answer"),
        ({"answer": None}, "empty answer"),
        ({"answer": []}, "empty answer"),
        ({"answer": {}}, "empty answer"),
        ({"Answer": "x"}, "empty answer"),
        ({"text": "x"}, "empty answer"),
        ({"answer": "I cannot handle the task."}, "give-up"),
        ({"answer": "i CANNOT\nhandle  the task"}, "give-up"),
        ({"answer": "I can not handle the task due to too long context."}, "give-up"),
        ({"answer": "We can\u2019t handle the task"}, "give-up"),
        ({"answer": "Unable to handle the task"}, "give-up"),
        ({"answer": "x", "return_type": "give_up_and_restart"}, "give-up"),
    ],
)
def test_valid_answers(arguments, reason):
    turn = {
        "output": "",
        "fault": "",
        "calls": [{"name": "finish", "arguments": arguments, "feedback": None, "executor": ""}],
    }
    assert answer_fault(RecordedDialogue(0, [turn], "finish"), 9) == reason


def test_valid_answers_come_in_time_and_by_finish():
    news = {
        "output": "",
        "fault": "",
        "calls": [{"name": "get_news", "arguments": {}, "feedback": "x", "executor": "local"}],
    }
    end = {
        "output": "",
        "fault": "",
        "calls": [{"name": "finish", "arguments": {"answer": "x"}, "feedback": None, "executor": ""}],
    }
    assert answer_fault(RecordedDialogue(0, [news] * 8 + [end], "finish"), 9) == ""
    assert answer_fault(RecordedDialogue(0, [news] * 9 + [end], "finish"), 9) == "finish in turn 10 of at most 9"
    assert answer_fault(RecordedDialogue(0, [news], "finish"), 9).startswith("no finish")
    assert answer_fault(RecordedDialogue(0, [], "finish"), 9).startswith("no finish")
    for reason in ("max_turns", "prompt_too_long", "refused"):
        assert answer_fault(RecordedDialogue(0, [end], reason), 9) == f"no finish: {reason}"


def test_no_attempted_call_at_all():
    dialogue = RecordedDialogue(0, [], "refused")
    summary = score_dialogues([dialogue], [task()])[1]
    assert (summary["n_calls"], summary["DE"], summary["DE_percent"]) == (0, 0, 0.0)
    assert summary["DE_interval_95"] == [0.0, 100.0] and "by_scenario" not in summary


def test_rows_add_up(by_hand):
    """Any part of the dialogues: sums of rows are those of the summary, shares lie in their intervals."""
    dialogues, tasks = by_hand
    rng = random.Random(0)
    for _ in range(40):
        chosen = rng.sample(range(20), rng.randint(1, 20))
        rows, summary = score_dialogues([dialogues[i] for i in chosen], [tasks[i] for i in chosen])
        for metric in ("DE", "CE", "VA", "DE_dialogues", "CE_dialogues"):
            assert summary[metric] == sum(row[metric] for row in rows)
            low, high = summary[f"{metric}_interval_95"]
            assert 0 <= low <= summary[f"{metric}_percent"] + 0.01 <= high + 0.02 <= 100.02
        assert summary["n_calls"] == sum(len(row["categories"]) for row in rows)
        assert sum(summary["errors"].values()) == summary["DE"] + summary["CE"]
    assert score_dialogue(dialogues[0], tasks[0], 1)["VA"] == 0  # two turns are more than one


def test_the_pages_dialogue(tmp_path):
    """docs/multi_turn.md: the table is run as it stands there, and its sums are what it says."""
    text = (ROOT / "docs/multi_turn.md").read_text(encoding="ascii")
    page = text.partition("### One dialogue, counted")[2].partition("\n## ")[0]
    cells = [
        [cell.strip().strip("`") for cell in line.strip("|").split(" | ")]
        for line in page.splitlines()
        if line.startswith("| ") and not line.startswith("| turn")
    ]
    *turns, sums = cells
    task = load_tiny_multi(ROOT / "assets/tiny_data/test_multi.jsonl")[37]
    assert task.messages[0].content in page and len(turns) == 9
    with ToolExecutor(ExecutorSettings("auto")) as execute:
        dialogues, _, _ = play(
            tmp_path / "p.jsonl", [task], lambda dialogue, turn, _: turns[turn - 1][1], execute=execute
        )
    for turn, (_, output, told, category, attempted, de, ce) in zip(dialogues[0].turns, turns, strict=True):
        assert turn["output"] == output and (category == "-") == (attempted == "0")
        if turn["fault"]:
            assert told == format_reminder("tl")
        else:
            assert turn["calls"][0]["feedback"] == (None if told == "-" else told)
        alone, _ = score_dialogues([RecordedDialogue(37, [turn], "max_turns")], [task])
        assert [alone[0][key] for key in ("calls", "DE", "CE")] == [int(attempted), int(de), int(ce)]
        assert alone[0]["categories"] == ([] if category == "-" else [category])
    summary = score_dialogues(dialogues, [task])[1]
    assert sums[4:] == [str(summary[key]) for key in ("n_calls", "DE", "CE")]
    for metric in ("DE", "CE"):
        assert f"{metric} = {summary[metric]} of {summary['n_calls']} calls = {summary[f'{metric}_percent']} %" in page
    assert f"VA = {summary['VA']} of {summary['n']} dialogues" in page
    for phrase in GIVE_UPS:
        assert f'"{phrase}"' in " ".join(text.split())


# ---------------------------------------------------------------------------------------------------------------------
# The interval (E35)


def test_interval_worked_by_hand():
    # x = (2, 0, 1, 1), m = (2, 2, 2, 2): p = 1/2; sum (x - p m)^2 = 1 + 1 + 0 + 0 = 2; p (1 - p) M = 2; D = 1.
    assert clustered_interval([2, 0, 1, 1], [2, 2, 2, 2], Z_95) == wilson_interval(4, 8, Z_95)
    # x = (2, 2, 0, 0): the sum is 4, D = 2: eight calls are worth four, namely the dialogues.
    assert clustered_interval([2, 2, 0, 0], [2, 2, 2, 2], Z_95) == wilson_interval(2, 4, Z_95)
    # x = (3, 1), m = (3, 5): p = 1/2; (3 - 1.5)^2 + (1 - 2.5)^2 = 4.5; p (1 - p) M = 2; D = 2.25; M / D = 32/9.
    low, high = clustered_interval([3, 1], [3, 5], Z_95)
    n, z2 = 32 / 9, Z_95**2
    half = Z_95 * math.sqrt(0.25 / n + z2 / (4 * n * n)) / (1 + z2 / n)
    assert low == pytest.approx(0.5 - half, rel=1e-12) and high == pytest.approx(0.5 + half, rel=1e-12)


def test_interval_at_the_ends():
    assert clustered_interval([], [], Z_95) == clustered_interval([0, 0], [0, 0], Z_95) == (0.0, 1.0)
    assert clustered_interval([0, 0, 0], [5, 4, 0], Z_95) == wilson_interval(0, 2, Z_95)
    assert clustered_interval([5, 4, 0], [5, 4, 0], Z_95) == wilson_interval(2, 2, Z_95)
    assert clustered_interval([3], [4], Z_95) == wilson_interval(0.75, 1, Z_95)  # one dialogue shows no variance
    assert clustered_interval([0, 3, 0], [0, 4, 0], Z_95) == wilson_interval(0.75, 1, Z_95)
    for errors, calls in (([2], [1]), ([-1], [1]), ([1], [1, 1])):
        with pytest.raises(ValueError, match="expected 0 <= errors <= calls"):
            clustered_interval(errors, calls, Z_95)


def test_one_call_per_dialogue_is_wilson():
    rng = random.Random(1)
    for _ in range(50):
        errors = [rng.randint(0, 1) for _ in range(rng.randint(1, 30))]
        expected = wilson_interval(sum(errors), len(errors), Z_95)
        assert clustered_interval(errors, [1] * len(errors), Z_95) == pytest.approx(expected, rel=1e-12)


def test_never_narrower_than_independent_calls():
    rng = random.Random(2)
    for _ in range(200):
        calls = [rng.randint(0, 9) for _ in range(rng.randint(1, 20))]
        errors = [rng.randint(0, count) for count in calls]
        if sum(count > 0 for count in calls) > 1:
            low, high = clustered_interval(errors, calls, Z_95)
            narrow = wilson_interval(sum(errors), sum(calls), Z_95)
            assert high - low >= narrow[1] - narrow[0] - 1e-12
            assert low - 1e-12 <= sum(errors) / sum(calls) <= high + 1e-12


def test_coverage_where_calls_of_a_dialogue_fail_together():
    """Dialogues that fail wholly or not at all: the interval holds the true share in 92 % of the draws or more, that
    of independent calls in less than 75 %."""
    rng = random.Random(3)
    covered = naive = 0
    for _ in range(600):
        calls = [rng.randint(1, 8) for _ in range(60)]
        errors = [count * (rng.random() < 0.2) for count in calls]
        low, high = clustered_interval(errors, calls, Z_95)
        covered += low <= 0.2 <= high
        low, high = wilson_interval(sum(errors), sum(calls), Z_95)
        naive += low <= 0.2 <= high
    assert covered / 600 > 0.92 and naive / 600 < 0.75
