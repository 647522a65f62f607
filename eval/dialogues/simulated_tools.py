"""The simulated tools: what a document alone allows one to say about a call that agrees with it.

    check_types    arguments against the documented types
    draw_outcome   a made-up result shaped by the document, or one of the failures of the paper's Table 14

A result is a function of tool and arguments, a failure of seed, tool, arguments and (if it can pass) attempt. Nothing
in a result is true: reports of figures made with it must say so (docs/multi_turn.md).
"""

import json
import random
import re

from eval.dialogues.local_tools import seed_of

MAX_ECHO_CHARACTERS = 80  # of an argument that a result repeats
MAX_RECORDS = 5
PYTHON_TYPES = {  # documented type -> Python types that JSON gives for it
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
    # ToolEyes documents every parameter as a string, and its tools, Python functions, take numbers as well.
    "string": (str, int, float, bool, type(None)),
}

_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+")
_VERBS = frozenset(
    (
        "get",
        "fetch",
        "search",
        "find",
        "list",
        "show",
        "return",
        "retrieve",
        "query",
        "lookup",
        "look",
        "check",
        "calculate",
        "compute",
        "convert",
        "make",
        "create",
        "generate",
        "random",
        "all",
        "by",
        "of",
        "for",
        "the",
        "a",
        "an",
        "to",
        "from",
        "and",
        "in",
        "with",
        "api",
    )
)
_LIST_WORDS = frozenset(
    ("list", "all", "array", "several", "recent", "upcoming", "latest", "top", "trending", "multiple", "records")
)
_FLAG_WORDS = frozenset(("check", "is", "validate", "verify", "has"))
_TEXT_WORDS = frozenset(
    (
        "joke",
        "quote",
        "advice",
        "text",
        "translate",
        "translation",
        "summary",
        "definition",
        "fact",
        "lyrics",
        "bio",
        "sentence",
        "explanation",
        "instructions",
    )
)
_NUMBER_WORDS = frozenset(
    (
        "count",
        "price",
        "rate",
        "convert",
        "calculate",
        "distance",
        "total",
        "score",
        "amount",
        "average",
        "calories",
        "age",
        "probability",
        "similarity",
        "percentage",
        "value",
    )
)
_SECRETS = frozenset(
    ("key", "apikey", "token", "secret", "password", "passwd", "auth", "authorization", "proxy", "host")
)
_PAGING = frozenset(
    (
        "limit",
        "offset",
        "page",
        "size",
        "cnt",
        "count",
        "sort",
        "order",
        "fields",
        "format",
        "callback",
        "locale",
        "lang",
        "language",
    )
)
_COUNTS = ("limit", "count", "cnt", "number", "num", "size", "page_size", "per_page", "max_results")
_ADJECTIVES = (
    "Amber",
    "Brisk",
    "Calm",
    "Distant",
    "Early",
    "Fair",
    "Gentle",
    "Hollow",
    "Inner",
    "Lively",
    "Northern",
    "Open",
    "Plain",
    "Quiet",
    "Silver",
    "Upper",
)
_NOUNS = (
    "Anchor",
    "Bridge",
    "Canyon",
    "Delta",
    "Field",
    "Garden",
    "Harbor",
    "Island",
    "Lantern",
    "Meadow",
    "Orchard",
    "River",
    "Summit",
    "Tower",
    "Valley",
    "Willow",
)
_SENTENCES = (
    "It is known in many places and seldom asked about.",
    "The short version is the one most people keep.",
    "A second look tells more than the first.",
    "It begins small and grows with use.",
    "Those who wait for it find it sooner.",
    "It works best in the morning.",
)


def check_types(properties: dict, arguments: dict) -> str:
    """What is wrong with the first argument that is not of its documented type or choice; "" if none.

    A documented string may be any single value; documents without a type, or with an unknown one, allow all.
    """
    for name, value in arguments.items():
        document = properties.get(name)
        if not isinstance(document, dict):
            continue
        kind = document.get("type")
        types = PYTHON_TYPES.get(kind, ()) if isinstance(kind, str) else ()
        is_right = (
            not types or isinstance(value, types) and not (isinstance(value, bool) and kind in ("integer", "number"))
        )
        if not is_right and not (kind == "integer" and isinstance(value, float) and value.is_integer()):
            return f"{name[:100]} must be {kind}, not {type(value).__name__}"
        choices = document.get("enum")
        if isinstance(choices, list) and choices and value not in choices:
            return f"{name[:100]} must be one of {json.dumps(choices)[:200]}"
    return ""


