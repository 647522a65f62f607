"""Records of every form with random parts replaced: each is read, or refused in one printable line; nothing crashes."""

import copy
import json
import random

import pytest

from data.error_filter import decide_masked_turns
from data.formats.tl import render_tools
from data.json_records import DataError
from data.trajectories import read_trajectories
from tests.data.test_message_forms import FORMS as MESSAGE_FORMS
from tests.data.test_tool_documents import FORMS as TOOL_FORMS
from tests.data.test_trajectories import AUTHORS

RECORDS = [AUTHORS, *MESSAGE_FORMS.values(), *({**MESSAGE_FORMS["openai"], "tools": [t]} for t in TOOL_FORMS.values())]
JUNK = [
    *(None, True, False, 0, 1, -1, 2.5, "", "x", "[", "{}", "[]", "null", "\ud800", "find_book", [], {}, [[]], [None]),
    *({"a": None}, {"type": "object"}, {"type": "str"}, {"$ref": "#"}, {"$ref": 3}, [{"name": "a"}], {"required": 3}),
    *(
        {"anyOf": 3},
        {"anyOf": [3, None, {"properties": 3}]},
        {"allOf": [{"properties": []}]},
        {"properties": {"a": None}},
    ),
]
KEYS = (
    "type name properties required parameters $ref allOf anyOf oneOf if then additionalProperties items content role "
    "tool_calls function_call weight train tools functions system id from value tool_use_id arguments input default "
    "enum nullable $defs definitions"
).split()


def places(value: object) -> list[tuple]:
    """(container, key) of everything inside `value`."""
    pairs = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    return [(value, key) for key, _ in pairs] + [place for _, inner in pairs for place in places(inner)]


def spoil(record: dict, rng: random.Random) -> None:
    """Replace, rename, add or write as JSON text one part of the record."""
    container, key = rng.choice(places(record) or [(record, "id")])
    draw = rng.random()
    if draw < 0.55:
        container[key] = copy.deepcopy(rng.choice(JUNK))
    elif draw < 0.7 and isinstance(container, dict):
        container[rng.choice(KEYS)] = copy.deepcopy(rng.choice(JUNK))
    elif draw < 0.85 and isinstance(container[key], (dict, list)):
        container[key] = json.dumps(container[key])
    elif isinstance(container, dict):
        container[rng.choice(KEYS)] = container.pop(key)


@pytest.mark.parametrize("seed", range(10))
def test_spoiled_records_are_read_or_refused(tmp_path, seed):
    rng = random.Random(seed)
    path = tmp_path / "data.jsonl"
    n_read = 0
    for _ in range(300):
        record = copy.deepcopy(rng.choice(RECORDS))
        for _ in range(rng.randint(1, 3)):
            spoil(record, rng)
        path.write_text(json.dumps(record) + "\n", encoding="utf-8")
        try:
            for trajectory in read_trajectories(path, unparsable_calls=rng.choice(["error", "mask"])):
                decide_masked_turns(trajectory, "structured")
                render_tools(trajectory.tools)
            n_read += 1
        except DataError as error:
            message = str(error)
            assert message.startswith(f"{path}:1: ") and "found" in message and "expected" in message, message
            assert message.isascii() and message.isprintable(), message
    assert 20 < n_read < 280  # both happen
