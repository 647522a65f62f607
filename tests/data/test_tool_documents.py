"""data/tool_documents.py: each published form against the OpenAI form of the same tool, written by hand."""

import copy
import json
import random

import pytest

from data.error_filter import classify_feedback
from data.formats.tl import render_tools
from data.json_records import DataError
from data.tool_calls import ToolCall
from data.tool_documents import accepts_any_parameter, normalize_tools, tool_parameters
from rl.reward import tool_call_reward

TITLE = {"type": "string", "description": "its title"}
YEAR = {"type": "integer", "description": "of print"}
SCHEMA = {"type": "object", "properties": {"title": TITLE, "year": YEAR}, "required": ["title"]}
WORDS = {"name": "find_book", "description": "Finds a book."}
EXPECTED = {"type": "function", "function": {**WORDS, "parameters": SCHEMA}}


def read(*tools: object) -> list[dict]:
    return normalize_tools(list(tools), "tools")


# ---------------------------------------------------------------------------------------------------------------------
# The forms

FORMS = {
    "openai": EXPECTED,
    "openai flat": {**WORDS, "parameters": SCHEMA},
    "openai responses": {"type": "function", **WORDS, "parameters": SCHEMA},
    "parameters beside function": {"type": "function", "function": WORDS, "parameters": SCHEMA},
    "required beside parameters": {
        **WORDS,
        "parameters": {"type": "object", "properties": SCHEMA["properties"]},
        "required": ["title"],
    },
    "function is null beside a flat tool": {"type": None, "function": None, **WORDS, "parameters": SCHEMA},
    "function as text": {"type": "function", "function": json.dumps({**WORDS, "parameters": SCHEMA})},
    "parameters as text": {**WORDS, "parameters": json.dumps(SCHEMA)},
    "properties as text": {**WORDS, "parameters": {**SCHEMA, "properties": json.dumps(SCHEMA["properties"])}},
    "tool as text": json.dumps(EXPECTED),
    "anthropic": {**WORDS, "input_schema": SCHEMA},
    "anthropic with type": {"type": "custom", **WORDS, "input_schema": SCHEMA, "cache_control": {"type": "ephemeral"}},
    "anthropic null beside": {**WORDS, "input_schema": SCHEMA, "parameters": None},
    "mcp": {**WORDS, "inputSchema": SCHEMA, "annotations": {"readOnlyHint": True}, "outputSchema": {"type": "object"}},
    "bedrock": {"toolSpec": {**WORDS, "inputSchema": {"json": SCHEMA}}},
    "bedrock without toolSpec": {**WORDS, "inputSchema": {"json": json.dumps(SCHEMA)}},
    "bedrock toolConfig": {"tools": [{"toolSpec": {**WORDS, "inputSchema": {"json": SCHEMA}}}]},
    "toolbench": {
        **WORDS,
        "required_parameters": [{"name": "title", "type": "STRING", "description": "its title", "default": None}],
        "optional_parameters": [{"name": "year", "type": "INTEGER", "description": "of print"}],
        "method": "GET",
    },
    "toolbench as text": {
        **WORDS,
        "required_parameters": json.dumps([{"name": "title", **TITLE}]),
        "optional_parameters": json.dumps([{"name": "year", **YEAR}]),
    },
    "xlam": {
        **WORDS,
        "parameters": {
            "title": {"type": "str", "description": "its title"},
            "year": {"type": "int, optional", "description": "of print"},
        },
    },
    "xlam optional type": {
        **WORDS,
        "parameters": {
            "title": {"type": "str", "description": "its title"},
            "year": {"type": "Optional[int]", "description": "of print"},
        },
    },
    "xlam beside type object": {
        **WORDS,
        "parameters": {"type": "object", "title": TITLE, "year": {**YEAR, "required": False}, "required": ["title"]},
    },
    "list": {
        **WORDS,
        "parameters": [{"name": "title", **TITLE, "required": True}, {"name": "year", **YEAR, "required": False}],
    },
    "list as openapi": {
        **WORDS,
        "parameters": [
            {
                "name": "title",
                "in": "query",
                "required": True,
                "description": "its title",
                "schema": {"type": "string"},
            },
            {"name": "year", "in": "query", "description": "of print", "schema": {"type": "integer"}},
        ],
    },
    "required inside properties": {
        **WORDS,
        "parameters": {
            "type": "object",
            "properties": {"title": {**TITLE, "required": True}, "year": {**YEAR, "required": False}},
        },
    },
    "gemini": {
        "function_declarations": [
            {
                **WORDS,
                "parameters": {
                    "type": "OBJECT",
                    "properties": {"title": {**TITLE, "type": "STRING"}, "year": {**YEAR, "type": "INTEGER"}},
                    "required": ["title"],
                },
            }
        ]
    },
    "cohere": {
        **WORDS,
        "parameter_definitions": {
            "title": {"type": "str", "description": "its title", "required": True},
            "year": {"type": "int", "description": "of print", "required": False},
        },
    },
    "xlam with required beside": {**WORDS, "parameters": {"title": TITLE, "year": YEAR}, "required": ["title"]},
    "properties beside name": {**WORDS, "properties": SCHEMA["properties"], "required": ["title"]},
    "null-padded": {
        "type": "function",
        "function": {
            **WORDS,
            "strict": None,
            "parameters": {
                **SCHEMA,
                "$defs": None,
                "additionalProperties": None,
                "properties": {
                    "title": {**TITLE, "enum": None},
                    "year": {**YEAR, "items": None},
                    "city": None,
                    "zip": {"type": None},
                },
            },
        },
        "parameters": None,
    },
    "$ref of the whole": {**WORDS, "parameters": {"$ref": "#/$defs/Arguments", "$defs": {"Arguments": SCHEMA}}},
    "$ref of a parameter": {
        **WORDS,
        "parameters": {
            **SCHEMA,
            "properties": {"title": {"$ref": "#/definitions/Title"}, "year": {"$ref": "#/definitions/Year", **YEAR}},
            "definitions": {"Title": {"$ref": "#/definitions/Text"}, "Text": TITLE, "Year": {"type": "number"}},
        },
    },
    "$defs beside parameters": {
        **WORDS,
        "parameters": {**SCHEMA, "properties": {"title": {"$ref": "#/$defs/a~1b"}, "year": YEAR}},
        "$defs": {"a/b": TITLE},
    },
    "allOf": {
        **WORDS,
        "parameters": {
            "type": "object",
            "allOf": [
                {"properties": {"title": TITLE}, "required": ["title"]},
                {"type": "object", "properties": {"year": YEAR}},
            ],
        },
    },
    "anyOf with null": {**WORDS, "parameters": {"anyOf": [SCHEMA, {"type": "null"}]}},
    "oneOf": {
        **WORDS,
        "parameters": {
            "oneOf": [
                {"type": "object", "properties": {"title": TITLE}, "required": ["title"]},
                {"type": "object", "properties": {"title": TITLE, "year": YEAR}, "required": ["title", "year"]},
            ]
        },
    },
    "anyOf that only requires": {
        **WORDS,
        "parameters": {**SCHEMA, "anyOf": [{"required": ["title"]}, {"required": ["year"]}]},
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_function_of_the_openai_form(form):
    document = copy.deepcopy(FORMS[form])
    (tool,) = read(document)
    function = {key: value for key, value in tool["function"].items() if key not in ("strict", "$defs")}
    assert tool["type"] == "function" and function == EXPECTED["function"], function
    assert document == FORMS[form]  # the input is untouched
    assert read(tool) == [tool]  # and reading what was read changes nothing
    assert "def find_book(title: string, year: integer = None):" in render_tools([tool])
    call = ToolCall("find_book", {"title": "Ulysses", "year": 1922})
    assert classify_feedback("fine", call, [tool]) == "all_right"
    assert classify_feedback("fine", ToolCall("find_book", {"title": "x", "city": "y"}), [tool]) == (
        "parameter_hallucination"
    )
    assert classify_feedback("fine", ToolCall("find_book", {"year": 1}), [tool]) == "parameter_missing"


def test_lists_of_tools_in_lists_in_text_and_in_wrappers():
    assert normalize_tools(json.dumps([[EXPECTED], json.dumps([EXPECTED])]), "tools") == [EXPECTED, EXPECTED]
    assert normalize_tools({"functionDeclarations": [WORDS, EXPECTED["function"]]}, "tools")[1] == EXPECTED
    assert normalize_tools([], "tools") == []
    assert read(EXPECTED, EXPECTED) == [EXPECTED, EXPECTED]  # RoTBench has equal names


def test_parameters_with_the_names_of_schema_keywords():
    """xLAM documents have parameters called `type`, `title` or `properties`; a schema has keywords of these names."""
    flat = {
        name: {"type": "str", "description": "d"} for name in ("type", "title", "required", "properties", "default")
    }
    (tool,) = read({"name": "f", "parameters": flat})
    properties, required = tool_parameters(tool["function"])
    assert list(properties) == list(flat) and required == list(flat)
    assert all(schema == {"type": "string", "description": "d"} for schema in properties.values())
    inside = {"type": "object", "properties": {name: {"type": "string"} for name in ("type", "$ref", "allOf")}}
    inside["properties"] |= {"properties": {"type": "object"}}
    (tool,) = read({"name": "f", "parameters": inside})
    assert list(tool_parameters(tool["function"])[0]) == ["type", "$ref", "allOf", "properties"]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("str", "string"),
        ("STRING", "string"),
        ("float", "number"),
        ("bool", "boolean"),
        ("list", "array"),
        ("Dict[str, int]", "object"),
        ("Tuple[int, int]", "array"),
        ("date", "date"),  # not known: as written
        ("int or str", "int or str"),
    ],
)
def test_python_names_of_types(kind, expected):
    (tool,) = read({"name": "f", "parameters": {"x": {"type": kind}}})
    assert tool["function"]["parameters"]["properties"] == {"x": {"type": expected}}