def draw_outcome(
    tool_set: str,
    document: dict,
    arguments: dict,
    attempt: int,
    *,
    seed: int,
    instability_rate: float,
    failure_rate: float,
) -> tuple[str, str]:
    """(category, feedback) of a call that its document allows.

    A call that cannot be done fails at every attempt; an unstable tool may work the next time. Both rates are shares
    of all calls, and neither depends on which calls came before.
    """
    call = [tool_set, document.get("name"), arguments]
    chance = random.Random(seed_of(seed, "failure", call)).random()
    if chance < failure_rate:
        return "tool_call_failure", _failure(random.Random(seed_of(seed, "failure text", call)))
    rng = random.Random(seed_of(seed, "instability", call, attempt))
    if instability_rate > 0.0 and rng.random() < instability_rate / (1.0 - failure_rate):
        return "tool_instability", _instability(rng, str(document.get("name"))[:80])
    return "all_right", json.dumps({"result": draw_result(tool_set, document, arguments)})


def _failure(rng: random.Random) -> str:
    return rng.choice(
        (
            '{"error": "Response error."}',
            "Object of type SerpResults is not JSON serializable",
            "'related_searches'",
            "slice indices must be integers or None or have an __index__ method",
        )
    )


def _instability(rng: random.Random, name: str) -> str:
    refused = "(Caused by NewConnectionError('Failed to establish a new connection'))"
    return rng.choice(
        (
            f"HTTPSConnectionPool(host='api.example.com', port=443): Max retries exceeded with url: /{name} {refused}",
            '{"error": "connection error."}',
            f"500 Server Error: Internal Server Error for url: https://api.example.com/{name}",
        )
    )


# ---------------------------------------------------------------------------------------------------------------------
# Results


def draw_result(tool_set: str, document: dict, arguments: dict) -> object:
    """A result in the shape that name, description and parameters suggest: truth value, number, text, record, list.

    Records hold what the call asked for (its arguments except secrets and paging) and drawn values for documented
    parameters that it left out.
    """
    name = str(document.get("name"))
    rng = random.Random(seed_of(tool_set, name, arguments))
    words = [word.lower() for word in _WORD.findall(name)]
    topic_words = [word for word in words if word not in _VERBS] or words or ["result"]
    said = {*words, *(word.lower() for word in _WORD.findall(str(document.get("description")))[:40])}
    topic = "_".join(topic_words[:3])
    echoed = {
        key: _echo(value)
        for key, value in arguments.items()
        if not _SECRETS & _parts(key) and not _PAGING & _parts(key)
    }
    if words and words[0] in _FLAG_WORDS:
        return {topic: rng.random() < 0.5, **echoed}
    is_plural = topic_words[-1].endswith("s") and not topic_words[-1].endswith("ss")
    if words[:1] == ["search"] or _LIST_WORDS & said or is_plural:
        return {topic: [_record(rng, document, {}) for _ in range(_count(rng, arguments))], **echoed}
    if _TEXT_WORDS & said:
        return {topic: " ".join(rng.sample(_SENTENCES, 2)), **echoed}
    if _NUMBER_WORDS & said:
        return {topic: round(rng.uniform(1, 1000), 2), **echoed}
    return _record(rng, document, echoed)


def _record(rng: random.Random, document: dict, echoed: dict) -> dict:
    record = {"id": rng.randint(1000, 9999), "name": f"{rng.choice(_ADJECTIVES)} {rng.choice(_NOUNS)}", **echoed}
    properties = (document.get("parameters") or {}).get("properties") or {}
    drawn = [key for key in properties if key not in record and not (_SECRETS | _PAGING) & _parts(key)]
    return record | {key: _draw_value(rng, key) for key in drawn[:4]}


def _draw_value(rng: random.Random, key: str) -> str | int | float:
    """A value that a parameter of this name may have."""
    parts = _parts(key)
    if parts & {"date", "day", "time", "start", "end", "since", "until"}:
        return f"2024-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"
    if parts & {"url", "link", "image", "img", "photo", "icon"}:
        return f"https://example.com/{rng.randint(1000, 9999)}"
    if parts & {"lat", "latitude", "lon", "lng", "longitude"}:
        return round(rng.uniform(-90, 90), 4)
    if parts & {"id", "number", "year", "price", "amount", "rank", "season", "age", "height", "weight"}:
        return rng.randint(1, 2000)
    if "email" in parts:
        return f"{rng.choice(_NOUNS).lower()}@example.com"
    return f"{rng.choice(_ADJECTIVES)} {rng.choice(_NOUNS)}"


def _parts(key: str) -> set[str]:
    return {word.lower() for word in _WORD.findall(key)} | {key.lower()}


def _count(rng: random.Random, arguments: dict) -> int:
    """How many records: what the call asks for, at most MAX_RECORDS."""
    asked = next((arguments[name] for name in _COUNTS if name in arguments), None)
    digits = re.fullmatch(r"\d{1,4}", str(asked).strip())
    return min(int(digits[0]), MAX_RECORDS) if digits else rng.randint(2, MAX_RECORDS)


def _echo(value: object) -> object:
    """An argument as a result repeats it: numbers and truth values as they are, other values as text, cut."""
    if value is None or isinstance(value, (bool, int, float)):
        return value if not isinstance(value, int) or abs(value) < 10**15 else str(value)[:MAX_ECHO_CHARACTERS]
    text = value if isinstance(value, str) else json.dumps(value)
    return text[:MAX_ECHO_CHARACTERS]
