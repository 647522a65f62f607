"""The paper's reward of one response (E22, E23), a pure function of the text, the gold calls and the tools.

    -2      the response is not exactly one call (text after it or a second call included), or does not end
    -2      the tool is not offered
    -1.5    the tool is offered, but is not that of the gold call
    R_p     same tool, other parameters: -0.8 [some hallucinated] - 0.5 [some redundant] - 0.5 [some missing]
    -0.25   same parameters, some value differs
    +1      equal to the gold call

Hallucinated: not documented. Redundant: documented, not in the gold call. Missing: in the gold call, absent.
Values are equal by type and content; 5 and 5.0 are two values only where the document says integer (`is_equal_value`).
The paper's numbers are not monotone: the right tool with all three parameter faults gets -1.8, less than a wrong tool.
Of several gold calls the one with the best reward counts, the first of equals. rl/check_rewards.py tests this rule on
every prompt before training and explains the reward of one response on the command line.

Deviation: the paper does not say what a response gets that is cut at the length limit just after its closing bracket.
Here it gets -2 (`judge_response`), since a model that never ends its turn must not earn the reward of a call.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from data.formats.table import DEFAULT_FORMAT, parse_output
from data.tool_calls import ToolCall, ToolCallError
from data.tool_documents import accepts_any_parameter, offered_names, tool_parameters
from printable import shown

# Each category with its reward; a call with several parameter faults has the sum of theirs.
REWARDS = {
    "unparsable": -2.0,
    "hallucinated_tool": -2.0,
    "wrong_tool": -1.5,
    "hallucinated_parameter": -0.8,
    "redundant_parameter": -0.5,
    "missing_parameter": -0.5,
    "wrong_value": -0.25,
    "correct": 1.0,
}
CATEGORIES = tuple(REWARDS)


@dataclass(frozen=True, slots=True)
class RewardResult:
    """The reward of one response, and why."""

    reward: float
    category: str  # one of CATEGORIES; of several parameter faults the first in their order
    call: ToolCall | None  # None: the response did not parse
    fault: str | None  # then the parser's reason
    gold: ToolCall  # the gold call that gave this reward
    hallucinated: tuple[str, ...]  # parameter names; the four are empty unless the tool is the gold call's
    redundant: tuple[str, ...]
    missing: tuple[str, ...]
    wrong_values: tuple[str, ...]  # parameters that both calls have, with values that are not equal
    explanation: str  # one line of ASCII


def tool_call_reward(
    output_text: str, gold_calls: Sequence[ToolCall], tools: list[dict], prompt_format: str = DEFAULT_FORMAT
) -> RewardResult:
    """R (E22) with R_p (E23), paper section 3.3. Never raises because of the text, however malformed.

    tools: OpenAI function dicts. `finish` and `ask_to_user` count as offered even if not listed, as in the error
    filter; if such a tool has no document, the parameters of its gold calls count as documented. If several tools have
    one name, a parameter is documented if one of them has it; a tool that accepts any parameter documents all of them.
    Values are compared by `is_equal_value`. prompt_format: how the text writes a call (data/formats/table.py). Raises
    ValueError if there is no gold call, and for an unknown format.
    """
    if not gold_calls:
        raise ValueError("found no gold call, expected at least one")
    try:
        calls = parse_output(output_text, prompt_format)
        if len(calls) > 1:
            raise ToolCallError(f"found {len(calls)} calls, expected one")
    except ToolCallError as error:
        return _judge_tool("unparsable", None, gold_calls[0], fault=str(error))
    call = calls[0]
    functions = [tool["function"] for tool in tools if tool["function"].get("name") == call.name]
    if call.name not in offered_names(tools):
        return _judge_tool("hallucinated_tool", call, gold_calls[0])
    documents: dict[str, list] = {}  # of each parameter; several tools of one name may each have one
    for function in functions:
        for name, document in tool_parameters(function)[0].items():
            documents.setdefault(name, []).append(document)
    if any(map(accepts_any_parameter, functions)):
        documents = {name: [] for name in call.arguments} | documents
    if not functions:
        documents = {name: [] for gold in gold_calls if gold.name == call.name for name in gold.arguments}
    results = [_compare(call, gold, documents) for gold in gold_calls]
    return max(results, key=lambda result: result.reward)  # E22; max keeps the first of equals


def judge_response(
    output_text: str,
    has_ended: bool,
    gold_calls: Sequence[ToolCall],
    tools: list[dict],
    prompt_format: str = DEFAULT_FORMAT,
) -> RewardResult:
    """R (E22) of a response that a model wrote: `tool_call_reward`, and -2 for a call whose turn the model did not end.

    has_ended: the last token was the format's end of turn; False: the response was cut at the length limit.
    """
    result = tool_call_reward(output_text, gold_calls, tools, prompt_format)
    if has_ended or result.call is None:
        return result
    fault = "found no EOS after the call, expected the model to end its turn"
    return _judge_tool("unparsable", None, gold_calls[0], fault=fault)  # E22


def parameter_reward(hallucinated: Collection[str], redundant: Collection[str], missing: Collection[str]) -> float:
    """R_p (E23): each kind of fault counts once, however many parameters have it; 0 without a fault."""
    return (
        REWARDS["hallucinated_parameter"] * bool(hallucinated)
        + REWARDS["redundant_parameter"] * bool(redundant)
        + REWARDS["missing_parameter"] * bool(missing)
    )  # E23


def _compare(call: ToolCall, gold: ToolCall, documents: Mapping[str, list]) -> RewardResult:
    """E22 against one gold call; the tool of `call` is offered."""
    if call.name != gold.name:
        return _judge_tool("wrong_tool", call, gold)
    hallucinated = tuple(name for name in call.arguments if name not in documents)
    redundant = tuple(name for name in call.arguments if name in documents and name not in gold.arguments)
    missing = tuple(name for name in gold.arguments if name not in call.arguments)
    wrong_values = tuple(
        name
        for name, value in gold.arguments.items()
        if name in call.arguments and not is_equal_value(call.arguments[name], value, documents.get(name, ()))
    )
    faults = [
        category
        for category, names in (
            ("hallucinated_parameter", hallucinated),
            ("redundant_parameter", redundant),
            ("missing_parameter", missing),
        )
        if names
    ]
    category = faults[0] if faults else "wrong_value" if wrong_values else "correct"
    reward = parameter_reward(hallucinated, redundant, missing) if faults else REWARDS[category]  # E22
    details = [
        f"{kind} {_listed(names)}"
        for kind, names in (("hallucinated", hallucinated), ("redundant", redundant), ("missing", missing))
        if names
    ]
    details += [
        f"{shown(name)} is {shown(call.arguments[name])}, expected {shown(gold.arguments[name])}"
        for name in wrong_values[:3]
    ]
    details += [f"{len(wrong_values) - 3} more wrong values"] if len(wrong_values) > 3 else []
    explanation = f"{reward:g} {category}: {'; '.join(details) or 'equal to the gold call'}"
    return RewardResult(reward, category, call, None, gold, hallucinated, redundant, missing, wrong_values, explanation)


def _judge_tool(category: str, call: ToolCall | None, gold: ToolCall, *, fault: str | None = None) -> RewardResult:
    """E22 for a response that is not a call, or does not call the gold tool: parameters are not compared."""
    if call is None:
        detail = fault
    elif category == "hallucinated_tool":
        detail = f"{shown(call.name)} is not offered"
    else:
        detail = f"{shown(call.name)}, expected {shown(gold.name)}"
    reward = REWARDS[category]  # E22
    return RewardResult(reward, category, call, fault, gold, (), (), (), (), f"{reward:g} {category}: {detail}")


def is_equal_value(value: object, gold: object, documents: Sequence[object] = ()) -> bool:
    """Equality of two JSON values of one parameter; lists in order, dicts in any order.

    Values of different types differ: 1, true, "1" and null are four values. Only an integer and a float of equal value,
    5 and 5.0, are equal, unless the document says integer and not number. Inside lists and dicts, `items` and
    `properties` of the document decide in the same way.
    documents: JSON Schemas of the parameter, maybe none; what they do not say counts as undeclared.
    Not recursive, so a deeply nested response cannot overflow the stack.
    """
    pending: list[tuple] = [(value, gold, documents)]
    while pending:
        value, gold, documents = pending.pop()
        if isinstance(gold, dict) and isinstance(value, dict):
            if value.keys() != gold.keys():
                return False
            pending.extend((value[key], gold[key], _documents_inside(documents, "properties", key)) for key in gold)
        elif isinstance(gold, list) and isinstance(value, list):
            if len(value) != len(gold):
                return False
            inside = _documents_inside(documents, "items")
            pending.extend((each, wanted, inside) for each, wanted in zip(value, gold, strict=True))
        elif value != gold:
            return False
        elif type(value) is not type(gold) and ({type(value), type(gold)} != {int, float} or _is_integer(documents)):
            return False
    return True


def _is_integer(documents: Iterable[object]) -> bool:
    """Whether the documents of a value say integer and none of them says number."""
    types = [kind for document in _branches(documents) for kind in _as_list(document.get("type"))]
    names = {kind.lower() for kind in types if isinstance(kind, str)}
    return bool(names & {"integer", "int"}) and not names & {"number", "float", "double"}


def _documents_inside(documents: Sequence[object], keyword: str, key: str | None = None) -> list[object]:
    """Documents of the items of a list ("items"), or of one key of a dict ("properties")."""
    found = [document.get(keyword) for document in _branches(documents)] if documents else []
    return found if key is None else [entry.get(key) for entry in found if isinstance(entry, dict)]


def _branches(documents: Iterable[object]) -> list[dict]:
    """The documents that are objects, and the branches of their anyOf, oneOf and allOf."""
    found, pending = [], list(documents)
    while pending:
        document = pending.pop()
        if isinstance(document, dict):
            found.append(document)
            pending.extend(each for key in ("anyOf", "oneOf", "allOf") for each in _as_list(document.get(key)))
    return found


def _as_list(value: object) -> list:
    return value if isinstance(value, list) else [value]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(shown, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
