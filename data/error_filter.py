"""Which assistant turns made a tool report an error (mitigating adverse effects, E2): they stay context, untrained.

    structured   documents first (tool offered? parameters documented? required ones there?), then feedback patterns
    substring    the released matcher, bit for bit: a list of substrings after all punctuation and spaces are stripped
    none         standard SFT: every turn is trained

In every mode a turn whose call does not parse (kept by `read_trajectories(..., unparsable_calls="mask")`) is masked.
Feedback alone cannot tell a hallucinated tool from a failing one (Table 14 shows the same `Response error.` for both),
so the documents decide first. Each decision names its rule and the text that matched, for the report.
"""

import json
import re
from dataclasses import dataclass

from data.tool_calls import ToolCall, ToolCallError, parse_value
from data.tool_documents import accepts_any_parameter, tool_parameters
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

# Offered in every trajectory, listed or not: the two ways to speak to the user in the authors' data.
ALWAYS_OFFERED = ("finish", "ask_to_user")


@dataclass(frozen=True, slots=True)
class Finding:
    """What one turn did: a category of CATEGORIES, the rule that said so and the text it matched ("" for all_right)."""

    category: str
    rule: str
    matched_text: str


@dataclass(frozen=True, slots=True)
class TurnDecision:
    """Whether an assistant turn is masked. `category` is the structured reading in every mode.

    So masked with `all_right` is a suspected false hit of the substring mode, not masked with an error one it missed.
    """

    message_index: int
    masked: bool
    category: str
    rule: str
    matched_text: str


@dataclass(frozen=True, slots=True)
class FilterDifference:
    """A turn on which the two filters differ: `verdict` is "suspected false hit" or "missed" of the substring mode."""

    verdict: str
    structured: TurnDecision
    substring: TurnDecision


_ALL_RIGHT = Finding("all_right", "", "")

# ----------------------------------------------------------------------------------------------- structured: patterns

# In this order, the first match wins. {tool} is the called tool's name: "name 'pandas' is not defined" from the code
# that a code-running tool was given is no hallucinated tool.
_FEEDBACK_PATTERNS = (
    (
        "tool_hallucination",
        r"name '{tool}' is not defined|cannot import name|is not a valid action"
        r"|has no attribute '{tool}'",
    ),
    ("parameter_hallucination", r"unexpected keyword argument|takes (?:from \d+ to )?\d+ positional arguments? but"),
    ("parameter_missing", r"missing \d+ required (?:positional|keyword-only) arguments?|Missing required parameters"),
    ("unparsable", r"argument after \*\* must be a mapping|output format does not match the specified format"),
    (
        "tool_instability",
        r"Max retries exceeded|ConnectionError|connection error|timed out"
        r"|\b[45]\d\d (?:Client|Server) Error|Invalid API call",
    ),
    (
        "tool_call_failure",
        r"Response error|not JSON serializable|slice indices must be integers"
        r"|\A\s*['\"]?related_searches['\"]?\s*\Z|not supported|Parameter type error"
        r"|unsupported (?:operand )?type",
    ),
)

# Text that an executor raised, in words that no pattern above knows. A lone quoted word is the text of a KeyError.
_RAISED = re.compile(
    r"cannot be executed successfully|Traceback \(most recent call last\)|\A\s*[\w.]{0,80}(?:Error|Exception)\b\s*[:(]"
    r"|\A\s*'\w*'\s*\Z|\A\s*name '[^'\n]{1,200}' is not defined"
    r"|\A\s*(?:list|string|tuple) index out of range|\A\s*'?[\w.]{1,80}'? object (?:has no|is not|does not)\b"
    r"|\A\s*(?:float )?division by zero\s*\Z|\A\s*invalid literal for|\A\s*could not convert string to",
    re.IGNORECASE,
)
_STARTS_WITH_ERROR = re.compile(r"\A\s*Error\b", re.IGNORECASE)
# A JSON object cut off in the middle does not parse; its error key still stands at the front.
_OPENS_WITH_ERROR_KEY = re.compile(
    r"""\A\s*\{\s*["']errors?["']\s*:\s*(?!null|None|false|False|""|''|\[\s*\]|\{\s*\}|0\b)\S""", re.IGNORECASE
)
_ERROR_KEYS = ("error", "errors")
_MESSAGE_KEYS = ("message", "msg", "detail", "details", "reason", "exception")


# ---------------------------------------------------------------------------------------------------------- structured


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
    if finding.category == "all_right" and feedback is not None:
        return _read_feedback(feedback, call.name)
    return finding


