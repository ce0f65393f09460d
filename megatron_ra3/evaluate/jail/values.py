"""Typed values as JSON: the only form in which anything returned by a program reaches trusted code.

Prevents verdicts from depending on a program's own methods (`__eq__`, `__hash__`, `__class__`): what arrives outside
are exact built-in types, rebuilt from text. Objects of any other type stay in the jail and are named by a number.

Modules that few programs need are imported where they are used: every fork of the jail's server carries what it has.
"""

import collections
import json
import marshal
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import decimal

MAX_DEPTH = 150
"""Nesting that is still encoded and decoded; well below the recursion limit of both sides."""
MAX_ITEMS = 10**6
"""What a list and the lists and texts right inside it may hold together and still be written out."""
MAX_RANGE = 10**6
MAX_EXPONENT = 10**4
MAX_CONTAINERS = 10**6
PLAIN_INT = 1 << 53
_DIGESTED_AT_ONCE = 10_000
BUILTIN_TYPES: dict[str, type] = {
    kind.__name__: kind for kind in (bool, int, float, complex, str, bytes, list, tuple, set, dict, type)
}
_LISTS: dict[str, Callable[[Iterable[Any]], Any]] = {"l": list, "t": tuple, "q": collections.deque}
_SETS: dict[str, Callable[[Iterable[Any]], Any]] = {"s": set, "z": frozenset}
_MAPPINGS: dict[str, Callable[[Iterable[Any]], Any]] = {
    "d": dict,
    "o": collections.OrderedDict,
    "C": lambda pairs: collections.Counter(dict(pairs)),
}

Foreign = Callable[[Any], Any]


def encode(value: Any, foreign: Foreign, depth: int = 0) -> Any:
    """`value` as JSON data. Subclasses are reduced to the built-in content they carry.

    `foreign` receives an object of any other type and returns its JSON list, whose first item must be "h".
    Raises ValueError for values nested deeper than MAX_DEPTH, cycles included.
    """
    kind = type(value)
    if value is None or kind is bool or kind is str or kind is float:
        return value
    if kind is int:
        return value if -PLAIN_INT < value < PLAIN_INT else ["i", hex(value)]
    if depth > MAX_DEPTH:
        raise ValueError(f"a value is nested more than {MAX_DEPTH} deep")
    if kind is list or kind is tuple:
        if depth == 0 and _items(value) > MAX_ITEMS:
            return _digest(value)
        return ["l" if kind is list else "t", *[encode(item, foreign, depth + 1) for item in value]]
    encoded = _encode_rarer(value, foreign, depth + 1)
    return foreign(value) if encoded is None else encoded


class Digest:
    """In place of a sequence too large to write out: equal for sequences of equal items of equal types.

    It may come from the program, as any data may: only a program that has the right sequence knows its digest.
    """

    def __init__(self, kind: str, length: int, sha256: str) -> None:
        self.content = (kind, length, sha256)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Digest) and self.content == other.content

    def __hash__(self) -> int:
        return hash(self.content)

    def __repr__(self) -> str:
        return f"Digest{self.content}"


def _items(value: Sequence[Any]) -> int:
    return len(value) + sum(len(item) for item in value if isinstance(item, list | tuple | str))


def _digest(value: Sequence[Any]) -> list[Any]:
    import hashlib

    content = hashlib.sha256()
    for start in range(0, len(value), _DIGESTED_AT_ONCE):
        content.update(marshal.dumps(list(value[start : start + _DIGESTED_AT_ONCE]), 2))  # version 2 shares no objects
    return ["#", "l" if isinstance(value, list) else "t", len(value), content.hexdigest()]


def _encode_rarer(value: Any, foreign: Foreign, depth: int) -> Any:
    bases: tuple[tuple[str, Any], ...] = (
        ("l", list),
        ("t", tuple),
        ("s", set),
        ("z", frozenset),
        ("q", collections.deque),
    )
    for kind, base in bases:
        if isinstance(value, base):
            return [kind, *[encode(item, foreign, depth) for item in base.__iter__(value)]]
    if isinstance(value, dict):
        kind = "d"
        if isinstance(value, collections.Counter):
            kind = "C"
        elif isinstance(value, collections.OrderedDict):
            kind = "o"
        pairs = dict.items(value)
        return [kind, *[[encode(key, foreign, depth), encode(item, foreign, depth)] for key, item in pairs]]
    return _encode_scalar(value)


def _is_a(value: Any, module: str, name: str) -> bool:
    """Whether it is of a class of a module that somebody else has imported, if anybody has."""
    return module in sys.modules and isinstance(value, getattr(sys.modules[module], name))