def test_generic_any_and_optional_types():
    (tool,) = read(
        {"name": "f", "parameters": {"a": {"type": "List[int]"}, "b": {"type": "Any"}, "c": {"type": "str, optional"}}}
    )
    assert tool["function"]["parameters"] == {
        "type": "object",
        "properties": {"a": {"type": "array", "items": {"type": "integer"}}, "b": {}, "c": {"type": "string"}},
        "required": ["a", "b"],
    }
    assert read({"name": "f", "parameters": {"city": "string", "days": "int, optional"}})[0]["function"][
        "parameters"
    ] == {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city"],
    }


def test_alternatives_of_one_parameter_stay_alternatives():
    branches = [{"properties": {"x": {"type": kind}}, "required": ["x"]} for kind in ("string", "integer", "string")]
    (tool,) = read({"name": "f", "parameters": {"type": "object", "anyOf": branches}})
    assert tool["function"]["parameters"] == {
        "type": "object",
        "properties": {"x": {"anyOf": [{"type": "string"}, {"type": "integer"}]}},
        "required": ["x"],
    }


# ---------------------------------------------------------------------------------------------------------------------
# Open schemas


@pytest.mark.parametrize(
    ("parameters", "is_open"),
    [
        ({"type": "object"}, True),
        ({}, True),
        ({"type": "object", "properties": None}, True),
        ({"type": "object", "additionalProperties": True}, True),
        ({**SCHEMA, "additionalProperties": True}, True),
        ({**SCHEMA, "additionalProperties": {"type": "string"}}, True),
        ({**SCHEMA, "additionalProperties": {}}, True),
        ({"anyOf": [SCHEMA, {"type": "object", "additionalProperties": True}]}, True),
        (SCHEMA, False),
        ({**SCHEMA, "additionalProperties": False}, False),
        ({"type": "object", "additionalProperties": False}, False),
        ({"type": "object", "properties": {}}, False),
        ([], False),
        (None, False),
    ],
)
def test_open_documents_have_no_hallucinated_parameter(parameters, is_open):
    (tool,) = read({"name": "f", "parameters": parameters})
    call = ToolCall("f", {"title": "x", "anything": 1})
    assert accepts_any_parameter(tool["function"]) is is_open
    assert read(tool) == [tool]
    assert classify_feedback("fine", call, [tool]) == ("all_right" if is_open else "parameter_hallucination")
    if is_open or not parameters:
        gold = ToolCall("f", {"title": "x"})
        expected = "redundant_parameter" if is_open else "hallucinated_parameter"
        assert tool_call_reward('f(title="x", anything=1)', [gold], [tool]).category == expected


