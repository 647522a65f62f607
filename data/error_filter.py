"""Which assistant turns made a tool report an error (mitigating adverse effects, E2): they stay context, untrained.

    structured   documents first (tool offered? parameters documented? required ones there?), then feedback
    substring    the released matcher, bit for bit: a list of substrings after all punctuation and spaces are stripped
    none         standard SFT: every turn is trained

In every mode a turn whose call does not parse (kept by `read_trajectories(..., unparsable_calls="mask")`) is masked.
Feedback alone cannot tell a hallucinated tool from a failing one (Table 14 shows the same `Response error.` for both),
so the documents decide first. Each decision names its rule and the text that matched, for the report.

    python -m data.error_filter --cases tests/data/feedback_cases.jsonl     what each filter makes of labelled feedback
"""

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from command_line import parse_arguments, run_command
from data.json_records import DataError, read_json_lines
from data.tool_calls import ToolCall
from data.tool_documents import IMPLICIT_TOOLS, accepts_any_parameter, offered_names, tool_parameters
from data.tool_feedback import find_fault
from data.trajectories import Trajectory

ERROR_FILTERS = ("structured", "substring", "none")
CATEGORIES = (
    "all_right",
    "tool_hallucination",
    "parameter_hallucination",
    "parameter_missing",
    "tool_call_failure",
    "tool_instability",
    "unparsable",
)


@dataclass(frozen=True, slots=True)
class Finding:
    """What one turn did: a category of CATEGORIES, the rule that said so and the text it matched ("" for all_right)."""

    category: str
    rule: str
    matched_text: str


@dataclass(frozen=True, slots=True)
class TurnDecision:
    """Whether an assistant turn is masked. `category` is the structured reading in every mode.

    In substring mode a masked turn with `all_right` is a suspected false hit, and an unmasked turn with another
    category is a suspected miss.
    """

    message_index: int
    masked: bool
    category: str
    rule: str
    matched_text: str


_ALL_RIGHT = Finding("all_right", "", "")

# ---------------------------------------------------------------------------------------------------------------------
# Categories of errors

# What kind an error is, by the first words found in the text that reports it; else it is a tool_call_failure, the
# paper's "Others" included. {tool} is the called tool's name: "name 'pandas' is not defined" from the code that a
# code-running tool was given is no hallucinated tool.
_CATEGORY_WORDS = (
    (
        "tool_hallucination",
        r"name '{tool}' is not defined|cannot import name|is not a valid action|has no attribute '{tool}'"
        r"|(?:no such|unknown) (?:function|tool)\b|(?:function|tool) (?:\S+ )?(?:not found|does not exist)",
    ),
    (
        "parameter_hallucination",
        r"unexpected keyword argument|takes (?:from \d+ to )?\d+ positional arguments? but|takes no arguments"
        r"|(?:unknown|unexpected) (?:parameter|argument)",
    ),
    (
        "parameter_missing",
        r"missing \d+ required (?:positional|keyword-only) arguments?|missing (?:a )?(?:required|mandatory) "
        r"(?:parameter|argument|field|propert)|missing parameter|field (?:is )?required"
        r"|\bparam(?:eter)? .{0,40}(?:missing|is required)",
    ),
    ("unparsable", r"argument after \*\* must be a mapping|output format does not match the specified format"),
    (
        "tool_instability",
        r"Max retries exceeded|connection ?(?:error|refused|reset|aborted|timed)|time[ds]?[ -]?out"
        r"|\b[45]\d\d (?:Client|Server) Error|Invalid API call|rate[ _-]?limit|too many requests|quota"
        r"|exceeded (?:the|your)\b.{0,40}limit|internal server error|bad gateway|unavailable"
        r"|(?:\A|(?:http|status|code|error|returned)\W{1,4}(?:\w+\W){0,2})(?:429|50[0234])\b"
        r"|could not resolve|name or service not known|temporary failure|network (?:is )?unreachable|overloaded",
    ),
)


# ---------------------------------------------------------------------------------------------------------------------
# Structured


def classify_feedback(feedback: str | None, call: ToolCall | None, tools: list[dict]) -> str:
    """Category of a call, one of CATEGORIES, by the documents first and the feedback second (Figure 3, Table 14).

    `call` None means that the model's text did not parse (`unparsable`); `feedback` None that there is none, so only
    the documents speak. The paper's "Others" (an error without known words) counts as `tool_call_failure`.
    """
    return find_error(feedback, call, tools).category


