"""A benchmark's task is found however it was copied, and ordinary code that resembles it is not."""

import ast
import gzip
import json
import pickle
import subprocess
import sys
import textwrap

import pytest

from megatron_ra3.corpus.benchmarks import read_tasks
from megatron_ra3.corpus.decontaminate import Benchmarks

PROMPT = '''from typing import List


def longest_plateau(heights: List[int], tolerance: int) -> int:
    """ Walk along the ridge and find the longest stretch whose neighbouring
    heights never differ by more than the given tolerance.
    >>> longest_plateau([1, 2, 9], 1)
    2
    """
'''
SOLUTION = """    best = current = 1
    for left, right in zip(heights, heights[1:]):
        if abs(left - right) <= tolerance:
            current += 1
        else:
            current = 1
        best = max(best, current)
    return best
"""
HUMANEVAL = {
    "task_id": "HumanEval/7",
    "prompt": PROMPT,
    "entry_point": "longest_plateau",
    "canonical_solution": SOLUTION,
    "test": "def check(candidate):\n    assert candidate([1, 2, 9], 1) == 2\n",
}
MBPP = {
    "text": "Write a function to swap the halves of a sentence around its comma.",
    "code": "def swap_halves(s):\r\n  parts = [p.strip() for p in s.split(',', 1)]\r\n  parts.reverse()\r\n"
    "  return ', '.join(parts)",
    "task_id": 12,
    "test_setup_code": "",
    "test_list": ["assert swap_halves('a,b') == 'b, a'"],
    "challenge_test_list": [],
}
SANITIZED = {key: MBPP[key] for key in ("code", "task_id", "test_list")} | {"prompt": MBPP["text"], "test_imports": []}
MBPP_PLUS = {
    "task_id": "Mbpp/12",
    "prompt": f'"""\n{MBPP["text"]}\nassert swap_halves(\'a,b\') == \'b, a\'\n"""\n',
    "entry_point": "swap_halves",
    "canonical_solution": "\n" + MBPP["code"],
    "assertion": "assert swap_halves('a,b') == 'b, a'",
    "base_input": [["a,b"]],
}
LIVECODEBENCH = {
    "question_title": "Gates",
    "question_id": "abc301_a",
    "question_content": "A gardener opens every third gate along the river while counting how many herons fly away.",
    "starter_code": "",
    "public_test_cases": '[{"input": "3\\n", "output": "1\\n", "testtype": "stdin"}]',
    "private_test_cases": "eJx",
}
CODEFORCES = {
    "id": "1900/A",
    "description": "Polycarp paints a fence of boards so that neighbouring boards never share the same bright colour.",
    "input_format": "The first line contains one integer.",
    "output_format": None,
    "examples": [{"input": "1", "output": "2"}],
    "editorial": f"See below.\n```python\n{PROMPT}{SOLUTION}```\n",
}
COPY = PROMPT + SOLUTION


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="module")
def benchmarks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmarks")
    return Benchmarks.load([write(folder / "HumanEval.jsonl", HUMANEVAL), write(folder / "mbpp.jsonl", MBPP)])


def match(benchmarks, source):
    return benchmarks.match(source, ast.parse(source))


def test_a_verbatim_copy_in_a_larger_file(benchmarks):
    source = f"import os\n\n{COPY}\n\nprint(os.name)\n"
    assert match(benchmarks, source) == "HumanEval/7 (13-gram)"


def test_a_pasted_docstring_and_the_prompt_inside_a_string(benchmarks):
    docstring = textwrap.dedent(PROMPT.partition('"""')[2].partition('"""')[0])
    assert match(benchmarks, f"# {docstring.replace(chr(10), chr(10) + '# ')}\nx = 1\n") == "HumanEval/7 (13-gram)"
    assert match(benchmarks, f"PROMPTS = [{PROMPT!r}]\n") == "HumanEval/7 (13-gram)"
    assert match(benchmarks, f"PROMPTS = {json.dumps([PROMPT])}\n") == "HumanEval/7 (13-gram)"


