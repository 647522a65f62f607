"""Calls written as Python source, as BFCL's own parser reads them. The source is parsed by `ast` and never evaluated.

    read_source_calls   the calls in a text
    arithmetic          the value of an expression of literals, as in p=1/6

What BFCL's parser does, and so does this: positional arguments are dropped; a bare name is its text; a call or a
subscript as a value is its source; a sign before a literal, whatever sign, makes the negative; of an argument that is
written twice the last one counts. BFCL evaluates arithmetic with Python's eval; here it is worked out by operator, with
bounds. One deviation: `true`, `false` and `null` are values, since the formats that are read here write them so.
"""

import ast
import math
import operator
import warnings

from data.formats.call_text import check_count
from data.tool_calls import MAX_NESTING, ToolCall, ToolCallError

MAX_SOURCE_CHARACTERS = 16384
MAX_BITS = 14_000  # of an integer; Python writes integers of 4,300 digits at most, which have 14,285 bits

_WORDS = {"true": True, "false": False, "null": None}
_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_SIGNS = {ast.UAdd: operator.pos, ast.USub: operator.neg}


def arithmetic(node: ast.expr) -> int | float | str:
    """Value of numbers joined by + - * / // % ** and signs, or of strings joined by +.

    Raises ValueError for any other expression and for results that are not finite numbers of at most MAX_BITS bits,
    ArithmeticError as Python does, RecursionError for expressions that are too deep.
    """
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float, str)):
        return node.value
    if isinstance(node, ast.UnaryOp) and type(node.op) in _SIGNS:
        return _bounded(_SIGNS[type(node.op)](_number(arithmetic(node.operand))))
    if not isinstance(node, ast.BinOp) or type(node.op) not in _OPERATORS:
        raise ValueError(f"found {type(node).__name__}, expected arithmetic with literals")
    left, right = arithmetic(node.left), arithmetic(node.right)
    if isinstance(left, str) and isinstance(right, str) and isinstance(node.op, ast.Add):
        return left + right
    left, right = _number(left), _number(right)
    if (
        isinstance(node.op, ast.Pow)
        and isinstance(left, int)
        and isinstance(right, int)
        and left.bit_length() * right > MAX_BITS
    ):
        raise ValueError("found a power that is too large")
    return _bounded(_OPERATORS[type(node.op)](left, right))


def _number(value: object) -> int | float:
    if not isinstance(value, (int, float)):
        raise ValueError("expected arithmetic with numbers only")
    return value


def _bounded(value: object) -> int | float:
    """The value, if it is a number that JSON can hold: a negative number to the power 0.5 is complex."""
    if isinstance(value, int) and value.bit_length() <= MAX_BITS or isinstance(value, float) and math.isfinite(value):
        return value
    raise ValueError("found a number that is complex, infinite or too large")


def read_source_calls(text: str) -> list[ToolCall]:
    """The calls in `f(a=1)`, `f(a=1), g(b=2)` or a list of calls; back-quotes around them do not count.

    Tuples stay tuples: BFCL takes them for lists only where the document says tuple. Raises ToolCallError, one line,
    for anything else, for values that JSON lacks, and for more than MAX_SOURCE_CHARACTERS.
    """
    if len(text) > MAX_SOURCE_CHARACTERS:
        raise ToolCallError(f"found {len(text)} characters, expected at most {MAX_SOURCE_CHARACTERS}")
    source = text.strip("`\n ")
    source = f"{'' if source.startswith('[') else '['}{source}{'' if source.endswith(']') else ']'}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an unknown escape in a string
            tree = ast.parse(source.strip().strip("'"), mode="eval").body
        nodes = tree.elts if isinstance(tree, (ast.List, ast.Tuple, ast.Set)) else [tree]
        check_count(len(nodes))
        calls = [_call(node) for node in nodes]
    except ToolCallError:
        raise
    except (SyntaxError, ValueError, TypeError, ArithmeticError, RecursionError, MemoryError) as error:
        raise ToolCallError(f"found no Python calls ({' '.join(str(error).split())[:80]})") from None
    if not calls:
        raise ToolCallError("found no call, expected at least one")
    return calls


def _call(node: ast.expr) -> ToolCall:
    if not isinstance(node, ast.Call):
        raise ValueError(f"found {type(node).__name__}, expected a call")
    parts, function = [], node.func
    while isinstance(function, ast.Attribute):
        parts.append(function.attr)
        function = function.value
    if not isinstance(function, ast.Name):
        raise ValueError("found a call without a name")
    name = ".".join([function.id, *reversed(parts)])
    if any(keyword.arg is None for keyword in node.keywords):
        raise ValueError("found ** before arguments")
    return ToolCall(name, {keyword.arg: _value(keyword.value, 0) for keyword in node.keywords})


def _value(node: ast.expr, depth: int) -> object:
    """What BFCL's parser makes of a value."""
    if depth >= MAX_NESTING:
        raise ValueError(f"found more than {MAX_NESTING} nested brackets")
    match node:
        case ast.Constant(value=float(value)) if not math.isfinite(value):
            raise ValueError("found an infinite number")
        case ast.Constant(value=None | bool() | int() | float() | str() as value):
            return value
        case ast.Constant(value=value) if value is ...:
            return "..."
        case ast.UnaryOp(operand=ast.Constant(value=int() | float() as value)):
            return _bounded(-value)
        case ast.BinOp():
            return arithmetic(node)
        case ast.Name(id=name):
            return _WORDS.get(name, name)
        case ast.List(elts=items):
            return [_value(item, depth + 1) for item in items]
        case ast.Tuple(elts=items):
            return tuple(_value(item, depth + 1) for item in items)
        case ast.Dict(keys=keys, values=values) if None not in keys:
            found = {_value(key, depth + 1): _value(item, depth + 1) for key, item in zip(keys, values)}
            if all(isinstance(key, str) for key in found):
                return found
        case ast.Call(keywords=[_, *_]):
            call = _call(node)
            return {call.name: call.arguments}
        case ast.Call() | ast.Subscript():
            return ast.unparse(node)
    raise ValueError(f"found {type(node).__name__} as a value")