def find_error(feedback: str | None, call: ToolCall | None, tools: list[dict]) -> Finding:
    """`classify_feedback` with the rule and the matched text."""
    if call is None:
        return Finding("unparsable", "the call does not parse", "")
    finding = check_documents(call, tools)
    # What follows `ask_to_user` or `finish` is the user's word, never a tool's.
    if finding.category == "all_right" and feedback is not None and call.name not in IMPLICIT_TOOLS:
        return _read_feedback(feedback, call.name)
    return finding


def check_documents(call: ToolCall, tools: list[dict]) -> Finding:
    """Compare a call with the documents alone: tool offered, parameters documented, required parameters there.

    Where several tools have the name (RoTBench), agreeing with one of them is enough. `finish` and `ask_to_user` are
    offered even if not listed.
    """
    findings = [_check_document(call, tool["function"]) for tool in tools if tool["function"].get("name") == call.name]
    if call.name not in offered_names(tools):
        return Finding("tool_hallucination", "tool not offered", call.name)
    return _ALL_RIGHT if _ALL_RIGHT in findings or not findings else findings[0]


def _check_document(call: ToolCall, function: dict) -> Finding:
    properties, required = tool_parameters(function)
    unknown = [name for name in call.arguments if name not in properties]
    if unknown and not accepts_any_parameter(function):
        return Finding("parameter_hallucination", "parameter not documented", ", ".join(unknown))
    missing = [name for name in required if name not in call.arguments]
    if missing:
        return Finding("parameter_missing", "required parameter absent", ", ".join(missing))
    return _ALL_RIGHT


def _read_feedback(feedback: str, tool_name: str) -> Finding:
    """Whether the feedback reports an error (data/tool_feedback.py), and which."""
    fault = find_fault(feedback)
    if fault is None:
        return _ALL_RIGHT
    rule, text = fault
    for category, pattern in _CATEGORY_WORDS:
        found = re.search(pattern.replace("{tool}", re.escape(tool_name)), text[:2000], re.IGNORECASE)
        if found:
            return Finding(category, rule, _cut(found[0]))
    return Finding("tool_call_failure", rule, _cut(text.strip()))


def _cut(text: str) -> str:
    return text if len(text) <= 200 else text[:197] + "..."


# ---------------------------------------------------------------------------------------------------------------------
# Substring mode

# What the released list (code/mae/mae.py, commit 1a62191) comes down to once its entries are
# reduced as the feedback is. Entries that contain "error" are left out: the quoted `"error":` is reduced to that bare
# word, so they can match nothing more.
_RELEASED_SUBSTRINGS = (
    "error",
    "isnotdefined",
    "positionalargument",
    "unexpectedkeyword",
    "relatedsearches",
    "notsupported",
    "invalidapicall",
    "objectoftypeserpresultsisnotjsonserializable",
    "sliceindicesmustbeintegersornoneorhaveanindexmethod",
)
# Common CJK ideographs, ASCII letters and digits, and the caret: the released pattern writes ^ before each range, and
# only the first one negates. Other letters (accents, kana) are stripped like punctuation.
_REDUCED_AWAY = re.compile(r"[^\u4e00-\u9fa5a-zA-Z0-9^]")


def matches_released_substrings(feedback: str) -> bool:
    """The released matcher: does the feedback, without punctuation and spaces, in lower case, hold a known substring?

    Bit for bit as published, false hits included ("Comedy of Errors", `"error": null`, even "better Rory" across the
    space). The list was read in the published source. The authors' data is not public, so the two could not be compared
    on it.
    """
    return find_released_substring(feedback) is not None


def find_released_substring(feedback: str) -> tuple[str, str] | None:
    """(substring of the list, the stretch of raw feedback reduced to it) for the first that matches, or None."""
    reduced = _REDUCED_AWAY.sub("", feedback).lower()
    for substring in _RELEASED_SUBSTRINGS:
        start = reduced.find(substring)
        if start >= 0:
            kept = [index for index, character in enumerate(feedback) if not _REDUCED_AWAY.match(character)]
            return substring, _cut(feedback[kept[start] : kept[start + len(substring) - 1] + 1])
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Decisions