def test_other_whitespace_and_comments(benchmarks):
    body = SOLUTION.replace("    ", "\t").replace(" = ", "=").replace(":\n", ":  # so\n\n")
    source = f"def longest_plateau( heights,tolerance ):\n{body}"
    assert match(benchmarks, source) is not None
    assert (
        match(benchmarks, source.replace("so\n", "a comment that breaks every run of words\n")) == "HumanEval/7 (ast)"
    )


def test_other_names_annotations_and_docstring(benchmarks):
    names = {"longest_plateau": "f", "heights": "xs", "tolerance": "eps", "best": "a", "current": "b"}
    source = "def longest_plateau(heights: list, tolerance):\n    '''Mine.'''\n" + SOLUTION
    for old, new in {**names, "left": "p", "right": "q"}.items():
        source = source.replace(old, new)
    assert match(benchmarks, source) == "HumanEval/7 (ast)"
    inside = "class Tools:\n    if True:\n" + textwrap.indent(source, "        ")
    assert match(benchmarks, inside) == "HumanEval/7 (ast)"
    assert benchmarks.match(source, None) is None
    assert match(benchmarks, source.replace("<=", "<")) is None
    assert match(benchmarks, source.replace("xs[1:]", "xs[2:]")) is None


def test_a_rebound_builtin_is_a_name_like_another(tmp_path):
    code = (
        "def f(items):\n    sum = 0\n    for item in items:\n        if item > 10:\n            sum += item * item\n"
        "    return sum, len(items)\n"
    )
    benchmarks = Benchmarks.load([write(tmp_path / "x.jsonl", {"id": "a", "code": code})])
    renamed = code.replace("sum", "total").replace("item", "value").replace("for", "# so it is\n    for")
    assert match(benchmarks, renamed) == "x/a (ast)"
    assert match(benchmarks, renamed.replace("len", "max")) is None


def test_a_text_shorter_than_an_ngram_matches_whole(tmp_path):
    text = "Write a function to swap halves around a comma."  # nine words
    benchmarks = Benchmarks.load([write(tmp_path / "mbpp.jsonl", MBPP | {"text": text})])
    assert benchmarks.match(f"# {text.upper()}", None) == "Mbpp/12 (text)"
    assert benchmarks.match("# Write a function to swap halves around a dot.", None) is None


def test_ordinary_code_does_not_match(benchmarks):
    assert (
        match(benchmarks, "from typing import List\n\n\ndef add(first, second):\n    return first + second\n") is None
    )
    assert match(benchmarks, "") is None
    assert benchmarks.match("x = 1", None) is None


def test_what_many_tasks_share_identifies_none(tmp_path):
    formula = "please write one python function that returns the answer to this question about"
    tasks = [{"id": i, "prompt": f"{formula} {name} and nothing else whatsoever"} for i, name in enumerate("abcd")]
    several = Benchmarks.load([write(tmp_path / "x.jsonl", *tasks)])
    assert several.match(formula, None) is None
    assert several.counts["boilerplate_ngrams"] == 1
    assert several.match(tasks[2]["prompt"], None) == "x/2 (13-gram)"
    assert Benchmarks.load([tmp_path / "x.jsonl"], max_tasks=4).match(formula, None) == "x/0 (13-gram)"


def test_tables_of_numbers_and_letters_identify_nothing(tmp_path):
    numbers, letters = " ".join(map(str, range(40))), " ".join("abcdefghijklmnopqrstuvwxyz")
    record = {"id": 1, "prompt": f"{numbers} {letters}"}
    assert Benchmarks.load([write(tmp_path / "x.jsonl", record)]).match(record["prompt"], None) is None


