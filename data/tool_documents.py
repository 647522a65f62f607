"""Tool documents in every published form to OpenAI function dicts, or one line that says which form cannot be read.

    OpenAI                   {"type": "function", "function": {"name", "description", "parameters": schema}}, or flat
    Anthropic, MCP, Bedrock  the schema under `input_schema` or `inputSchema`, maybe inside {"json": ...}; `toolSpec`
    Gemini                   {"function_declarations": [...]}, types in capitals
    ToolBench                `required_parameters` and `optional_parameters`, lists of {"name", "type", "description"}
    xLAM                     `parameters`: {name: {"type", "description", "default"}}, without a schema around it
    lists                    `parameters`: [{"name", "type", "required"}]

JSON text is read where an object or a list is meant, and null counts as absent (columnar storage pads with it).
A document is never shown without its parameters: what cannot be read raises `DataError`.
"""

import re
from collections.abc import Iterator

from data.json_records import DataError, check_text, kind_of, parse_json
from printable import shown

# Offered in every trajectory, listed or not: the two ways to speak to the user in the authors' data.
IMPLICIT_TOOLS = ("finish", "ask_to_user")

# Where a document may keep its parameters; whatever the key, all forms of `parameters` are read.
_SCHEMA_KEYS = (
    "parameters",
    "input_schema",
    "inputSchema",
    "parametersJsonSchema",
    "parameters_json_schema",
    "args_schema",
    "inputs",
    "args",
    "arguments",
    "params",
    "parameter_definitions",
)
_TOOLBENCH_KEYS = ("required_parameters", "optional_parameters")
_PARAMETER_WORDS = re.compile(
    r"(?:^|_)(?:param|arg|input|schema|propert|signature)|(?<=[a-z])(?:Param|Arg|Input|Schema|Propert|Signature)"
)
_BUILT_IN_TYPE = re.compile(r"custom\Z|\w+_20\d{6}\Z")  # OpenAI's free text tools; Anthropic's web_search_20250305
_RESULT_WORDS = re.compile(r"output|return|response|result|example", re.IGNORECASE)
_MAX_LEVELS = 100  # of a schema; also keeps the recursion far from Python's limit
_MAX_PARTS = 20_000  # of a schema after its $ref are replaced: a few lines can refer to one another exponentially


def normalize_tools(tools: object, where: str) -> list[dict]:
    """Tools as OpenAI function dicts with `parameters` = {"type", "properties", "required", ...}, input untouched.

    `required` is inside `parameters`; a tool that takes any parameter has `additionalProperties` (not false) there.
    Equal tool names are kept (RoTBench has them). Raises DataError, prefixed by `where`, for anything that cannot be
    rendered as a document.
    """
    if isinstance(tools, str):
        tools = parse_json(tools, where)
    if isinstance(tools, dict) and (declared := _declared(tools)) is not None:
        tools = declared
    if not isinstance(tools, list):
        raise DataError(f"{where}: found {kind_of(tools)}, expected a list of tools")
    return [_normalize_tool(tool, place) for tool, place in _flatten(tools, where, 0)]


def offered_names(tools: list[dict]) -> list[str]:
    """Names of the offered tools, each once: those of `tools` in their order, then the implicit ones not among them.

    tools: OpenAI function dicts. One reading of T for the error filter, the key tokens (E3) and the reward.
    """
    names = [tool["function"].get("name") for tool in tools]  # benchmarks have documents without one
    return list(dict.fromkeys([*filter(None, names), *IMPLICIT_TOOLS]))


def tool_parameters(function: dict) -> tuple[dict, list[str]]:
    """(properties, required) of the `function` part of a tool, read leniently: benchmarks have documents of all sorts.

    `required` may be inside `parameters` or next to it; what is absent or null is empty.
    """
    parameters = function.get("parameters") or {}
    required = parameters.get("required")
    required = function.get("required") if required is None else required
    return parameters.get("properties") or {}, list(dict.fromkeys(required or []))