def decide_masked_turns(trajectory: Trajectory, error_filter: str) -> list[TurnDecision]:
    """One decision per assistant turn, in order.

    structured: masks a call whose category is not all_right. The last turn, and any other without feedback, is kept
    unless the documents condemn it; plain text is kept.
    substring: masks a turn whose feedback matches, and, as the released code, a turn that is followed by anything but
    feedback; the last message of the trajectory is kept whatever it is.
    none: masks nothing. All modes mask calls that do not parse. Raises ValueError for another mode.
    """
    if error_filter not in ERROR_FILTERS:
        raise ValueError(f"error_filter is {error_filter!r}, expected one of {', '.join(ERROR_FILTERS)}")
    return [
        _decide_turn(trajectory, index, error_filter)
        for index, message in enumerate(trajectory.messages)
        if message.role == "assistant"
    ]


def _decide_turn(trajectory: Trajectory, index: int, error_filter: str) -> TurnDecision:
    messages = trajectory.messages
    message = messages[index]
    following = messages[index + 1] if index + 1 < len(messages) else None
    feedback = following.content if following is not None and following.role == "tool" else None
    if message.fault is not None:
        return TurnDecision(index, True, "unparsable", "the call does not parse", _cut(message.fault))
    finding = _ALL_RIGHT if message.call is None else find_error(feedback, message.call, trajectory.tools)
    if message.call is not None and finding.category == "all_right" and feedback is not None and following.failed:
        finding = Finding("tool_call_failure", "the data says is_error", _cut(feedback))
    if error_filter == "structured":
        masked = finding.category != "all_right"
        return TurnDecision(index, masked, finding.category, finding.rule, finding.matched_text)
    if error_filter == "substring" and following is not None:
        if feedback is None:
            return TurnDecision(index, True, finding.category, "not followed by feedback", following.role)
        if found := find_released_substring(feedback):
            return TurnDecision(index, True, finding.category, f"released substring {found[0]}", found[1])
    return TurnDecision(index, False, finding.category, finding.rule, finding.matched_text)


# ---------------------------------------------------------------------------------------------------------------------
# Measurement

_CASE_CALL = ToolCall("search", {"q": "x"})
_CASE_TOOLS = [
    {
        "type": "function",
        "function": {"name": "search", "parameters": {"properties": {"q": {"type": "string"}}, "required": ["q"]}},
    }
]


def measure_cases(path: Path) -> str:
    """Table of labelled feedback of a tool `search(q)`: by label the cases, and those that each filter calls an error.

    A line is {"feedback": text, "is_error": bool, "category": one of CATEGORIES or absent}. Raises DataError.
    """
    counts: dict[str, list[int]] = {}  # label -> cases, structured, substring
    for line, case in read_json_lines(path, drop_partial_last_line=False)[0]:
        feedback, is_error, category = case.get("feedback"), case.get("is_error"), case.get("category")
        if not isinstance(feedback, str) or not isinstance(is_error, bool) or category not in (None, *CATEGORIES):
            raise DataError(
                f'{path}:{line}: found another record, expected {{"feedback": text, "is_error": true/false}}'
            )
        row = counts.setdefault((category or "error") if is_error else "all_right", [0, 0, 0])
        found = classify_feedback(feedback, _CASE_CALL, _CASE_TOOLS) != "all_right"
        for column, value in enumerate((True, found, matches_released_substrings(feedback))):
            row[column] += value
    errors = [sum(row[column] for label, row in counts.items() if label != "all_right") for column in range(3)]
    rows = [(label, *counts[label]) for label in (*CATEGORIES, "error") if label in counts]
    rows += [("all errors", *errors)] if errors[0] else []
    lines = [f"{'label':<26}{'cases':>6}  called an error by:{'structured':>12}{'substring':>12}"]
    for label, cases, *found in rows:
        shares = "".join(f"{count:>5} {100 * count / cases:>5.1f}%" for count in found)
        lines.append(f"{label:<26}{cases:>6}  {'':<19}{shares}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 with one line on stderr for bad input."""
    parser = argparse.ArgumentParser(prog="python -m data.error_filter", description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=Path, required=True, help="JSON lines of labelled feedback")
    flags = parse_arguments(parser, arguments)
    return run_command(lambda: print(measure_cases(flags.cases)), (ValueError, OSError))


if __name__ == "__main__":
    sys.exit(main())
