"""The toolbox world: deterministic local tools composed from closed word lists, with requests, executions and
trajectories.

A tool is `verb_noun[_qualifier]` with 0-3 parameters. Its document says the same thing in other words (the synonyms),
so a request in either wording can be matched by reading. 60 noun-qualifier pairs are held out: they name the
tools of `tiny-unseen` and occur neither in the base corpus nor in the training trajectories.

Teacher errors (for MAE) are systematic: a tool whose qualifier is in HARD_QUALIFIERS makes the teacher's first call
fail in one fixed way.
"""

import hashlib
import json
import random
from collections.abc import Collection, Iterator, Mapping, Sequence

from toolbox.words import (
    DOMAINS,
    MONTHS,
    QUALIFIER_PHRASES,
    REQUEST_PREFIXES,
    RESULT_WORDS,
    TITLE_FIRST,
    TITLE_SECOND,
    VALUE_KINDS,
    VERB_CUES,
    Domain,
)

SEEN_TOOL_COUNT = 180
UNSEEN_TOOL_COUNT = 60
HELD_OUT_NOUNS = 30  # of 60: two qualifiers each are held out
TOOLBOX_SEED = 2024  # the toolboxes are part of the world: one seed for all splits
TEACHER_ERROR_RATE = 0.5  # chance that the teacher's first call of a hard tool fails: 17 % of trajectories have one
# Qualifier of a tool -> the category (Figure 3 of the paper) of the failure that the teacher makes with it.
HARD_QUALIFIERS = {
    "weekly": "parameter_missing",
    "late": "parameter_missing",
    "shared": "parameter_hallucination",
    "private": "parameter_hallucination",
    "archived": "tool_hallucination",
    "remote": "tool_call_failure",
    "early": "tool_instability",
    "urgent": "tool_instability",
}

# ---------------------------------------------------------------------------------------------------------------------
# Tools


def make_tool(rng: random.Random, domain: Domain, verb: str, noun: str, qualifier: str | None) -> dict:
    """One tool as an OpenAI function dict; names, count and order of its parameters are drawn from `rng`."""
    name = "_".join(part for part in (verb, noun, qualifier) if part)
    phrase = f" {QUALIFIER_PHRASES[qualifier][1]}" if qualifier else ""
    count = rng.choices((0, 1, 2, 3), weights=(8, 37, 35, 20))[0]
    properties, required, optional = {}, [], []
    for kind_name in rng.sample(domain.kinds, count):
        kind = VALUE_KINDS[kind_name]
        parameter = rng.choice(kind.names)
        properties[parameter] = {"type": kind.json_type, "description": kind.description}
        (required if rng.random() < 0.72 else optional).append(parameter)
    ordered = {parameter: properties[parameter] for parameter in required + optional}
    parameters = {"type": "object", "properties": ordered, "required": required}
    description = f"{VERB_CUES[verb][1]} the {domain.nouns[noun]}{phrase}"
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def special_tools() -> list[dict]:
    """`ask_to_user` and `finish`, which close every tool list."""
    tools = []
    for name, parameter, description, meaning in (
        ("ask_to_user", "question", "ask the user for help", "question to ask"),
        ("finish", "answer", "end with the answer", "answer to give"),
    ):
        parameters = {
            "type": "object",
            "properties": {parameter: {"type": "string", "description": meaning}},
            "required": [parameter],
        }
        tools.append(
            {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}
        )
    return tools


def held_out_pairs() -> set[tuple[str, str]]:
    """The (noun, qualifier) pairs that only `tiny-unseen` uses."""
    rng = random.Random(TOOLBOX_SEED)
    nouns = [(noun, domain) for domain in DOMAINS for noun in domain.nouns]
    return {
        (noun, qualifier)
        for noun, domain in rng.sample(nouns, HELD_OUT_NOUNS)
        for qualifier in rng.sample(domain.qualifiers, 2)
    }


def draw_tool(
    rng: random.Random,
    *,
    held_out: set[tuple[str, str]],
    unseen: bool,
    domain: Domain | None = None,
    verb: str | None = None,
    noun: str | None = None,
    qualifier: str | None = None,
) -> dict:
    """A random tool; `unseen` asks for a held-out pair, otherwise such pairs are avoided. Given parts are kept."""
    while True:
        chosen = domain or rng.choice(DOMAINS)
        tool_noun = noun or rng.choice(list(chosen.nouns))
        choices = list(chosen.qualifiers) if unseen else list(chosen.qualifiers) + [None]
        tool_qualifier = qualifier if qualifier in chosen.qualifiers else rng.choice(choices)
        if ((tool_noun, tool_qualifier) in held_out) == unseen:
            return make_tool(
                rng, chosen, verb if verb in chosen.verbs else rng.choice(chosen.verbs), tool_noun, tool_qualifier
            )


