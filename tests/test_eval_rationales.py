"""Rationales in answers: counted per line, kept or taken out, and rewritten from special tokens."""

import pytest

from megatron_ra3.evaluate.rationales import SpecialIds, as_comments, count_rationales, strip_rationales

HEAD = 'def f(x):\n    # of the prompt\n    """ Doc. """\n'
PROGRAM = (
    HEAD
    + "# twice\n    y = 2 * x\n\n    s = '# no rationale'\n    if y:  # nor this\n        # done\n        return y\n"
)


def test_rationales_are_comments_above_lines_of_the_answer():
    count = count_rationales(PROGRAM, HEAD)
    assert (count.lines, count.rationales) == (4, 2)
    assert count_rationales(PROGRAM).rationales == 3
    broken = count_rationales(HEAD + "# a\n    return (x\n# b\n    y = 1\n", HEAD)  # by rows: no Python
    assert (broken.lines, broken.rationales) == (2, 2)


def test_stripped_programs_compute_the_same():
    stripped = strip_rationales(PROGRAM, HEAD)
    assert stripped == HEAD + "    y = 2 * x\n\n    s = '# no rationale'\n    if y:  # nor this\n        return y\n"
    names: dict = {}
    exec(stripped, names)
    assert names["f"](3) == 6
    assert strip_rationales("def f(:\n# a", "") == "def f(:\n# a"


IDS = SpecialIds(act=1, think=2, end=3)


def text_of(ids):
    return "".join(map(chr, ids))


def ids_of(text):
    marks = {"A": 1, "T": 2, "E": 3}
    return [marks.get(letter) or ord(letter) for letter in text]


@pytest.mark.parametrize(
    ("ids", "text"),
    [
        ("Aone\nT whyEtwo\n", "one\n# why\ntwo\n"),
        ("T firstEone\n", "# first\none\n"),
        ("one T lostEtwo\n", "one two\n"),
        ("one\nT a\n\nbEtwo", "one\n# a\n#b\ntwo"),
        ("one\nT neither Atwo", "one\n# neither \ntwo"),
        ("one\nEtwo", "one\ntwo"),
        ("one\nT cut", "one\n# cut\n"),
    ],
)
def test_rationales_in_special_tokens_become_comments(ids, text):
    assert as_comments(ids_of(ids), IDS, text_of) == text