def accepts_any_parameter(function: dict) -> bool:
    """Whether the document is open, so that no parameter is hallucinated.

    Open: `additionalProperties` is true or a schema, `patternProperties` has any, or `parameters` has no `properties`.
    Without `parameters` at all a function takes none (OpenAI's rule).
    """
    parameters = function.get("parameters")
    if not isinstance(parameters, dict):
        return False
    if parameters.get("patternProperties"):
        return True
    additional = parameters.get("additionalProperties")
    return parameters.get("properties") is None if additional is None else additional is not False


# ---------------------------------------------------------------------------------------------------------------------
# Lists and wrappers


def _declared(tool: dict) -> object:
    """The list inside Gemini's {"function_declarations": [...]} or Bedrock's {"tools": [...]}, else None."""
    keys = [key for key in ("function_declarations", "functionDeclarations", "tools") if tool.get(key) is not None]
    return tool[keys[0]] if keys else None


def _flatten(tools: list, where: str, level: int) -> Iterator[tuple[dict, str]]:
    """Every tool of a list with its place: nested lists, JSON text and declarations opened."""
    if level > _MAX_LEVELS:
        raise DataError(f"{where}: found lists of tools inside one another, expected fewer levels")
    for index, tool in enumerate(tools):
        place = f"{where}[{index}]"
        if isinstance(tool, str):
            tool = parse_json(tool, place)
        declared = tool if isinstance(tool, list) else _declared(tool) if isinstance(tool, dict) else None
        if isinstance(declared, list):
            yield from _flatten(declared, place, level + 1)
        else:
            yield tool, place


def _normalize_tool(tool: object, where: str) -> dict:
    function = _unwrap(tool, where)
    name = function.get("name")
    if not isinstance(name, str) or not name.strip():
        found = f"no name among the keys {shown(sorted(function))}" if name is None else shown(name)
        raise DataError(f"{where}: found {found}, expected a tool with a name")
    where = f"{where} ({shown(name)})"
    check_text(name, f"{where}: name")
    check_text(_or_empty(function.get("description"), ""), f"{where}: description")
    keys, is_openai = _parameter_keys(function, where)
    kind = tool.get("type")
    if not keys and isinstance(kind, str) and _BUILT_IN_TYPE.match(kind):
        raise DataError(f"{where}: found a tool of type {shown(kind)} without parameters, expected their schema")
    if is_openai:
        parameters = _read_schema(function.get("parameters"), function, tool, f"{where}: parameters")
        kept = _without(function, "required")
    else:
        if keys[0] in _TOOLBENCH_KEYS:
            parameters = _toolbench_schema(function, where)
        elif keys == ["properties"]:
            parameters = _read_schema({"properties": function["properties"]}, function, tool, where)
        else:
            parameters = _read_schema(_without_json(function[keys[0]]), function, tool, f"{where}: {keys[0]}")
        kept = {key: function[key] for key in ("name", "description") if function.get(key) is not None}
    _check_parameters(parameters, where)
    return {"type": "function", "function": {**kept, "parameters": parameters}}


def _unwrap(tool: object, where: str) -> dict:
    """The function object out of `function` or `toolSpec`, with parameters that are next to it moved inside."""
    if not isinstance(tool, dict):
        raise DataError(f"{where}: found {kind_of(tool)}, expected a function object")
    wrapper = next((key for key in ("function", "toolSpec") if tool.get(key) is not None), None)
    if wrapper is None:
        marks = {"function": (None,), "toolSpec": (None,), "type": (None, "function", "custom")}
        return {key: value for key, value in tool.items() if key not in marks or value not in marks[key]}
    function = _opened(tool[wrapper], f"{where}: {wrapper}")
    if not isinstance(function, dict):
        raise DataError(f"{where}: found {kind_of(function)}, expected a function object")
    outside = {
        key: value
        for key, value in tool.items()
        if key in (*_SCHEMA_KEYS, *_TOOLBENCH_KEYS, "name", "description", "required") and value is not None
    }
    for key, value in outside.items():
        if function.get(key) not in (None, value):
            raise DataError(f"{where}: found two different {key!r}, next to {wrapper!r} and inside it, expected one")
    return function | {key: value for key, value in outside.items() if function.get(key) is None}