def check_documents(call: ToolCall, tools: list[dict]) -> Finding:
    """Compare a call with the documents alone: tool offered, parameters documented, required parameters there.

    Where several tools have the name (RoTBench), agreeing with one of them is enough. `finish` and `ask_to_user` are
    offered even if not listed.
    """
    findings = [_check_document(call, tool["function"]) for tool in tools if tool["function"].get("name") == call.name]
    if not findings and call.name not in ALWAYS_OFFERED:
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
    """A result that is a JSON object says by its keys whether it is an error; other text is searched for patterns.

    So words inside a good result ("Comedy of Errors", a page about connection errors) do not count.
    """
    result = _as_object(feedback)
    if isinstance(result, str):
        return (
            _search_patterns(result, tool_name)
            or _search("text starts with Error", "tool_call_failure", _STARTS_WITH_ERROR, result)
            or _search("error key", "tool_call_failure", _OPENS_WITH_ERROR_KEY, result)
            or _search("raised by the executor", "tool_call_failure", _RAISED, result)
            or _ALL_RIGHT
        )
    if not isinstance(result, dict):
        return _ALL_RIGHT
    for key, value in result.items():
        if key.lower() in _ERROR_KEYS and _is_error_value(key.lower(), value):
            shown = f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}"
            return _search_patterns(feedback, tool_name) or Finding("tool_call_failure", "error key", _cut(shown))
    if any(key.lower() in _ERROR_KEYS for key in result):
        return _ALL_RIGHT  # "error": null is a statement that there was none
    messages = [value for key, value in result.items() if key.lower() in _MESSAGE_KEYS and isinstance(value, str)]
    return next(filter(None, (_search_patterns(message, tool_name) for message in messages)), _ALL_RIGHT)


def _as_object(feedback: str) -> object:
    """The feedback as a dict or list if it is one (JSON, or Python's repr of one), else as text.

    A JSON string is unpacked, at most three times: some tools answer with JSON inside a JSON string.
    """
    value: object = feedback
    for _ in range(4):
        if not isinstance(value, str):
            return value if isinstance(value, (dict, list)) else feedback
        text = value.strip()
        if text[:1] not in ('"', "{", "["):
            return value
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            try:
                value = parse_value(text)
            except ToolCallError:
                return value
    return feedback


def _is_error_value(key: str, value: object) -> bool:
    """Null, false, 0 and empty values report no error; a number under `errors` is a count, not a report."""
    if isinstance(value, str):
        return value.strip() != ""
    return bool(value) and not (key == "errors" and isinstance(value, (int, float)) and not isinstance(value, bool))


def _search_patterns(text: str, tool_name: str) -> Finding | None:
    for category, pattern in _FEEDBACK_PATTERNS:
        compiled = re.compile(pattern.replace("{tool}", re.escape(tool_name)), re.IGNORECASE)
        if finding := _search("feedback pattern", category, compiled, text):
            return finding
    return None


def _search(rule: str, category: str, pattern: re.Pattern, text: str) -> Finding | None:
    match = pattern.search(text)
    return Finding(category, rule, _cut(match[0].strip())) if match else None


def _cut(text: str) -> str:
    return text if len(text) <= 200 else text[:197] + "..."


# ----------------------------------------------------------------------------------------------------- substring mode

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
    space). The list was read in the published source; the authors' data, to run both on, could not be had.
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


# ----------------------------------------------------------------------------------------------------------- decisions


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


def compare_filters(trajectory: Trajectory) -> list[FilterDifference]:
    """The turns on which `structured` and `substring` differ, for the report."""
    differences = []
    for structured, substring in zip(
        decide_masked_turns(trajectory, "structured"), decide_masked_turns(trajectory, "substring"), strict=True
    ):
        if structured.masked != substring.masked:
            verdict = "suspected false hit" if substring.masked else "missed"
            differences.append(FilterDifference(verdict, structured, substring))
    return differences


def _decide_turn(trajectory: Trajectory, index: int, error_filter: str) -> TurnDecision:
    messages = trajectory.messages
    message = messages[index]
    following = messages[index + 1] if index + 1 < len(messages) else None
    feedback = following.content if following is not None and following.role == "tool" else None
    if message.fault is not None:
        return TurnDecision(index, True, "unparsable", "the call does not parse", _cut(message.fault))
    finding = _ALL_RIGHT if message.call is None else find_error(feedback, message.call, trajectory.tools)
    if error_filter == "structured":
        masked = finding.category != "all_right"
        return TurnDecision(index, masked, finding.category, finding.rule, finding.matched_text)
    if error_filter == "substring" and following is not None:
        if feedback is None:
            return TurnDecision(index, True, finding.category, "not followed by feedback", following.role)
        if found := find_released_substring(feedback):
            return TurnDecision(index, True, finding.category, f"released substring {found[0]}", found[1])
    return TurnDecision(index, False, finding.category, finding.rule, finding.matched_text)