def _encode_scalar(value: Any) -> Any:
    encoded: Any = None
    if isinstance(value, int):
        encoded = ["i", hex(int.__index__(value))]
    elif isinstance(value, float):
        encoded = float.__float__(value)
    elif isinstance(value, str):
        encoded = str.__str__(value)
    elif isinstance(value, complex):
        encoded = ["c", value.real, value.imag]
    elif isinstance(value, bytes | bytearray):
        encoded = ["b" if isinstance(value, bytes) else "B", bytes(value).hex()]
    elif isinstance(value, range):
        encoded = ["r", hex(value.start), hex(value.stop), hex(value.step)]
    elif _is_a(value, "decimal", "Decimal"):
        encoded = ["D", sys.modules["decimal"].Decimal.__str__(value)]
    elif _is_a(value, "fractions", "Fraction"):
        encoded = ["F", hex(value.numerator), hex(value.denominator)]
    elif type(value) is Digest:
        encoded = ["#", *value.content]
    elif any(value is kind for kind in BUILTIN_TYPES.values()):
        encoded = ["T", value.__name__]
    elif _is_a(value, "numpy", "generic"):
        encoded = _encode_scalar(value.item())
    return encoded


def decode(data: Any, foreign: Foreign) -> Any:
    """The value of `encode`d JSON data; `foreign` turns a "h" list into an object.

    Raises ValueError for anything `encode` cannot have produced.
    """
    try:
        return _decode(data, foreign, 0)
    except (TypeError, IndexError, KeyError, ArithmeticError, AttributeError) as error:
        raise ValueError(f"not an encoded value: {error}") from None


def _decode(data: Any, foreign: Foreign, depth: int) -> Any:
    if not isinstance(data, list):
        if isinstance(data, dict):
            raise TypeError("objects are not values")
        return data
    if depth > MAX_DEPTH + 2:
        raise ValueError(f"a value is nested more than {MAX_DEPTH} deep")
    tag, rest = data[0], data[1:]
    if tag in _LISTS:
        return _LISTS[tag]([_decode(item, foreign, depth + 1) for item in rest])
    if tag in _SETS:
        return _SETS[tag](_spread([_decode(item, foreign, depth + 1) for item in rest]))
    if tag in _MAPPINGS:
        pairs = [(_decode(key, foreign, depth + 1), _decode(item, foreign, depth + 1)) for key, item in rest]
        _spread([key for key, _ in pairs])
        return _MAPPINGS[tag](pairs)
    return foreign(data) if tag == "h" else _decode_scalar(tag, rest)


def _decode_scalar(tag: str, rest: list[Any]) -> Any:
    if tag == "i":
        return int(rest[0], 16)
    if tag == "c":
        return complex(float(rest[0]), float(rest[1]))
    if tag in {"b", "B"}:
        return (bytes if tag == "b" else bytearray).fromhex(rest[0])
    if tag == "r":
        return _bounded_range(*(int(bound, 16) for bound in rest))
    if tag == "D":
        return _bounded_decimal(rest[0])
    if tag == "F":
        import fractions

        return fractions.Fraction(int(rest[0], 16), int(rest[1], 16))
    if tag == "T":
        return BUILTIN_TYPES[rest[0]]
    if tag == "#":
        return Digest(str(rest[0]), int(rest[1]), str(rest[2]))
    raise ValueError(f"unknown tag {str(tag)[:20]!r}")


def _bounded_range(start: int, stop: int, step: int) -> range:
    """A range that trusted code can afford to walk through."""
    value = range(start, stop, step)
    if value and abs(value[-1] - start) // abs(step) >= MAX_RANGE:
        raise ValueError(f"a range has more than {MAX_RANGE} items")
    return value


def _bounded_decimal(text: str) -> "decimal.Decimal":
    """A decimal that trusted code can afford to turn into an integer."""
    import decimal

    value = decimal.Decimal(text)
    if value.is_finite() and value and abs(value.adjusted()) > MAX_EXPONENT:
        raise ValueError(f"a decimal has an exponent beyond {MAX_EXPONENT}")
    return value


def _spread(keys: list[Any]) -> list[Any]:
    """`keys` unchanged; refuses keys chosen to collide, with which a set would take quadratic time to build."""
    if len(keys) > 1000 and len({hash(key) for key in keys}) < len(keys) // 2:
        raise ValueError(f"{len(keys)} keys of a set or dict share too few hashes")
    return keys


def dumps(data: Any) -> bytes:
    """JSON bytes of encoded data."""
    return json.dumps(data, separators=(",", ":")).encode()


def loads(raw: bytes) -> Any:
    """The data of JSON bytes; ValueError for anything else, absurd numbers, depths and counts included."""
    if raw.count(b"[") > MAX_CONTAINERS:
        raise ValueError(f"more than {MAX_CONTAINERS} lists")
    try:
        return json.loads(raw)
    except RecursionError:
        raise ValueError("JSON nested too deep") from None