def test_an_open_document_still_requires_what_it_requires():
    (tool,) = read({"name": "f", "parameters": {"type": "object", "required": ["q"], "additionalProperties": True}})
    assert classify_feedback("fine", ToolCall("f", {"z": 1}), [tool]) == "parameter_missing"
    assert "def f(q: any):" in render_tools([tool])


def test_documents_that_no_reader_has_touched_are_judged_alike():
    raw = {"function": {"name": "f", "parameters": {"type": "object"}}}
    assert classify_feedback("fine", ToolCall("f", {"q": 1}), [raw]) == "all_right"
    assert (
        classify_feedback("fine", ToolCall("f", {"q": 1}), [{"function": {"name": "f"}}]) == "parameter_hallucination"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Refused


def chain(length: int) -> dict:
    """Definitions of which each refers to the next one twice: 2 ** length parts once expanded."""
    steps = {f"d{i}": {"properties": {name: {"$ref": f"#/$defs/d{i + 1}"} for name in "ab"}} for i in range(length)}
    return {"properties": {"x": {"$ref": "#/$defs/d0"}}, "$defs": {**steps, f"d{length}": {"type": "string"}}}


def nested(levels: int) -> dict:
    schema: dict = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return {"properties": {"x": schema}}


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({"parameters": {"$ref": "#/$defs/A", "$defs": {"A": {"$ref": "#/$defs/A"}}}}, "cyclic $ref '#/$defs/A'"),
        (
            {"parameters": {"$ref": "#/$defs/A", "$defs": {"A": {"properties": {"a": {"$ref": "#/$defs/A"}}}}}},
            "cyclic $ref",
        ),
        ({"parameters": {"properties": {"a": {"$ref": "#"}}}}, "cyclic $ref '#'"),
        ({"parameters": {"properties": {"a": {"$ref": "#/$defs/B"}}}}, "unresolvable $ref '#/$defs/B'"),
        ({"parameters": {"$ref": "https://example.org/x.json"}}, "unresolvable $ref"),
        ({"parameters": {"properties": {"a": {"$ref": "#/$defs/B"}}, "$defs": {"B": 3}}}, "found a number"),
        ({"parameters": chain(20)}, "more than 20000 parts"),
        ({"parameters": nested(200)}, "more than 100 levels"),
        ({"parameters": {"allOf": [{"properties": {"a": {"type": t}}} for t in ("string", "integer")]}}, "allOf"),
        ({"parameters": SCHEMA, "input_schema": SCHEMA}, "under 'parameters' and 'input_schema'"),
        ({"function": {"name": "f", "parameters": SCHEMA}, "parameters": {"properties": {}}}, "two different"),
        ({"api_parameters": [{"name": "a"}]}, "'api_parameters' and no 'parameters'"),
        ({"signature": "f(title: str)"}, "'signature' and no 'parameters'"),
        ({"type": "web_search_20250305"}, "type 'web_search_20250305' without parameters"),
        ({"type": "custom", "format": {"type": "text"}}, "type 'custom' without parameters"),
        ({"parameters": {"a": {"type": "str", "required": "maybe"}}}, "required: found 'maybe'"),
        ({"parameters": {"properties": {"a": {"required": "maybe"}}}}, "required: found 'maybe'"),
        ({"argument_schema": SCHEMA}, "'argument_schema' and no 'parameters'"),
        ({"required_parameters": "x"}, "required_parameters: found 'x'"),
        ({"required_parameters": [{"type": "STRING"}]}, "expected a parameter object with a name"),
        ({"required_parameters": [{"name": "a"}], "optional_parameters": [{"name": "a"}]}, "as required and as"),
        ({"parameters": [{"name": "a"}, {"name": "a"}]}, "'a' again"),
        ({"parameters": ["title"]}, "parameters[0]"),
        ({"parameters": "title: str"}, "parameters: found 'title: str'"),
        ({"parameters": "[1]"}, "parameters[0]: found 1"),
        ({"parameters": {"properties": {"a": False}}}, "'a': found a boolean"),
        ({"parameters": {"properties": {"a": 3}}}, "'a': found a number"),
        ({"parameters": {"properties": {}, "required": True}}, "required: found True"),
        ({"function": "find_book"}, "function: found 'find_book'"),
        ({"function": "[]"}, "expected a function object"),
        ({"parameters": {"properties": {"a\ud800": {}}}}, "lone surrogate"),
        ({"description": {"en": "x"}}, "description: found an object"),
    ],
    ids=lambda value: ascii(value)[:50],
)
def test_what_cannot_be_read_is_named_in_one_line(document, words):
    with pytest.raises(DataError) as raised:
        read({"name": "f", **document})
    message = str(raised.value)
    assert message.startswith("tools[0]") and words in message and "\n" not in message, message
    assert "found" in message and "expected" in message and message.isascii() and message.isprintable()


