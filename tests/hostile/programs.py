"""Programs that try to pass without solving their task, to look outside, or to harm whoever comes next.

They lie in `functions.txt` and `scripts.txt`, each after a line with its name and the reasons of failure that are in
order. Where an attack has a result, the program answers right only if it succeeded: a pass is a broken jail.
"""

import re
from dataclasses import dataclass
from pathlib import Path

_PARTS = {
    "SYSCALL": """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
def syscall(*arguments):
    return libc.syscall(*(ctypes.c_long(argument) for argument in arguments))
""",
    "ATTACK": """
def add(a, b):
    try:
        succeeded = attack()
    except (OSError, MemoryError, AttributeError, KeyError, IndexError):
        succeeded = False
    return a + b if succeeded else -999
""",
}


@dataclass(frozen=True)
class Hostile:
    name: str
    reasons: frozenset[str]
    code: str


def read_programs(name: str) -> list[Hostile]:
    text = re.sub(r"^#.*\n", "", Path(__file__).with_name(name).read_text(encoding="utf-8"), flags=re.MULTILINE)
    parts = re.split(r"^=== (\w+): ([a-z ]+)\n", text, flags=re.MULTILINE)
    assert not parts[0].strip()
    programs = []
    for title, reasons, body in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
        code = re.sub(r"^(SYSCALL|ATTACK)$", lambda match: _PARTS[match[1]], body, flags=re.MULTILINE)
        programs.append(Hostile(title, frozenset(reasons.split()), code))
    return programs


FUNCTIONS = read_programs("functions.txt")
SCRIPTS = read_programs("scripts.txt")
CONTROL = """
import builtins, json, math, os, sys
clean = (
    os.listdir('/tmp') == [] and os.getcwd() == '/tmp' and math.pi > 3.1 and callable(json.dumps)
    and builtins.sum([1, 2]) == 3 and '/tmp' not in sys.path and len(os.listdir('/proc/self/fd')) <= 5
)
def add(a, b):
    return a + b if clean else 'unclean'
"""
"""Answers right if nothing of an earlier program is left."""