def tool_name(tool: dict) -> str:
    """The name in an OpenAI function dict."""
    return tool["function"]["name"]


def build_toolbox(unseen: bool) -> list[dict]:
    """The fixed toolbox of a split: 180 seen tools or 60 unseen ones, distinct names, always the same."""
    held_out, rng = held_out_pairs(), random.Random(TOOLBOX_SEED + 1 + unseen)
    tools: dict[str, dict] = {}
    while len(tools) < (UNSEEN_TOOL_COUNT if unseen else SEEN_TOOL_COUNT):
        tool = draw_tool(rng, held_out=held_out, unseen=unseen)
        tools.setdefault(tool_name(tool), tool)
    return list(tools.values())


def name_parts(tool: dict) -> tuple[str, str, str | None]:
    """(verb, noun, qualifier) of a tool's name."""
    verb, noun, *rest = tool_name(tool).split("_")
    return verb, noun, rest[0] if rest else None


def domain_of(noun: str) -> Domain:
    """The domain that a noun belongs to."""
    return next(domain for domain in DOMAINS if noun in domain.nouns)


# ---------------------------------------------------------------------------------------------------------------------
# Requests


def kind_of(parameter: str) -> str:
    """The value kind of a parameter name."""
    return next(name for name, kind in VALUE_KINDS.items() if parameter in kind.names)


def draw_value(rng: random.Random, kind_name: str) -> str | int:
    """A value of a kind."""
    kind = VALUE_KINDS[kind_name]
    if kind_name == "title":
        return f"{rng.choice(TITLE_FIRST)} {rng.choice(TITLE_SECOND)}"
    if kind_name == "date":
        return f"{rng.choice(MONTHS)} {rng.randint(1, 28)}"
    return rng.randint(kind.low, kind.high) if kind.json_type == "integer" else rng.choice(kind.values)


def draw_request(
    rng: random.Random, tool: dict, qualifier_phrases: Mapping[str, tuple[str, str]] = QUALIFIER_PHRASES
) -> tuple[str, dict]:
    """(request text, arguments of the right call): all required parameters, each optional one with chance 0.4."""
    verb, noun, qualifier = name_parts(tool)
    parameters = tool["function"]["parameters"]
    arguments, phrases = {}, []
    for parameter in parameters["properties"]:
        if parameter in parameters["required"] or rng.random() < 0.4:
            kind_name = kind_of(parameter)
            arguments[parameter] = draw_value(rng, kind_name)
            form = f"with {parameter} {{}}" if rng.random() < 0.2 else rng.choice(VALUE_KINDS[kind_name].phrases)
            phrases.append(form.format(arguments[parameter]))
    rng.shuffle(phrases)
    cue = VERB_CUES[verb][rng.random() < 0.35]
    thing = domain_of(noun).nouns[noun] if rng.random() < 0.35 else noun
    how = f" {qualifier_phrases[qualifier][rng.random() < 0.4]}" if qualifier else ""
    tail = "".join(f" {phrase}" for phrase in phrases)
    prefix = rng.choice(REQUEST_PREFIXES)
    forms = [
        f"{prefix}{cue} the {thing}{how}{tail}",
        f"{prefix}{cue} the {thing}{tail}{how}",
        f"about the {thing}{how} : {cue} it{tail}",
    ]
    if phrases:
        forms.append(f"{' '.join(phrases)} : {cue} the {thing}{how}")
    return rng.choice(forms), arguments


def draw_tool_list(rng: random.Random, targets: list[dict], pool: list[dict], count: int) -> list[dict]:
    """`targets` and look-alikes (same noun, verb or qualifier) from `pool` up to `count` tools, shuffled, then the
    special tools."""
    chosen = {tool_name(tool): tool for tool in targets}
    for target in targets:
        parts = name_parts(target)
        alike = [
            [tool for tool in pool if name_parts(tool)[i] == parts[i] and tool_name(tool) not in chosen]
            for i in (1, 0, 2)
        ]
        for candidates in alike[:1] + [rng.choice(alike[1:])]:
            if candidates and len(chosen) < count:
                tool = rng.choice(candidates)
                chosen[tool_name(tool)] = tool
    while len(chosen) < count:
        tool = rng.choice(pool)
        chosen.setdefault(tool_name(tool), tool)
    tools = list(chosen.values())
    rng.shuffle(tools)
    return tools + special_tools()


# ---------------------------------------------------------------------------------------------------------------------
# Execution