@pytest.mark.parametrize(
    ("record", "source", "found"),
    [
        (SANITIZED, MBPP["text"], "Mbpp/12 (13-gram)"),
        (MBPP_PLUS, MBPP["text"], "Mbpp/12 (13-gram)"),
        (MBPP_PLUS, MBPP["code"].replace("parts", "q").replace("s.", "z.").replace("(s)", "(z)"), "Mbpp/12 (ast)"),
        (LIVECODEBENCH, LIVECODEBENCH["question_content"], "LiveCodeBench/abc301_a (13-gram)"),
        (CODEFORCES, CODEFORCES["description"], "Codeforces/1900/A (13-gram)"),
        (
            CODEFORCES,
            "def f(heights, tolerance):\n" + SOLUTION.replace("best", "b").replace("left", "x"),
            "Codeforces/1900/A (ast)",
        ),
        ({"problem_id": 3, "solutions": json.dumps([MBPP["code"]])}, MBPP["code"].replace("parts", "q"), "own/3 (ast)"),
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "json.gz", "parquet"])
def test_formats(tmp_path, record, source, found, kind):
    path = tmp_path / f"own.{kind}"
    text = json.dumps([record], indent=1) if kind.removesuffix(".gz") == "json" else json.dumps(record) + "\n"
    if kind == "parquet":
        from pyarrow import Table, parquet

        parquet.write_table(Table.from_pylist([record]), path)
    else:
        path.write_bytes(gzip.compress(text.encode()) if kind.endswith("gz") else text.encode())
    benchmarks = Benchmarks.load([path])
    try:
        tree = ast.parse(source)
    except SyntaxError:
        tree = None
    assert benchmarks.match(source, tree) == found


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_unknown_fields_are_an_error(tmp_path, kind):
    path = tmp_path / f"x.{kind}"
    if kind == "parquet":
        from pyarrow import Table, parquet

        parquet.write_table(Table.from_pylist([{"id": 1, "foo": "bar"}]), path)
    else:
        write(path, {"id": 1, "foo": "bar"})
    with pytest.raises(ValueError, match=r"no statement and no solution in \['foo', 'id'\].*canonical_solution"):
        list(read_tasks(path))


@pytest.mark.parametrize(
    ("content", "error"), [(b"", "holds no task"), (b"PK\x03\x04", "neither JSON"), (b"[1]", "int")]
)
def test_other_files_are_an_error(tmp_path, content, error):
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=error):
        list(read_tasks(path))


def test_one_task_in_several_files_is_one_task(tmp_path):
    paths = [write(tmp_path / f"{i}.jsonl", record) for i, record in enumerate([MBPP, SANITIZED, MBPP_PLUS])]
    assert Benchmarks.load(paths, max_tasks=1).match(MBPP["text"], None) == "Mbpp/12 (13-gram)"
    assert Benchmarks.load(paths).counts["tasks"] == 1


def test_workers_get_the_same_answers(benchmarks, tmp_path):
    (tmp_path / "benchmarks.pkl").write_bytes(pickle.dumps(benchmarks))
    code = (
        "import pickle, sys, ast; b = pickle.load(open(sys.argv[1], 'rb')); "
        "s = sys.stdin.read(); print(b.match(s, None)); print(b.match(s.replace('tolerance', 'e'), ast.parse(s)))"
    )
    source = "def f(heights, tolerance):\n" + SOLUTION
    for seed in ("1", "2"):
        result = subprocess.run(
            [sys.executable, "-c", code, tmp_path / "benchmarks.pkl"],
            input=source,
            capture_output=True,
            text=True,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            check=True,
        )
        expected = [benchmarks.match(source, None), match(benchmarks, source.replace("tolerance", "e"))]
        assert result.stdout.split("\n")[:2] == list(map(str, expected))


def test_code_nested_too_deep_is_judged_by_its_text(benchmarks):
    deep = "".join(f"{'el' if i else ''}if x == {i}:\n    pass\n" for i in range(900))
    tree = ast.parse("pass")
    innermost = tree.body
    for _ in range(3000):
        innermost[:] = [ast.While(test=ast.Constant(True), body=[ast.Pass()], orelse=[])]
        innermost = innermost[0].body
    assert benchmarks.match(deep, tree) is None
    assert benchmarks.match(PROMPT, tree) == "HumanEval/7 (13-gram)"


def test_impossible_ngram_length(tmp_path):
    with pytest.raises(ValueError, match="ngram_words must be at least 8, found 5"):
        Benchmarks.load([], ngram_words=5)
