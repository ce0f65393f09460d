"""Mutants of a program: the same for the same seed, all different, all Python, each with one change of its kind."""

import ast

from benchmarks.mutations import mutants

PROGRAM = '''
import math

def helper(x):
    """Doc 1 + 1."""
    return -x if not x else x

def f(xs: list, limit=3):
    total = 0
    for i in range(len(xs)):
        if xs[i] > limit and xs[i] != 7:
            total += xs[i] * 2
        else:
            total = max(total, helper(i))
    return total
'''


def test_mutants_are_different_programs_that_the_seed_decides():
    found = mutants(PROGRAM, 200, "a")
    assert found == mutants(PROGRAM, 200, "a")
    assert mutants(PROGRAM, 5, "a") == found[:5] != mutants(PROGRAM, 5, "b")
    original = ast.unparse(ast.parse(PROGRAM))
    assert len({mutant.code for mutant in found} | {original}) == len(found) + 1 > 50
    for mutant in found:
        assert ast.get_docstring(ast.parse(mutant.code).body[1]) == "Doc 1 + 1."
    assert {"comparison", "arithmetic", "and_or", "number", "off_by_one", "dropped_statement", "swapped_branches",
            "negated_condition", "returned_none", "returned_type", "function", "swapped_arguments",
            "dropped_sign"} <= {mutant.kind for mutant in found}  # fmt: skip


def test_a_mutant_is_one_change():
    (changed,) = [mutant for mutant in mutants(PROGRAM, 200, "a") if "xs[i] >= limit" in mutant.code]
    assert changed.kind == "comparison"
    assert changed.code == ast.unparse(ast.parse(PROGRAM.replace("> limit", ">= limit")))
    (swapped,) = [mutant for mutant in mutants(PROGRAM, 200, "a") if mutant.kind == "swapped_arguments"]
    assert "max(helper(i), total)" in swapped.code
