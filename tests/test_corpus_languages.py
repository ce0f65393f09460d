"""Every language: lossless on anything, and by value where a logical line is not a row."""

import pickle
import random
from pathlib import Path

import numpy as np
import pytest

from megatron_ra3.corpus.languages import LANGUAGES, language_of
from megatron_ra3.corpus.lines import CodeLine, annotate, join_lines

pytest.importorskip("pygments")

# Trivia and code of the logical lines; their text is what the rows are joined to.
SAMPLES = {
    "c": [
        ("", "#include <a.h>"),
        ("", "#define M(a) \\\n  ((a) + 1)"),
        ("/* block\n * more\n */\n// one\n", "int f(int a,\n      int b)\n{"),
        ("", '\tchar *s = "a(\\\nb";'),
        ("\n", "\tif (a) {"),
        ("", "\t\treturn g(a, // why\n\t\t\tb);"),
        ("", "\t} else {"),
        ("", "\t\th();\n\t}"),
        ("\t// end\n", "}"),
        ("", ""),
    ],
    "cpp": [
        ("", "namespace a {"),
        ("", "auto f = [](int x) {"),
        ("", "  return x;\n};"),
        ("", 'auto s = R"(raw (\n"x" )";\n}  // namespace a'),
        ("", ""),
    ],
    "csharp": [
        ("/// <summary>doc</summary>\n", "public class A\n{"),
        ("", '    string s = @"a\n(b";'),
        ("", "    [Attr(1,\n      2)]"),
        ("", "    int X { get; set; }\n}"),
        ("", ""),
    ],
    "go": [
        ("", "package a"),
        ("\n", 'import (\n\t"fmt"\n)'),
        ("\n", "func f() {"),
        ("", "\ts := `raw\n(`"),
        ("", "\tgo func() {"),
        ("", "\t\tfmt.Println(s)\n\t}()\n}"),
        ("", ""),
    ],
    "java": [
        ("/** Doc. */\n", "@A(\n  1)"),
        ("", "class B {"),
        ("", '  String s = """\n    x (\n    """;'),
        ("", "  void f() { g(\n    1); }\n}"),
        ("", ""),
    ],
    "javascript": [
        ("", "const a = `x ${f(\n  1)}\n(y`;"),
        ("", 'describe("a", () => {'),
        ("", '  it("b", () => {'),
        ("", "    expect(/[(]/.test(a));\n  });\n});"),
        ("// last\n", ""),
    ],
    "julia": [
        ("#= block\n x =#\n", '"""\ndoc (\n"""'),
        ("", "function f(a,\n    b)"),
        ("", "    a + b # c\nend"),
        ("", ""),
    ],
    "kotlin": [
        ("/* a\n b */\n", 'fun f(\n  a: Int\n) = """\n(${a}\n"""'),
        ("", "val x = listOf(1).map {"),
        ("", "  it + 1\n}"),
        ("", ""),
    ],
    "lua": [
        ("--[[ block\n x ]]\n-- one\n", "local s = [[a (\nb]]"),
        ("", "function f(a,\n  b)"),
        ("", "  return a\nend"),
        ("", ""),
    ],
    "php": [
        ("", "<?php"),
        ("// say\n", "$a = array(\n  1,\n);"),
        ("", "$s = <<<EOT\ntext (\nEOT;"),
        ("", "if ($a) {"),
        ("", '  echo "x\ny";\n}'),
        ("", ""),
    ],
    "r": [
        ("#' doc\n", "f <- function(a,\n              b) {"),
        ("", "  a[[1]] + b\n}"),
        ("", ""),
    ],
    "ruby": [
        ("# c\n", "def f(a,\n      b)"),
        ("", "  s = <<~EOS\n    text (\n  EOS"),
        ("", "  a.each do |x|"),
        ("", '    puts "#{x}"\n  end\nend'),
        ("=begin\nblock\n=end\n", "x = 1"),
        ("", ""),
    ],
    "rust": [
        ("/// doc\n", "#[derive(Debug)]"),
        ("", "fn f<'a>(x: &'a str,\n    y: u8) -> u8 {"),
        ("", '    let s = r#"a "(\nb"#;'),
        ("    //! inner\n", "    y\n}"),
        ("/* a\n b */\n", ""),
    ],
    "scala": [
        ("", "object A {"),
        ("", '  val s = """a (\nb"""'),
        ("", "  def f(x: Int,\n        y: Int) ="),
        ("", "    x + y\n}"),
        ("", ""),
    ],
    "shell": [
        ("#!/bin/sh\n# c\n", 'if [ -n "$a" ]\nthen'),
        ("", '  echo "x\ny" \\\n    | cat\nfi'),
        ("", "cat <<EOF\nbody (\nEOF"),
        ("", "case $a in"),
        ("", "  x) y ;;\nesac"),
        ("", ""),
    ],
    "sql": [
        ("-- c\n", "CREATE TABLE a (\n  b INT, -- d\n  c TEXT\n);"),
        ("/* x\n y */\n", "SELECT 'a\n;' FROM a;"),
        ("", ""),
    ],
    "swift": [
        ("/// doc\n", "func f(\n  a: Int\n) -> String {"),
        ("", '  return """\n  (\\(a)\n  """\n}'),
        ("", ""),
    ],
    "typescript": [
        ("", "interface A {"),
        ("", "  b: string; // c\n}"),
        ("", "const f = async (\n  x: number,\n): Promise<void> => {"),
        ("", "  await g(x);\n};"),
        ("", ""),
    ],
}
LEXED = sorted(LANGUAGES.keys() - {"python"})
HOSTILE = [
    "",
    "\n",
    "\n\n",
    "x",
    "}\n}\n",
    "\t\n  x = 'open\n(((\n",
    '"""open\n(\n',
    "/* open\n * x\n",
    "`open ${ (\n}\n",
    "<<EOF\nbody\n",
    "a\r\n// c\r\n\r\n}\r\n",
    "a\rb\r\r\n",
    "\\\n\\\n",
    "x = '\u00fc\U0001f600'\u2028y\x0c\x00\n",
    "#if 0\nf(\n#endif\n} ) ] {\n",
    "=begin\nx",
    "--[[ x\n",
]


