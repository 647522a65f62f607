"""Ways to damage a file: its bytes, its JSON, or the header of its tensors. A mutation is a function of its generator.

Bytes are flipped, cut, doubled, spliced with other files and filled with odd characters. JSON keeps its grammar and
loses its sense: wrong types, lost, renamed and doubled keys, bottomless nesting, huge numbers, texts inside texts.
"""

import copy
import json
import random
import re
import struct

DEEP, HUGE, LONG = "@deep@", "@huge@", "@long@"  # placeholders in a JSON tree for what json.dumps would not write
ODD_TEXTS = [
    *(
        "",
        " ",
        "\0",
        "\x1b[2J\x1b]0;title\x07",
        "\r\n",
        "a\nb",
        "\u2028",
        "\u202egnp.exe",
        "\u200b",
        "\ufeff",
        "\ud800",
    ),
    *("\udcff", "\U0001f600", "e\u0301", "\u00b2", "\u0661\u0662", "../../x", "/dev/zero", "~", "%s%n", "{0}", "$x^2$"),
    *("|", "`", "<script>", "![](http://x)", "NaN", "Infinity", "null", "None", "true", "1e999", "-0", "0x1", "1_000"),
    *("[" * 300, '{"a":' * 300, "(" * 3000, "f(" * 500, "-" * 2000, "'", '"', "\\", "f(a=b'x')", "__import__('os')"),
]
ODD_VALUES = [
    *(None, True, False, 0, 1, -1, 2, 2**31, 2**63, -(2**64), 10**40, 0.5, -0.0, 1e308, 1e-320, HUGE, DEEP, LONG),
    *([], {}, [[]], [None], [{}], {"": None}, {"a": {"a": {}}}, [1, "1", 1.0, True], {"type": "object"}, {"$ref": "#"}),
]
ODD_BYTES = [b"\0", b"\xff", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\xc3", b"\r", b"\n\n", b"\x1b[31m", "\u202e".encode()]


def mutate(content: bytes, others: list[bytes], kind: str, rng: random.Random) -> bytes:
    """`content` after one to three mutations. kind: json, lines, tensors, text or bytes; others: to splice."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        draw = rng.random()
        if kind == "tensors" and draw < 0.7:
            content = mutate_header(content, rng)
        elif kind in ("json", "lines") and draw < 0.7:
            content = mutate_json(content, kind, rng)
        elif kind == "text" and draw < 0.5:
            content = insert_text(content, rng)
        else:
            content = mutate_bytes(content, others, rng)
    return content


# ---------------------------------------------------------------------------------------------------------------------
# Bytes


def mutate_bytes(content: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """One mutation that knows nothing of the file's format. Half of them hit the first 2,000 bytes: headers."""
    size = len(content)
    reach = min(size, 2000) if rng.random() < 0.5 else size
    start = rng.randrange(reach + 1)
    end = min(size, start + rng.choice((1, 2, 8, 60, 1000)))
    piece = content[start:end]
    way = rng.randrange(9)
    if way == 0 and size:
        place = min(start, size - 1)
        return content[:place] + bytes([content[place] ^ (1 << rng.randrange(8))]) + content[place + 1 :]
    if way == 1:
        return content[:start] + content[end:]
    if way == 2:
        return content[:start]
    if way == 3:
        return content[:end] + piece * rng.choice((1, 2, 50)) + content[end:]
    if way == 4 and others:
        other = rng.choice(others)
        cut = rng.randrange(len(other) + 1)
        return content[:start] + other[cut : cut + rng.choice((4, 100, 5000))] + content[end:]
    if way == 5:
        return content[:start] + rng.choice(ODD_BYTES) + content[start:]
    if way == 6:
        return content[:start] + rng.randbytes(len(piece)) + content[end:]
    if way == 7:
        return content[:start] + bytes(len(piece)) + content[end:]
    return content[end:] + content[:start]


def insert_text(content: bytes, rng: random.Random) -> bytes:
    """Odd characters between two characters, or a number or name replaced."""
    text = content.decode("utf-8", "surrogateescape")
    words = list(re.finditer(r"\w+", text))
    new = rng.choice(ODD_TEXTS) if rng.random() < 0.8 else "9" * rng.choice((20, 400, 5000))
    if words and rng.random() < 0.5:
        word = rng.choice(words)
        text = text[: word.start()] + new + text[word.end() :]
    else:
        place = rng.randrange(len(text) + 1)
        text = text[:place] + new + text[place:]
    return text.encode("utf-8", "surrogatepass")


# ---------------------------------------------------------------------------------------------------------------------
# JSON


def mutate_json(content: bytes, kind: str, rng: random.Random) -> bytes:
    """One change of the tree, or of the written text; a file that is no JSON any more gets one of its bytes."""
    try:
        text = content.decode("utf-8")
        lines = text.split("\n") if kind == "lines" else [text]
        number = rng.choice([n for n, line in enumerate(lines) if line.strip()])
        draw = rng.random()
        if kind == "lines" and draw < 0.15:
            lines[number:number] = [rng.choice(lines)] * rng.choice((1, 1, 3))
        elif draw < 0.3:
            lines[number] = double_key(lines[number], rng)
        else:
            lines[number] = write_tree(change_tree(json.loads(lines[number]), rng), rng)
    except (ValueError, IndexError, RecursionError):  # an earlier mutation has made it so
        return mutate_bytes(content, [], rng)
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def change_tree(tree: object, rng: random.Random) -> object:
    """A copy with one place replaced, removed, renamed, moved into a list, written as text, or copied elsewhere."""
    tree = copy.deepcopy(tree)
    found = places(tree)
    if not found:
        return copy.deepcopy(rng.choice(ODD_VALUES))
    container, key = rng.choice(found)
    way = rng.randrange(10)
    if way < 4:
        container[key] = copy.deepcopy(rng.choice(ODD_VALUES) if rng.random() < 0.6 else rng.choice(ODD_TEXTS))
    elif way == 4:
        del container[key]
    elif way == 5 and isinstance(container, dict):
        container[rng.choice(ODD_TEXTS + [name for _, name in found if isinstance(name, str)])] = container.pop(key)
    elif way == 6:
        container[key] = [container[key]] * rng.choice((1, 2, 40))
    elif way == 7:
        container[key] = json.dumps(container[key])
    elif way == 8 and isinstance(container[key], str):
        text = container[key]
        place = rng.randrange(len(text) + 1)
        container[key] = text[:place] + rng.choice(ODD_TEXTS) + text[place:]
    else:
        other, name = rng.choice(found)
        container[key] = copy.deepcopy(other[name])
    return tree


def places(tree: object) -> list[tuple]:
    """(container, key) of everything inside `tree`."""
    found, pending = [], [tree]
    while pending:
        each = pending.pop()
        keys = list(each) if isinstance(each, dict) else range(len(each)) if isinstance(each, list) else ()
        found += [(each, key) for key in keys]
        pending += [each[key] for key in keys]
    return found


def write_tree(tree: object, rng: random.Random) -> str:
    """The tree as JSON, placeholders written out."""
    text = json.dumps(tree, ensure_ascii=rng.random() < 0.7)
    depth = rng.choice((50, 200, 400, 600, 900, 2000, 100_000))
    opened, closed = rng.choice((("[", "]"), ('{"a":', "}")))
    text = text.replace(f'"{DEEP}"', opened * depth + "0" + closed * depth)
    text = text.replace(f'"{HUGE}"', "-" * rng.randrange(2) + "9" * rng.choice((400, 5000)))
    return text.replace(f'"{LONG}"', '"' + rng.choice(("n", "\\u0000", "\\u202e", " ", "-")) * 20_000 + '"')


def double_key(text: str, rng: random.Random) -> str:
    """One key a second time in its object, with another value."""
    keys = list(re.finditer(r'"[^"\\]*"\s*:', text))
    if not keys:
        return text + text
    key = rng.choice(keys)
    return (
        text[: key.start()] + key[0] + rng.choice(("0", '"x"', "null", "[]", "{}", "NaN")) + ", " + text[key.start() :]
    )


# ---------------------------------------------------------------------------------------------------------------------
# Tensors


def mutate_header(content: bytes, rng: random.Random) -> bytes:
    """The JSON header of a safetensors file changed, its length field right; or another length field."""
    if len(content) < 8:
        return content
    length = struct.unpack("<Q", content[:8])[0]
    if rng.random() < 0.15:
        wrong = rng.choice((0, 1, length - 1, length + 1, len(content), 2**31, 2**63, 2**64 - 1)) % 2**64
        return struct.pack("<Q", wrong) + content[8:]
    header = mutate_json(content[8 : 8 + length], "json", rng)
    return struct.pack("<Q", len(header)) + header + content[8 + length :]