def _parameter_keys(function: dict, where: str) -> tuple[list[str], bool]:
    """(the keys that hold the parameters, whether the form is OpenAI's: `parameters`, or none at all)."""
    keys = [key for key in _SCHEMA_KEYS if function.get(key) is not None]
    toolbench = [key for key in _TOOLBENCH_KEYS if function.get(key) is not None]
    found = keys + toolbench
    if len(keys) > 1 or keys and toolbench:
        raise DataError(f"{where}: found parameters under {' and '.join(map(repr, found))}, expected one of them")
    if not found and isinstance(function.get("properties"), (dict, str)):
        return ["properties"], False
    if not found:
        for key, value in function.items():
            is_like = _PARAMETER_WORDS.search(key) and not _RESULT_WORDS.search(key)
            if is_like and isinstance(value, (dict, list, str)) and value:
                raise DataError(
                    f"{where}: found {shown(key)} and no 'parameters', expected the parameters under 'parameters', "
                    "'input_schema', 'inputSchema' or 'required_parameters'"
                )
    return found, found in ([], ["parameters"])


def _without_json(schema: object) -> object:
    """Bedrock's {"json": schema} without its wrapper."""
    if isinstance(schema, dict) and isinstance(schema.get("json"), (dict, str)):
        return schema["json"] if all(value is None for key, value in schema.items() if key != "json") else schema
    return schema


# ---------------------------------------------------------------------------------------------------------------------
# Parameters as a schema


def _read_schema(parameters: object, function: dict, tool: object, where: str) -> dict:
    """`parameters` of any form as {"type": "object", ..., "properties", "required"}; absent means no parameters."""
    if parameters is None:
        return {"type": "object", "properties": {}, "required": _required_names(function.get("required"), where)}
    parameters = _opened(parameters, where)
    if isinstance(parameters, list):
        return _schema_of_specs(_named_specs(parameters, where), None, where)
    if not isinstance(parameters, dict):
        raise DataError(f"{where}: found {kind_of(parameters)}, expected an object")
    roots = (parameters, function, tool)
    parameters = _Expander(roots, where).expand(parameters, (), 0)
    flat = _flat_specs(parameters)
    if flat:
        lists = [entry for entry in (parameters.get("required"), function.get("required")) if isinstance(entry, list)]
        required = lists[0] if lists else None
        return _schema_of_specs(flat, required, where)
    return _read_json_schema(parameters, function.get("required"), where)


def _read_json_schema(parameters: dict, required_beside: object, where: str) -> dict:
    """A JSON Schema: branches merged, `required` in one list, and openness marked by `additionalProperties`."""
    merged = _merge_branches(parameters, where)
    is_open = accepts_any_parameter({"parameters": merged})
    properties = _properties_of(merged, where)
    properties = {name: {} if schema is True else schema for name, schema in properties.items() if schema is not None}
    for parameter, schema in properties.items():
        if not isinstance(schema, dict):
            raise DataError(f"{where}: parameter {shown(parameter)}: found {kind_of(schema)}, expected an object")
    required = merged.get("required")
    required = _required_names(required_beside if required is None else required, where)
    # JSON Schema up to draft 3: `required` true or false inside the property
    flags = {name: _flag_of(schema, ("required",), f"{where}: {shown(name)}") for name, schema in properties.items()}
    required += [name for name, flag in flags.items() if flag and name not in required]
    properties = {
        name: schema if flags[name] is None else _without(schema, "required") for name, schema in properties.items()
    }
    if merged.get("type") == "OBJECT":  # Gemini writes types in capitals
        properties = {name: _lower_types(schema) for name, schema in properties.items()}
        merged = {**merged, "type": "object"}
    merged = {key: value for key, value in merged.items() if value is not None and key not in ("$defs", "definitions")}
    opening = {"additionalProperties": True} if is_open and merged.get("additionalProperties") is None else {}
    return {"type": "object", **merged, "properties": properties, "required": required, **opening}