def execute(
    tools: list[dict], name: str, arguments: dict, attempt: int = 0, error_rate: float = TEACHER_ERROR_RATE
) -> str:
    """Run a call: the same call gives the same feedback. Errors read as in the paper's Table 14.

    `attempt` counts earlier identical calls of the dialogue: an unstable tool fails at attempt 0 only, for
    `error_rate` of its calls.
    """
    tool = next((tool for tool in tools if tool_name(tool) == name), None)
    if tool is None:
        return f"name '{name}' is not defined"
    parameters = tool["function"]["parameters"]
    reason = "The function cannot be executed successfully with the given parameters for the reason: "
    for parameter in arguments:
        if parameter not in parameters["properties"]:
            return f"{reason}{name}() got an unexpected keyword argument '{parameter}'"
    for parameter in parameters["required"]:
        if parameter not in arguments:
            return f"{reason}{name}() missing 1 required positional argument: '{parameter}'"
    if not all(is_valid_value(kind_of(parameter), value) for parameter, value in arguments.items()):
        return json.dumps({"error": "Response error."})
    digest = hashlib.sha256(json.dumps([name, sorted(arguments.items())]).encode()).digest()
    unstable = HARD_QUALIFIERS.get(name_parts(tool)[2]) == "tool_instability"
    if unstable and attempt == 0 and digest[2] < 256 * error_rate:
        return json.dumps({"error": "connection error."})
    return json.dumps({"result": f"{RESULT_WORDS[digest[0] % len(RESULT_WORDS)]} {digest[1] % 90 + 10}"})


def is_valid_value(kind_name: str, value: object) -> bool:
    """Whether a value belongs to a kind: its list, its range, or its two-word form."""
    kind = VALUE_KINDS[kind_name]
    if kind.json_type == "integer":
        return type(value) is int and kind.low <= value <= kind.high
    if not isinstance(value, str):
        return False
    first, _, second = value.partition(" ")
    if kind_name == "title":
        return first in TITLE_FIRST and second in TITLE_SECOND
    if kind_name == "date":
        return first in MONTHS and second.isascii() and second.isdigit() and 1 <= int(second) <= 28
    return value in kind.values


# ---------------------------------------------------------------------------------------------------------------------
# Trajectories


def teacher_error(
    rng: random.Random, tool: dict, arguments: dict, error_rate: float = TEACHER_ERROR_RATE
) -> tuple[str, dict] | None:
    """The failing call that the teacher makes first, or None. An unstable tool fails with the right call."""
    verb, noun, qualifier = name_parts(tool)
    category = HARD_QUALIFIERS.get(qualifier)
    if category in (None, "tool_instability") or rng.random() >= error_rate:
        return None
    required = [parameter for parameter in arguments if parameter in tool["function"]["parameters"]["required"]]
    if category == "tool_hallucination":
        return f"{verb}_{domain_of(noun).nouns[noun]}_{qualifier}", arguments
    if category == "parameter_missing" and required:
        return tool_name(tool), {
            parameter: value for parameter, value in arguments.items() if parameter != required[-1]
        }
    if category == "parameter_hallucination" and arguments:
        other = {
            name: names[names[0] == name] for kind in VALUE_KINDS.values() for names in (kind.names,) for name in names
        }
        wrong = rng.choice(list(arguments))
        return tool_name(tool), {
            other[parameter] if parameter == wrong else parameter: value for parameter, value in arguments.items()
        }
    strings = [parameter for parameter, value in arguments.items() if isinstance(value, str)]
    if category == "tool_call_failure" and strings:
        return tool_name(tool), {**arguments, strings[0]: noun}
    return None


def draw_dialogue(
    rng: random.Random, pool: list[dict], request_count: int | None = None, error_rate: float = TEACHER_ERROR_RATE
) -> tuple[list[dict], str, list[tuple[str, dict, str]]]:
    """(tools, query, [(name, arguments, feedback)]): 1-3 requests, the teacher's failing calls among the calls,
    `finish` last."""
    targets = rng.sample(pool, request_count or rng.choices((1, 2, 3), weights=(70, 22, 8))[0])
    tools = draw_tool_list(rng, targets, pool, max(rng.choice((3, 3, 4)), len(targets) + 1))
    requests, calls, answers = [], [], []
    for tool in targets:
        request, arguments = draw_request(rng, tool)
        requests.append(request)
        failing = teacher_error(rng, tool, arguments, error_rate)
        if failing:
            calls.append((*failing, execute(tools, *failing)))
        calls += right_calls(tools, tool, arguments, error_rate)
        answers.append(f"{name_parts(tool)[1]} : {json.loads(calls[-1][2])['result']}")
    calls.append(("finish", {"answer": " and ".join(answers)}, ""))
    return tools, " . then ".join(requests), calls


