"""The normal form of a function: what is left of it when a copier has renamed, reformatted and commented it anew.

Text finds pasted solutions only as long as nobody ran a formatter or renamed a variable. Two functions with one normal
form do the same thing in the same way.
"""

import ast
import builtins
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

Function = ast.FunctionDef | ast.AsyncFunctionDef

_BUILTINS = frozenset(dir(builtins))
_NOT_CODE = frozenset({"ctx", "returns", "annotation", "decorator_list", "type_comment", "type_params", "kind"})
_NAMING_FIELDS = frozenset({"id", "arg", "name", "names", "asname", "rest"})


@dataclass(frozen=True, slots=True)
class NormalForm:
    """A stable 64-bit hash of a function's normal form and the number of its AST nodes."""

    hash: int
    nodes: int


def functions(tree: ast.Module) -> Iterator[tuple[Function, str]]:
    """Every function of `tree`, inner ones and methods too, with its skeleton: the nested types of its statements.

    Functions with one normal form have one skeleton, which costs a hundredth of it.
    """
    found: list[tuple[Function, str]] = []
    _skeleton(tree.body, found)
    yield from found


def normal_form(function: Function) -> NormalForm:
    """The normal form of `function`.

    Names of functions, arguments, variables and modules become numbers in order of appearance; builtins that the
    function does not rebind, attributes and constants stay. Decorators, annotations, docstrings and other constants
    that stand alone are left out.
    """
    writer = _Writer(function)
    writer.write(function)
    digest = hashlib.blake2b("".join(writer.parts).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return NormalForm(int.from_bytes(digest, "little"), writer.nodes)


class _Writer:
    def __init__(self, function: Function) -> None:
        self.parts: list[str] = []
        self.nodes = 0
        self._numbers: dict[str, str] = {}
        self._bound = {function.name}
        for node in ast.walk(function):
            if isinstance(node, ast.arg):
                self._bound.add(node.arg)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                self._bound.add(node.id)

    def write(self, node: ast.AST) -> None:
        """Appends the normal form of `node` to the parts."""
        self.nodes += 1
        # An annotated assignment is an assignment: `functions` has left out those without a value.
        self.parts.append(f"({_statement_type(node)}")
        if isinstance(node, ast.Constant):
            self.parts.append(f" {node.value!r})")
            return
        fields = ("targets", "value") if isinstance(node, ast.AnnAssign) else node._fields
        for field in fields:
            if field not in _NOT_CODE:
                value = (
                    [node.target] if isinstance(node, ast.AnnAssign) and field == "targets" else getattr(node, field)
                )
                self._write_value(field, value)
        self.parts.append(")")

    def _write_value(self, field: str, value: object) -> None:
        if isinstance(value, ast.AST):
            self.write(value)
        elif isinstance(value, list):
            self.parts.append("[")
            for item in value:
                if not isinstance(item, ast.stmt) or _does_something(item):
                    self._write_value(field, item)
            self.parts.append("]")
        elif isinstance(value, str) and field in _NAMING_FIELDS:
            self.parts.append(f" {self._renamed(value)}")
        else:
            self.parts.append(f" {value!r}")

    def _renamed(self, name: str) -> str:
        if name in _BUILTINS and name not in self._bound:
            return name
        return self._numbers.setdefault(name, f"_{len(self._numbers)}")


def _skeleton(body: list[ast.stmt], found: list[tuple[Function, str]]) -> str:
    parts = []
    for statement in body:
        if not _does_something(statement):
            continue
        inner = "".join(
            _skeleton(block, found)
            for name in ("body", "handlers", "orelse", "finalbody", "cases")
            if (block := getattr(statement, name, None))
        )
        if isinstance(statement, Function):
            found.append((statement, f"{len(statement.args.args)}{inner}"))
        parts.append(f"{_statement_type(statement)}({inner})")
    return "".join(parts)


def _statement_type(node: ast.AST) -> str:
    return "Assign" if isinstance(node, ast.AnnAssign) else type(node).__name__


def _does_something(statement: ast.AST) -> bool:
    if isinstance(statement, ast.Expr):
        return not isinstance(statement.value, ast.Constant)
    return not isinstance(statement, ast.AnnAssign) or statement.value is not None
