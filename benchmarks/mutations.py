"""Small changes to a correct program, drawn by seed: what a model's near misses look like to a grader.

A grader that is only shown right answers can call everything right. Most mutants are wrong, some in ways that only one
input shows, some do not end, some return the right value in another type, and some are still right.
"""

from __future__ import annotations

import ast
import copy
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

_ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.Div: ast.FloorDiv,
    ast.FloorDiv: ast.Div,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.BitXor: ast.BitOr,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
}
_COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.Gt),
    ast.LtE: (ast.Lt, ast.GtE),
    ast.Gt: (ast.GtE, ast.Lt),
    ast.GtE: (ast.Gt, ast.LtE),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
}
_FUNCTIONS = {"min": "max", "max": "min", "any": "all", "all": "any", "sorted": "list", "list": "tuple", "set": "list"}
_METHODS = {"append": "extend", "upper": "lower", "lower": "upper", "startswith": "endswith", "lstrip": "rstrip"}
_RETURNED = ("tuple({0})", "list({0})", "float({0})", "str({0})", "({0},)", "{0} + 1e-07", "{0} + 1e-05", "bool({0})")


@dataclass(frozen=True)
class Mutant:
    """A changed program. `kind` names the change, `line` is where in the unparsed original it happened."""

    kind: str
    line: int
    code: str


Change = Callable[[], None]


def mutants(program: str, count: int, seed: str) -> list[Mutant]:
    """Up to `count` different mutants of `program`, each with one change inside a function; equal seeds, equal mutants.

    Kinds are drawn first and places second, so that rare kinds are not drowned by constants.
    """
    original = ast.unparse(ast.parse(program))
    draw = random.Random(seed)
    places: dict[str, list[int]] = {}
    for index, (kind, _, _) in enumerate(_changes(ast.parse(original))):
        places.setdefault(kind, []).append(index)
    found: dict[str, Mutant] = {}
    while places and len(found) < count:
        kind = draw.choice(sorted(places))
        index = places[kind].pop(draw.randrange(len(places[kind])))
        if not places[kind]:
            del places[kind]
        tree = ast.parse(original)
        _, line, change = list(_changes(tree))[index]
        change()
        code = ast.unparse(ast.fix_missing_locations(tree))
        if code != original:
            found.setdefault(code, Mutant(kind, line, code))
    return list(found.values())


def _changes(tree: ast.Module) -> Iterator[tuple[str, int, Change]]:
    """Every change that can be made, in a fixed order: its kind, its line, and what makes it."""
    for function in tree.body:
        if not isinstance(function, ast.FunctionDef | ast.ClassDef):
            continue
        for node in _without_docstrings(function):
            line = getattr(node, "lineno", 0)
            for kind, change in (*_of_expression(node), *_of_statement(node)):
                yield kind, line, change


def _without_docstrings(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but texts that stand alone."""
    texts = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    return (node for node in ast.walk(tree) if not (isinstance(node, ast.Constant) and id(node) in texts))


def _of_expression(node: ast.AST) -> Iterator[tuple[str, Change]]:
    match node:
        case ast.BinOp() | ast.AugAssign() if type(node.op) in _ARITHMETIC:
            yield "arithmetic", _setting(node, "op", _ARITHMETIC[type(node.op)]())
        case ast.Compare():
            for place, operator in enumerate(node.ops):
                for other in _COMPARISONS[type(operator)]:
                    yield "comparison", _replacing(node.ops, place, other())
        case ast.BoolOp():
            yield "and_or", _setting(node, "op", ast.Or() if isinstance(node.op, ast.And) else ast.And())
            yield "dropped_condition", _replacing(node.values, len(node.values) - 1, node.values[0])
        case ast.Constant(value=bool()):
            yield "boolean", _setting(node, "value", not node.value)
        case ast.Constant(value=int() | float()):
            for step in (1, -1):
                yield "number", _setting(node, "value", node.value + step)
        case ast.Constant(value=str()) if "\n" not in node.value:
            yield "text", _setting(node, "value", node.value[:-1] or "x")
        case ast.Name(id=name) if name in _FUNCTIONS and isinstance(node.ctx, ast.Load):
            yield "function", _setting(node, "id", _FUNCTIONS[name])
        case ast.Attribute(attr=name) if name in _METHODS:
            yield "method", _setting(node, "attr", _METHODS[name])
    yield from _of_operands(node)


def _of_operands(node: ast.AST) -> Iterator[tuple[str, Change]]:
    match node:
        case ast.Call(args=[first, second, *_]):
            yield "swapped_arguments", _setting(node, "args", [second, first, *node.args[2:]])
        case ast.Subscript(slice=ast.Slice() as part):
            for bound in ("lower", "upper"):
                value = getattr(part, bound)
                if value is not None:
                    yield "off_by_one", _setting(part, bound, _plus_one(value))
        case ast.Subscript(slice=ast.expr() as index) if isinstance(node.ctx, ast.Load):
            yield "off_by_one", _setting(node, "slice", _plus_one(index))
        case ast.UnaryOp(op=ast.USub()):
            yield "dropped_sign", _setting(node, "op", ast.UAdd())
        case ast.UnaryOp(op=ast.Not()):
            yield "dropped_sign", _setting(node, "operand", ast.UnaryOp(ast.Not(), node.operand))
        case ast.IfExp():
            yield "swapped_branches", lambda: _swap(node, "body", "orelse")
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "range":
        for place, argument in enumerate(node.args):
            yield "off_by_one", _replacing(node.args, place, _plus_one(argument))
            yield "off_by_one", _replacing(node.args, place, ast.BinOp(argument, ast.Sub(), ast.Constant(1)))


def _of_statement(node: ast.AST) -> Iterator[tuple[str, Change]]:
    for name in ("body", "orelse"):
        statements = getattr(node, name, None)
        if isinstance(statements, list):
            for place, statement in enumerate(statements):
                if _may_go(statement):
                    yield "dropped_statement", _replacing(statements, place, ast.Pass())
                if place and _may_go(statement) and _may_go(statements[place - 1]):
                    swapped = [*statements[: place - 1], statement, statements[place - 1], *statements[place + 1 :]]
                    yield "swapped_statements", _setting(node, name, swapped)
    match node:
        case ast.If() | ast.While():
            yield "negated_condition", _setting(node, "test", ast.UnaryOp(ast.Not(), node.test))
            if isinstance(node, ast.If) and node.orelse:
                yield "swapped_branches", lambda: _swap(node, "body", "orelse")
        case ast.Return(value=ast.expr() as value):
            yield "returned_none", _setting(node, "value", ast.Constant(None))
            for form in _RETURNED:
                changed = ast.parse(form.format(f"({ast.unparse(value)})"), mode="eval").body
                yield "returned_type", _setting(node, "value", changed)


def _may_go(statement: ast.AST) -> bool:
    """Whether a statement can be left out or moved: no definition, import or docstring."""
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
        return False
    return isinstance(statement, ast.stmt) and not isinstance(
        statement, ast.FunctionDef | ast.ClassDef | ast.Import | ast.ImportFrom | ast.Pass
    )


def _plus_one(value: ast.expr) -> ast.expr:
    return ast.BinOp(copy.deepcopy(value), ast.Add(), ast.Constant(1))


def _swap(node: ast.AST, first: str, second: str) -> None:
    one, other = getattr(node, first), getattr(node, second)
    setattr(node, first, other)
    setattr(node, second, one)


def _setting(node: ast.AST, name: str, value: object) -> Change:
    return lambda: setattr(node, name, value)


def _replacing(items: list, place: int, value: object) -> Change:
    def change() -> None:
        items[place] = value

    return change