@pytest.mark.parametrize(
    "tool", [None, 3, {}, {"type": "web_search"}, {"type": "custom", "custom": {"name": "f"}}, {"api_name": "f"}, "f"]
)
def test_tools_without_a_name_or_of_another_kind_are_refused(tool):
    with pytest.raises(DataError, match=r"^tools\[0\]: found .* expected "):
        read(tool)


# ---------------------------------------------------------------------------------------------------------------------
# Property


def _random_document(rng: random.Random) -> tuple[dict, dict, list[str]]:
    names = rng.sample(["title", "type", "year", "city", "required", "name", "properties", "q", "$ref", "json"], 4)
    kinds = ["string", "integer", "number", "boolean", "array", "object"]
    properties = {
        name: {"type": rng.choice(kinds), "description": f"the {name}"} for name in names[: rng.randint(1, 4)]
    }
    required = [name for name in properties if rng.random() < 0.5]
    words = {"name": f"tool_{rng.randint(0, 99)}", "description": rng.choice(["", "Does it.", "Tut es."])}
    return words, properties, required


@pytest.mark.parametrize("seed", range(200))
def test_a_document_in_any_form_is_the_same_function(seed):
    """Wrappers, texts and spec lists of one random document; the expected function is put together here, not read."""
    rng = random.Random(seed)
    words, properties, required = _random_document(rng)
    schema = {"type": "object", "properties": properties, "required": required}
    expected = {"type": "function", "function": {**words, "parameters": schema}}
    specs = [{"name": name, **spec} for name, spec in properties.items()]
    flagged = [{**spec, "required": spec["name"] in required} for spec in specs]
    python = {
        "string": "str",
        "integer": "int",
        "number": "float",
        "boolean": "bool",
        "array": "list",
        "object": "dict",
    }
    flat = {
        name: {**spec, "type": python[spec["type"]] + ("" if name in required else ", optional")}
        for name, spec in properties.items()
    }
    in_order = sorted(specs, key=lambda spec: spec["name"] not in required)
    forms = [
        expected,
        {**words, "parameters": json.dumps(schema)},
        {**words, "input_schema": schema},
        {"toolSpec": {**words, "inputSchema": {"json": schema}}},
        {**words, "parameters": {"$ref": "#/$defs/X", "$defs": {"X": schema}}},
        {**words, "parameters": {"allOf": [schema]}},
        {**words, "parameters": flagged},
        {**words, "parameters": flat},
        {
            **words,
            "required_parameters": [spec for spec in in_order if spec["name"] in required],
            "optional_parameters": [spec for spec in in_order if spec["name"] not in required],
        },
    ]
    for form in forms:
        (tool,) = read(form)
        if "required_parameters" in form:  # this form has its own order
            assert list(tool_parameters(tool["function"])[0])[: len(required)] == required
        assert tool == expected, form