def is_padding(value: object) -> bool:
    """Null, or an object of nothing but nulls: what columnar storage leaves of another tool's parameter."""
    return value is None or isinstance(value, dict) and bool(value) and all(map(is_padding, value.values()))


def _properties_of(schema: dict, where: str) -> dict:
    properties = _opened(_or_empty(schema.get("properties"), {}), f"{where}: properties")
    if not isinstance(properties, dict):
        raise DataError(f"{where}: properties: found {kind_of(properties)}, expected an object")
    return properties


def _required_names(required: object, where: str) -> list[str]:
    required = _or_empty(required, [])
    if not isinstance(required, list) or not all(isinstance(entry, str) for entry in required):
        raise DataError(f"{where}: required: found {shown(required)}, expected a list of parameter names")
    return list(required)


def _check_parameters(parameters: dict, where: str) -> None:
    """Raise unless names and descriptions are text and every required parameter is documented."""
    for parameter, schema in parameters["properties"].items():
        check_text(_or_empty(schema.get("description"), ""), f"{where}: parameter {shown(parameter)}: description")
        check_text(parameter, f"{where}: parameter name")
    for parameter in parameters["required"]:
        check_text(parameter, f"{where}: required")
        if parameter not in parameters["properties"] and not accepts_any_parameter({"parameters": parameters}):
            raise DataError(f"{where}: required: found {shown(parameter)}, expected one of the documented parameters")


def _lower_types(schema: object) -> object:
    if isinstance(schema, list):
        return [_lower_types(entry) for entry in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: value.lower() if key == "type" and isinstance(value, str) else _lower_types(value)
        for key, value in schema.items()
    }


# ---------------------------------------------------------------------------------------------------------------------
# $ref, allOf, anyOf, oneOf


class _Expander:
    """Replaces every {"$ref": "#/..."} of a schema by what it points to, and leaves out keys padded with null."""

    def __init__(self, roots: tuple, where: str) -> None:
        self.roots, self.where, self.n_parts = roots, where, 0

    def expand(self, value: object, open_refs: tuple[str, ...], level: int) -> object:
        self.n_parts += 1
        if level > _MAX_LEVELS or self.n_parts > _MAX_PARTS:
            limit = f"{_MAX_LEVELS} levels" if level > _MAX_LEVELS else f"{_MAX_PARTS} parts"
            raise DataError(f"{self.where}: found a schema of more than {limit}, expected a smaller one")
        if isinstance(value, list):
            return [self.expand(entry, open_refs, level + 1) for entry in value]
        if not isinstance(value, dict):
            return value
        reference = value.get("$ref")
        if isinstance(reference, str):
            if reference in open_refs:
                raise DataError(f"{self.where}: found a cyclic $ref {shown(reference)}, expected one that ends")
            target = self.expand(self._target(reference), (*open_refs, reference), level + 1)
            if not isinstance(target, dict):
                raise DataError(f"{self.where}: $ref {shown(reference)}: found {kind_of(target)}, expected an object")
            outside = {key: entry for key, entry in value.items() if key != "$ref" and entry is not None}
            return {**target, **self._entries(outside, open_refs, level)}
        return self._entries(value, open_refs, level)

    def _entries(self, value: dict, open_refs: tuple[str, ...], level: int) -> dict:
        # definitions are reached by their $ref only: an unused type may be cyclic
        return {
            key: entry if level == 0 and key in ("$defs", "definitions") else self.expand(entry, open_refs, level + 1)
            for key, entry in value.items()
            if not is_padding(entry) or key in ("default", "const")
        }

    def _target(self, reference: str) -> object:
        for root in self.roots if reference.startswith("#/") else ():
            place: object = root
            for step in reference[2:].split("/"):
                place = place.get(step.replace("~1", "/").replace("~0", "~")) if isinstance(place, dict) else None
            if place is not None:
                return place
        kind = "a cyclic" if reference == "#" else "an unresolvable"
        raise DataError(f"{self.where}: found {kind} $ref {shown(reference)}, expected one into the document's $defs")