def sample(name):
    return join_lines(CodeLine(trivia, code) for trivia, code in SAMPLES[name])


@pytest.mark.parametrize("name", LEXED)
def test_lines_by_value(name):
    assert [(line.trivia, line.code) for line in LANGUAGES[name].split_lines(sample(name))] == SAMPLES[name]
    LANGUAGES[name].parse(sample(name))


@pytest.mark.parametrize("name", LEXED)
def test_nothing_is_lost(name):
    """Hostile texts, every sample cut anywhere and with Windows newlines, and random mixtures."""
    split = LANGUAGES[name].split_lines
    text = sample(name)
    cut = [text[:end] for end in range(0, len(text), 3)]
    rng = random.Random(7)
    pieces = ["(", ")", "{", "}", "'", '"', "`", "\n", "\\\n", "/*", "*/", "//", "#", "--", "${", "x ", "\r\n", "<<A\n"]
    mixed = ["".join(rng.choices(pieces, k=30)) for _ in range(60)]
    for hostile in [*HOSTILE, *cut, *mixed, text.replace("\n", "\r\n")]:
        lines = split(hostile)
        assert join_lines(lines) == hostile
        assert all(line.code.strip() for line in lines[:-1]), hostile
        assert not hostile.endswith("\n") or lines[-1].code == "", hostile


@pytest.mark.parametrize("name", LEXED)
def test_windows_newlines_give_the_same_lines(name):
    lines = LANGUAGES[name].split_lines(sample(name).replace("\n", "\r\n"))
    assert [(line.trivia.replace("\r", ""), line.code.replace("\r", "")) for line in lines] == SAMPLES[name]


def test_real_files_survive_and_have_short_lines():
    texts = [path.read_text(encoding="utf-8") for path in sorted(Path(np.get_include()).rglob("*.h"))]
    lines = [LANGUAGES["c"].split_lines(text) for text in texts]
    assert list(map(join_lines, lines)) == texts
    rows = [line.code.count("\n") + 1 for file in lines for line in file if line.code]
    assert len(rows) > 1000
    assert sum(rows) / len(rows) < 2


def test_a_bracket_that_was_forgotten_ends_with_its_block():
    lines = LANGUAGES["javascript"].split_lines("function f() {\n  g(1;\n}\na\nb\n")
    assert [line.code for line in lines] == ["function f() {", "  g(1;\n}", "a", "b", ""]


def test_what_is_not_valid():
    with pytest.raises(SyntaxError):
        LANGUAGES["python"].parse("def f(:\n")
    with pytest.raises(SyntaxError, match="null bytes"):
        LANGUAGES["python"].parse("x = 1\0")
    LANGUAGES["python"].parse("a = '\\d'\n")
    with pytest.raises(SyntaxError, match="4 of 6 characters belong to no token of java"):
        LANGUAGES["java"].parse("a\x01\x02\x03\x04\n")


def test_languages_by_suffix():
    assert language_of("a/b.py") is LANGUAGES["python"]
    assert language_of("a/B.HPP") is LANGUAGES["cpp"]
    assert language_of("analysis.R") is LANGUAGES["r"]
    assert language_of("Makefile") is None
    assert language_of("a.py/readme") is None
    suffixes = [suffix for language in LANGUAGES.values() for suffix in language.suffixes]
    assert len(suffixes) == len(set(suffixes))


def test_languages_go_to_other_processes():
    language = pickle.loads(pickle.dumps(LANGUAGES["go"]))
    assert language.split_lines("a\nb") == [CodeLine("", "a"), CodeLine("", "b")]


@pytest.mark.parametrize(
    ("sign", "trivia", "rationale"),
    [
        ("//", "// near\n", " near"),
        ("//", "  /// doc\r\n", " doc"),
        ("//", "//! inner\n", " inner"),
        ("//", "// far\n\n", None),
        ("//", "// -----\n", None),
        ("//", "/* block */\n", None),
        ("//", "/**\n * doc\n */\n", None),
        ("//", "# other sign\n", None),
        ("--", "-- near\n", " near"),
        ("#", "// other sign\n", None),
    ],
)
def test_observed_rationale(sign, trivia, rationale):
    assert annotate(CodeLine(trivia, "x"), "observe", sign) == (rationale, "\nx" if "\n\n" in trivia else "x")