@pytest.mark.parametrize(
    ("parameters", "properties", "required"),
    [
        (
            {"title": "string", "year": "int"},
            {"title": {"type": "string"}, "year": {"type": "integer"}},
            ["title", "year"],
        ),
        ({"description": "Finds a book.", "year": "int"}, {"year": {"type": "integer"}}, ["year"]),
        (
            {"title": "Required. string. Its title.", "year": "integer. Of print."},
            {
                "title": {"type": "string", "description": "Its title."},
                "year": {"type": "integer", "description": "Of print."},
            },
            ["title"],
        ),
        (
            {"title": "What the book is called.", "year": "int, optional"},
            {"title": {"description": "What the book is called."}, "year": {"type": "integer"}},
            ["title"],
        ),
        (
            {"title": {"type": "str", "required": "True"}, "year": {"type": "int", "required": "no"}},
            {"title": {"type": "string"}, "year": {"type": "integer"}},
            ["title"],
        ),
        (
            [
                {"name": "title", "type": "str", "is_required": True},
                {"name": "year", "type": "int", "is_required": False},
            ],
            {"title": {"type": "string"}, "year": {"type": "integer"}},
            ["title"],
        ),
        (
            {"type": "object", "properties": {"title": {"required": "true"}, "year": {"required": "false"}}},
            {"title": {}, "year": {}},
            ["title"],
        ),
        (
            {"properties": {"title": TITLE}, "dependentSchemas": {"title": {"properties": {"year": YEAR}}}},
            {"title": TITLE, "year": YEAR},
            [],
        ),
    ],
)
def test_texts_and_flags_as_parameters(parameters, properties, required):
    """ToolAlpaca's and other short forms; a parameter called title is no annotation."""
    (tool,) = read({**WORDS, "parameters": parameters})
    read_parameters = tool["function"]["parameters"]
    assert (read_parameters["properties"], read_parameters["required"]) == (properties, required)


def test_pattern_properties_make_a_document_open():
    parameters = {"properties": {"a": {}}, "patternProperties": {"^t": {}}, "additionalProperties": False}
    tools = read({**WORDS, "parameters": parameters})
    assert classify_feedback("yes", ToolCall("find_book", {"title": "x"}), tools) == "all_right"