def _merge_branches(schema: dict, where: str) -> dict:
    """A schema without allOf, anyOf, oneOf, if/then/else, dependentSchemas at its top: all branches' parameters.

    A parameter is required if the schema, a part of its allOf, or every branch of an anyOf or oneOf requires it.
    """
    keys = [
        key
        for key in ("allOf", "anyOf", "oneOf", "if", "then", "else", "dependentSchemas")
        if isinstance(schema.get(key), (list, dict))
    ]
    if not keys:
        return schema
    merged = {key: value for key, value in schema.items() if key not in keys}
    properties, required = dict(_properties_of(schema, where)), _required_names(schema.get("required"), where)
    has_properties = "properties" in schema
    for key in keys:
        entries = schema[key] if isinstance(schema[key], list) else [schema[key]]
        entries = list(schema[key].values()) if key == "dependentSchemas" else entries
        branches = [
            _merge_branches(entry, where)
            for entry in entries
            if isinstance(entry, dict) and entry.get("type") != "null"
        ]
        for branch in branches:
            has_properties |= branch.get("properties") is not None
            for name, document in _properties_of(branch, where).items():
                properties[name] = (
                    _joined(properties[name], document, key, name, where) if name in properties else document
                )
            if branch.get("additionalProperties") not in (None, False):
                merged["additionalProperties"] = branch["additionalProperties"]
        if key in ("allOf", "anyOf", "oneOf") and branches:
            lists = [_required_names(branch.get("required"), where) for branch in branches]
            names = dict.fromkeys(name for names in lists for name in names)
            required += [name for name in names if key == "allOf" or all(name in names for names in lists)]
    merged |= {"properties": properties} if has_properties else {}
    return {**merged, "required": list(dict.fromkeys(required))}


def _is_alternatives(document: object) -> bool:
    return isinstance(document, dict) and document.keys() == {"anyOf"} and isinstance(document["anyOf"], list)


def _joined(first: object, second: object, key: str, name: str, where: str) -> object:
    """Two documents of one parameter as one: equal ones once, alternatives as anyOf."""
    if first == second or key in ("if", "then", "else", "dependentSchemas"):
        return first
    if key == "allOf":
        if (
            isinstance(first, dict)
            and isinstance(second, dict)
            and not {k for k in first.keys() & second.keys() if first[k] != second[k]}
        ):
            return {**first, **second}
        raise DataError(f"{where}: allOf: found two documents of parameter {shown(name)}, expected one")
    alternatives = first["anyOf"] if _is_alternatives(first) else [first]
    return {"anyOf": [*alternatives, *([second] if second not in alternatives else [])]}


# ---------------------------------------------------------------------------------------------------------------------
# xLAM, ToolBench, lists: a spec per parameter

# What may be at the top of a JSON Schema, with its kind. Anything else that is an object is a parameter (xLAM).
_SCHEMA_KINDS = {
    "type": (str, list),
    "properties": dict,
    "required": (list, str, bool),
    "$ref": str,
    "allOf": list,
    "anyOf": list,
    "oneOf": list,
    "additionalProperties": (bool, dict),
    "unevaluatedProperties": (bool, dict),
    "patternProperties": dict,
    "propertyNames": dict,
    "dependentSchemas": dict,
    "dependentRequired": dict,
    "$defs": dict,
    "definitions": dict,
    "if": dict,
    "then": dict,
    "else": dict,
    "not": dict,
    "description": str,
    "title": str,
    "$schema": str,
    "$id": str,
    "$comment": str,
    "strict": bool,
    "nullable": bool,
}
_STRUCTURE = ("properties", "allOf", "anyOf", "oneOf", "additionalProperties", "patternProperties")


