"""Plain values between the two processes of a check, so that a call looks as if both sides had the same objects.

    SharedValues   the objects of one call, numbered alike on both sides: encode, decode, changes, apply_changes

Every object that crosses gets the next number on both sides, so an object that comes back is sent as its number: a
function that returns its argument returns the caller's own object, two equal lists stay two, and a list within itself
stays so. What a function does to the lists, dicts, sets and bytearrays among its arguments is sent back and done to the
caller's. Only data cross, never code: an instance of a subclass arrives as the plain value that it holds.
"""

import numbers
import sys
from collections.abc import Iterator, ValuesView
from collections.abc import Set as AbstractSet
from decimal import Decimal
from fractions import Fraction

MUTABLE = (list, dict, set, bytearray)
MAX_JSON_BITS = 10_000  # of an integer; JSON's reader refuses more than 4,300 digits
MAX_INTERNED = 4096  # characters of a string that is looked up


class SharedValues:
    """The objects of one call that both processes have, by number; kept alive, so that no id is used twice."""

    def __init__(self) -> None:
        self._objects: list[object] = []
        self._number_of: dict[int, int] = {}

    def encode(self, value: object) -> object:
        """A plain value as JSON-like data; everything but null, booleans, numbers and strings gets a tag.

        Raises TypeError for anything that is not a plain value, RecursionError for nesting that is too deep.
        """
        if value is None or value is True or value is False or type(value) is int and -5 <= value <= 256:
            return value  # Python has one object of each
        if id(value) in self._number_of:
            return ["ref", self._number_of[id(value)]]
        if isinstance(value, (list, dict, AbstractSet)) and not isinstance(value, frozenset):
            self._add(value)  # before its items, since it may be one of them
            return self._encode_items(value)
        coded = self._encode_items(value) if isinstance(value, (tuple, frozenset)) else _encode_scalar(value, self)
        self._add(value)
        return coded

    def _encode_items(self, value: object) -> list:
        if isinstance(value, dict):
            return ["dict", [[self.encode(key), self.encode(item)] for key, item in value.items()]]
        kinds = (("list", list), ("tuple", tuple), ("frozenset", frozenset), ("set", AbstractSet))
        tag = next(tag for tag, kind in kinds if isinstance(value, kind))
        return [tag, [self.encode(item) for item in value]]

    def decode(self, coded: object) -> object:
        """The value that `encode` of the other side encoded. Raises ValueError, TypeError, ArithmeticError or
        RecursionError for anything else.
        """
        match coded:
            case None | bool():
                return coded
            case int() if -5 <= coded <= 256:
                return coded
            case ["ref", int(number)] if 0 <= number < len(self._objects):
                return self._objects[number]
            case ["list" | "dict" | "set" as tag, list(items)]:
                return self._fill(self._add({"list": list, "dict": dict, "set": set}[tag]()), items)
            case ["tuple" | "frozenset" as tag, list(items)]:
                value = [self.decode(item) for item in items]
                return self._add(tuple(value) if tag == "tuple" else frozenset(value))
            case ["iterator", list(items)]:
                return self._add(iter([self.decode(item) for item in items]))
        return self._add(_decode_scalar(coded))

    def _fill(self, value: object, items: object) -> object:
        """`value`, one of MUTABLE, with these coded items instead of what it has."""
        if isinstance(value, bytearray):
            value[:] = bytes.fromhex(items)
            return value
        if isinstance(value, dict):
            filled = {self.decode(key): self.decode(item) for key, item in items}
        else:
            filled = [self.decode(item) for item in items]
        if isinstance(value, list):
            value[:] = filled
        else:
            value.clear()
            value.update(filled)
        return value

    def _add(self, value: object) -> object:
        self._number_of[id(value)] = len(self._objects)
        self._objects.append(value)
        return value

    def snapshot(self) -> list[tuple[int, object, list]]:
        """Number, object and contents of everything that a function could change now."""
        return [
            (number, value, _contents(value)) for number, value in enumerate(self._objects) if type(value) in MUTABLE
        ]

    def changes(self, before: list[tuple[int, object, list]]) -> list:
        """[number, contents], coded, of the objects whose contents are no longer those of the snapshot."""
        changed = []
        for number, value, contents in before:
            now = _contents(value)
            if len(now) != len(contents) or any(new is not old for new, old in zip(now, contents)):
                coded = value.hex() if isinstance(value, bytearray) else self._encode_items(value)[1]
                changed.append([number, coded])
        return changed

    def apply_changes(self, changed: object, count: int) -> None:
        """Do to our objects what the other side did to its own; only the first `count` are its to change.

        Raises ValueError, TypeError and others as decode.
        """
        for number, items in changed:
            if not isinstance(number, int) or not 0 <= number < count or not isinstance(self._objects[number], MUTABLE):
                raise ValueError("found a change of an object that cannot change")
            self._fill(self._objects[number], items)

    def __len__(self) -> int:
        return len(self._objects)


def _contents(value: object) -> list:
    return [part for pair in value.items() for part in pair] if isinstance(value, dict) else list(value)


def _encode_scalar(value: object, shared: SharedValues) -> object:
    if isinstance(value, str):
        is_interned = (
            type(value) is str and 1 < len(value) <= MAX_INTERNED and sys.intern(value[:1] + value[1:]) is value
        )
        return ["interned", value] if is_interned else str.__str__(value)
    if isinstance(value, numbers.Integral):
        whole = int(value)
        return whole if whole.bit_length() <= MAX_JSON_BITS else ["int", hex(whole)]
    if isinstance(value, numbers.Rational):
        return ["fraction", hex(value.numerator), hex(value.denominator)]
    if isinstance(value, numbers.Real):
        return float(value)
    if isinstance(value, Decimal):
        return ["decimal", str(value)]
    if isinstance(value, numbers.Complex):
        return ["complex", float(value.real), float(value.imag)]
    if isinstance(value, (bytes, bytearray)):
        return ["bytes" if isinstance(value, bytes) else "bytearray", bytes(value).hex()]
    if isinstance(value, range):
        return ["range", hex(value.start), hex(value.stop), hex(value.step)]
    if isinstance(value, (Iterator, ValuesView)):
        return ["iterator", [shared.encode(item) for item in value]]
    if type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_"):
        return bool(value)
    raise TypeError(f"a {type(value).__name__} is not a plain value")


def _decode_scalar(coded: object) -> object:
    match coded:
        case int() | float() | str():
            return coded
        case ["interned", str(text)]:
            return sys.intern(text)
        case ["int", str(digits)]:
            return int(digits, 16)
        case ["fraction", str(numerator), str(denominator)]:
            return Fraction(int(numerator, 16), int(denominator, 16))
        case ["decimal", str(digits)]:
            return Decimal(digits)
        case ["complex", float(real), float(imaginary)]:
            return complex(real, imaginary)
        case ["bytes", str(digits)]:
            return bytes.fromhex(digits)
        case ["bytearray", str(digits)]:
            return bytearray.fromhex(digits)
        case ["range", str(start), str(stop), str(step)]:
            return range(int(start, 16), int(stop, 16), int(step, 16))
    raise ValueError(f"found {type(coded).__name__}, expected a plain value or a tag with its parts")