def right_calls(
    tools: list[dict], tool: dict, arguments: dict, error_rate: float = TEACHER_ERROR_RATE
) -> list[tuple[str, dict, str]]:
    """The right call with its feedback, and once more where the tool was unstable: [(name, arguments, feedback)]."""
    calls = []
    for attempt in (0, 1):
        calls.append((tool_name(tool), arguments, execute(tools, tool_name(tool), arguments, attempt, error_rate)))
        if "error" not in json.loads(calls[-1][2]):
            break
    return calls


def raw_record(index: int, tools: list[dict], query: str, calls: Sequence[tuple[str, dict, str]]) -> dict:
    """A dialogue in the authors' raw format."""
    conversations = [
        {"role": "system", "content": json.dumps([tool["function"] for tool in tools])},
        {"role": "user", "content": query},
    ]
    for name, arguments, feedback in calls:
        conversations.append({"role": "assistant", "content": f"{name}\n{json.dumps(arguments)}"})
        conversations.append({"role": "function", "content": feedback})
    return {"id": f"toolbox-{index:05d}", "conversations": conversations[:-1]}  # nothing answers `finish`


def draw_trajectories(seed: int, count: int, error_rate: float = TEACHER_ERROR_RATE) -> Iterator[dict]:
    """`count` training records in the authors' raw format over the seen toolbox."""
    rng, pool = random.Random(seed), build_toolbox(unseen=False)
    for index in range(count):
        yield raw_record(index, *draw_dialogue(rng, pool, error_rate=error_rate))


def example_record(name: str, tools: list[dict], request: str, target: dict, arguments: dict) -> dict:
    """A line of a single-turn test file."""
    gold = [{"calls": [{"name": tool_name(target), "arguments": arguments}], "order_free": False}]
    return {
        "id": name,
        "tools": tools,
        "messages": [{"role": "user", "content": request}],
        "gold": gold,
        "meta": {"qualifier": name_parts(target)[2]},
    }


def draw_test_examples(seed: int, count: int, unseen: bool, hard: bool = False) -> Iterator[dict]:
    """`count` single-turn examples: one request, its gold call, look-alike tools from the same toolbox.

    With `hard` the right tool is one whose first call the teacher often gets wrong; an unstable one is called right.
    """
    rng, pool = random.Random(seed), build_toolbox(unseen)
    wrong = {qualifier for qualifier, category in HARD_QUALIFIERS.items() if category != "tool_instability"}
    targets = [tool for tool in pool if name_parts(tool)[2] in wrong] if hard else pool
    name = "tiny-hard" if hard else "tiny-unseen" if unseen else "tiny-seen"
    for index in range(count):
        target = rng.choice(targets)
        tools = draw_tool_list(rng, [target], pool, rng.choice((3, 3, 4)))
        request, arguments = draw_request(rng, target)
        yield example_record(f"{name}-{index:03d}", tools, request, target, arguments)


def draw_multi_tasks(
    seed: int, count: int, unseen: bool, request_count: int, known_queries: Collection[str]
) -> Iterator[dict]:
    """`count` multi-turn tasks of `request_count` requests each on the tools of one toolbox; no query of
    `known_queries` and none twice.

    `meta`: `scenario` ("seen" or "unseen" tools), `requests`, `calls` (the right call of each request, in order),
    `results` (what each gives, all different, so that an answer shows which calls were made), `answer` (of the
    teacher), `attempts` (how many calls the task takes at least: an unstable tool fails the first time).
    """
    rng, pool, drawn = random.Random(seed), build_toolbox(unseen), set(known_queries)
    scenario = "unseen" if unseen else "seen"
    for index in range(count):
        results: list[str] = []
        while True:
            tools, query, made = draw_dialogue(rng, pool, request_count)
            right = [call for call in made[:-1] if call[2].startswith('{"result"')]
            results = [json.loads(feedback)["result"] for _, _, feedback in right]
            if query not in drawn and len(set(results)) == len(results) and not any(map(query.count, results)):
                break
        drawn.add(query)
        calls = [{"name": name, "arguments": arguments} for name, arguments, _ in right]
        attempts = sum({"name": name, "arguments": arguments} in calls for name, arguments, _ in made[:-1])
        yield {
            "id": f"tiny-multi-{scenario}-{request_count}-{index:03d}",
            "tools": tools,
            "messages": [{"role": "user", "content": query}],
            "meta": {
                "scenario": scenario,
                "requests": request_count,
                "calls": calls,
                "results": results,
                "answer": made[-1][1]["answer"],
                "attempts": attempts,
            },
        }