def _belongs_to_schema(key: str, value: object) -> bool:
    kind = _SCHEMA_KINDS.get(key)
    if kind is None or not isinstance(value, kind):
        return False
    is_spec = isinstance(value, dict) and isinstance(value.get("type"), str)
    return not (is_spec and key in ("properties", "definitions", "patternProperties"))  # parameters of such names


def _flat_specs(parameters: dict) -> dict[str, dict]:
    """{name: spec} of xLAM's form, or nothing if `parameters` is a JSON Schema."""
    if any(key in parameters and _belongs_to_schema(key, parameters[key]) for key in _STRUCTURE):
        return {}
    rest = {key: value for key, value in parameters.items() if not _belongs_to_schema(key, value)}
    specs = {key: value for key, value in rest.items() if isinstance(value, dict)}
    has_type_names = "type" not in parameters or isinstance(parameters["type"], dict)
    if has_type_names and rest and all(isinstance(value, (dict, str)) for value in rest.values()):
        texts = [value for value in rest.values() if isinstance(value, str)]
        # Parameters may have these names; next to type names alone, `"description": "Finds .."` is the tool's own.
        are_types = all(map(_is_type, texts))
        for key in ("title", "description") if texts else ():
            text = parameters.get(key)
            if isinstance(text, str) and (key == "title" or _is_type(text) or not are_types):
                rest[key] = text
        in_order = {key: rest[key] for key in parameters if key in rest}
        return {key: _spec_of_text(value) if isinstance(value, str) else value for key, value in in_order.items()}
    return specs


def _is_type(text: str) -> bool:
    """Whether a text is the name of a type ("int, optional"), not a description."""
    return len(text) <= 200 and _json_type(text)[0].get("type") != text or text in _JSON_TYPES


def _spec_of_text(text: str) -> dict:
    """The spec of a parameter given as a type, or as ToolAlpaca's "Required. string. Its title."."""
    if _is_type(text):
        return {"type": text}
    flag = re.match(r"\W{0,2}(required|optional)\b\W*", text, re.IGNORECASE)
    kind = re.match(r"(\w+)\b[.:,]\s*", text[flag.end() :] if flag else text)
    is_typed = kind is not None and _is_type(kind[1])
    rest = text[(flag.end() if flag else 0) + (kind.end() if is_typed else 0) :]
    spec = {"type": kind[1]} if is_typed else {}
    return {**spec, "description": rest} | ({"required": flag[1].lower() == "required"} if flag else {})


def _named_specs(entries: list, where: str) -> dict[str, dict]:
    """{name: spec} of a list of {"name", ...}. Raises DataError for an entry without a name, or a name twice."""
    specs: dict[str, dict] = {}
    for index, entry in enumerate(entries):
        entry = _opened(entry, f"{where}[{index}]")
        name = entry.get("name") if isinstance(entry, dict) else None
        if not isinstance(name, str) or not name.strip():
            raise DataError(f"{where}[{index}]: found {shown(entry)}, expected a parameter object with a name")
        if name in specs:
            raise DataError(f"{where}[{index}]: found parameter {shown(name)} again, expected it once")
        spec = _without(entry, "name")
        inner = spec.pop("schema", None)
        specs[name] = {**inner, **spec} if isinstance(inner, dict) else spec
    return specs


def _toolbench_schema(function: dict, where: str) -> dict:
    """ToolBench: two lists say which parameters are required."""
    lists = []
    for key in _TOOLBENCH_KEYS:
        entries = _opened(_or_empty(function.get(key), []), f"{where}: {key}")
        if not isinstance(entries, list):
            raise DataError(f"{where}: {key}: found {kind_of(entries)}, expected a list of parameters")
        lists.append(_named_specs(entries, f"{where}: {key}"))
    if both := lists[0].keys() & lists[1].keys():
        raise DataError(f"{where}: found {shown(min(both))} as required and as optional, expected one of them")
    return _schema_of_specs({**lists[0], **lists[1]}, list(lists[0]), where)


def _schema_of_specs(specs: dict[str, dict], required: list | None, where: str) -> dict:
    """The JSON Schema of parameters that come one by one.

    Without a list of required ones, flags decide where there is any (`required`, `optional`, OpenAPI's `in`); else a
    parameter is required unless it has a default or its type is optional, as in the Python signatures that such
    documents are made from.
    """
    has_flags = any(not {*_REQUIRED_KEYS, "optional", "in"}.isdisjoint(spec) for spec in specs.values())
    properties, needed = {}, []
    for name, spec in specs.items():
        kind, is_optional = _json_type(spec.get("type"))
        is_optional = is_optional or "default" in spec or spec.get("nullable") is True
        if has_flags:
            place = f"{where}: {shown(name)}"
            is_optional = (
                not _flag_of(spec, _REQUIRED_KEYS, place) and _flag_of(spec, ("optional",), place) is not False
            )
        if not is_optional:
            needed.append(name)
        rest = {
            key: value
            for key, value in spec.items()
            if key not in ("type", *_REQUIRED_KEYS, "optional", "in")
            and value is not None
            or key == "required"
            and isinstance(value, list)
        }
        properties[name] = {**kind, **rest}
    required = needed if required is None else _required_names(required, where)
    return {"type": "object", "properties": properties, "required": required}


_REQUIRED_KEYS = ("required", "is_required", "isRequired", "mandatory")


def _flag_of(spec: dict, keys: tuple[str, ...], where: str) -> bool | None:
    """The flag under the first of `keys` that a parameter has, also as text ("true", "no"); None without one.

    A list is the `required` of an object's own parameters. Raises DataError for any other value.
    """
    for key in keys:
        value = spec.get(key)
        word = value.strip().lower() if isinstance(value, str) else value
        if word is None or isinstance(word, list):
            continue
        if word in (True, "true", "yes", "required"):
            return True
        if word in (False, "false", "no", "optional"):
            return False
        raise DataError(f"{where}: {key}: found {shown(value)}, expected true or false")
    return None


_JSON_TYPES = {
    "str": "string",
    "text": "string",
    "int": "integer",
    "float": "number",
    "double": "number",
    "bool": "boolean",
    "list": "array",
    "tuple": "array",
    "set": "array",
    "dict": "object",
    **{name: name for name in ("string", "integer", "number", "boolean", "array", "object", "null")},
}
_GENERIC = re.compile(r"(?:typing\.)?(list|tuple|set|dict|optional|sequence)\s*\[(.*)\]", re.IGNORECASE | re.DOTALL)


def _json_type(kind: object) -> tuple[dict, bool]:
    """({"type": ...} in JSON Schema's names, whether it says optional) of "str", "STRING", "List[int], optional", ...

    A name that is not known stays as it is.
    """
    if not isinstance(kind, str) or len(kind) > 200:  # a longer text is no type; the limit also bounds the recursion
        return ({} if kind is None else {"type": kind}), False
    words, comma, rest = kind.strip().rpartition(",")
    if comma and rest.strip().lower() in ("optional", "required") or comma and rest.strip().startswith("default"):
        return _json_type(words)[0], rest.strip().lower() != "required"
    text = kind.strip()
    if match := _GENERIC.fullmatch(text):
        outer, inner = match[1].lower(), _json_type(match[2])[0]
        if outer == "optional":
            return inner, True
        if outer == "dict":
            return {"type": "object"}, False
        is_known = inner.get("type") in _JSON_TYPES
        return {"type": "array", "items": inner} if is_known and outer != "tuple" else {"type": "array"}, False
    if text.lower() == "any":
        return {}, False
    return {"type": _JSON_TYPES.get(text.lower(), kind)}, False


# ---------------------------------------------------------------------------------------------------------------------
# Small


def _opened(value: object, where: str) -> object:
    """JSON text as its value, anything else as it is. Raises DataError for text that is not JSON."""
    return parse_json(value, where) if isinstance(value, str) else value


def _or_empty(value: object, empty: object) -> object:
    return empty if value is None else value


def _without(mapping: dict, key: str) -> dict:
    return {k: v for k, v in mapping.items() if k != key}
