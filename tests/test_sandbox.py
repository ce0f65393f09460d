"""The jail from outside: what programs may rely on, what they may use, and what happens when the jail itself breaks."""

import os
import shutil
import socket
import struct
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest

from megatron_ra3.evaluate.jail import values
from megatron_ra3.evaluate.jail.kernel import seccomp_program
from megatron_ra3.evaluate.sandbox import IsolationError, Sandbox, Verdict, brief
from megatron_ra3.evaluate.session import Handle, Session
from megatron_ra3.evaluate.worker import JailError, Limits, ProgramError
from tests.support import open_jail


@pytest.fixture(scope="module")
def jail():
    with open_jail(1) as sandbox:
        yield sandbox


READERS = {
    "input": "print(int(input()) + int(input()))",
    "lines": "import sys\nprint(sum(int(line) for line in sys.stdin))",
    "buffer": "import sys\nread = sys.stdin.buffer.readline\nprint(int(read()) + int(read()))",
    "descriptor": "print(sum(map(int, open(0).read().split())))",
    "device": "print(sum(map(int, open('/dev/stdin').read().split())))",
    "os_read": "import os\nprint(sum(map(int, os.read(0, 99).split())))",
    "global": "total = 0\ndef add():\n    global total\n    total += int(input())\nadd()\nadd()\nprint(total)",
    "raw_output": "import sys\nsys.stdout.buffer.write(b'%d\\n' % sum(map(int, sys.stdin)))",
    "main_guard": "def main():\n    print(int(input()) + int(input()))\nif __name__ == '__main__':\n    main()",
    "exit": "print(int(input()) + int(input()))\nexit()",
    "thread": "import threading\nthreading.Thread(target=lambda: print(int(input()) + int(input()))).start()",
    "recursion": "import sys\nsys.setrecursionlimit(10**6)\nf = lambda n: n and 1 + f(n - 1)\nprint(f(50000) % 9)",
    "atexit": "import atexit\natexit.register(lambda: print(5))",
    "asyncio": "import asyncio\nasync def f():\n    return int(input()) + int(input())\nprint(asyncio.run(f()))",
    "dataclass": "from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\nprint(P(2).x + 3)",
}


@pytest.mark.parametrize("style", READERS)
def test_every_way_of_reading_and_writing_works(jail, style):
    finished = jail.run_script(READERS[style], b"2\n3\n")
    assert (finished.code, finished.stdout.strip()) == (0, b"5"), finished.stderr


def test_exit_status_and_streams_are_those_of_a_real_process(jail):
    finished = jail.run_script("import sys\nprint('out')\nprint('err', file=sys.stderr)\nsys.exit(3)")
    assert (finished.code, finished.stdout, finished.stderr, finished.exceeded) == (3, b"out\n", b"err\n", "")
    assert jail.run_script("raise KeyError('x')").code == 1
    assert b"KeyError: 'x'" in jail.run_script("raise KeyError('x')").stderr
    assert jail.run_script("sys.exit('gone')").code == 1
    assert jail.run_script("print(").code == 1


def test_programs_start_equal(jail):
    code = "import random, os, time\nprint(random.random(), hash('x'), time.tzname, sorted(os.environ))"
    assert jail.run_script(code).stdout == jail.run_script(code).stdout


def test_output_is_complete_up_to_its_limit(jail):
    finished = jail.run_script("print('x' * 1000000, end='')", limits=Limits(output_bytes=1_000_000))
    assert (finished.code, len(finished.stdout), finished.exceeded) == (0, 1_000_000, "")
    finished = jail.run_script("print('x' * 1000001, end='')", limits=Limits(output_bytes=1_000_000))
    assert (finished.code, len(finished.stdout), finished.exceeded) == (None, 1_000_000, "output")


def test_calls_carry_types_mutations_objects_and_errors(jail):
    code = (
        "def double(x):\n    x.append(1)\n    return x + x\n"
        "class Node:\n    def __init__(self, v):\n        self.v = v\n"
        "    def up(self, n=1):\n        return self.v + n\n"
        "def value(node):\n    return node.v\n"
        "def numbers():\n    yield from (1, 2)\n"
        "def bad():\n    raise KeyError('k')\n"
        "def rare():\n    from decimal import Decimal\n    from fractions import Fraction\n"
        "    return Decimal('1.50'), Fraction(1, 3)\n"
    )
    with jail.worker() as worker, Session(worker, code, Limits()) as session:
        given = [0]
        assert session.call_mutable("double", given) == [0, 1, 0, 1]
        assert given == [0, 1]
        node = session.call("Node", 5)
        assert isinstance(node, Handle)
        assert node != session.call("Node", 5)
        assert session.call("value", node) == 5
        node.v = 7
        assert node.v == 7
        assert session.call("up", n=2, on=node) == 9
        assert list(session.call("numbers")) == [1, 2]
        with pytest.raises(ProgramError, match=r"KeyError: 'k' \(line 14\)") as caught:
            session.call("bad")
        assert caught.value.reason == "error"
        assert session.call("value", node) == 7  # an exception does not end a session
        assert session.call("rare") == (Decimal("1.50"), Fraction(1, 3))
        assert session.calls == 9


def test_a_session_that_failed_keeps_failing(jail):
    with jail.worker() as worker, Session(worker, "import os\nf = os._exit", Limits()) as session:
        for _ in range(2):
            with pytest.raises(ProgramError, match="status 4"):
                session.call("f", 4)


def test_a_program_that_could_not_be_restricted_is_not_run_and_no_verdict():
    with Sandbox(1, isolation="unsafe") as sandbox:
        shutil.rmtree(Path(sandbox._folder, "0"))  # where programs are to run
        with pytest.raises(JailError, match=r"could not be started: FileNotFoundError: .*No such file"):
            sandbox.run_script("print(1)")
        assert sandbox.run_script("print(1)").stdout == b"1\n"  # on a new worker
        assert sandbox.infrastructure_errors == 1


def test_a_dead_jail_is_replaced_and_counted(jail):
    before = jail.infrastructure_errors
    broken = []

    def attempt(worker):
        if not broken:
            broken.append(worker)
            worker._control.shutdown(socket.SHUT_RDWR)
        with Session(worker, "def f():\n    return 1\n", Limits()) as session:
            return Verdict(outcome="pass" if session.call("f") == 1 else "fail")

    assert jail.judge(attempt).passed
    assert jail.infrastructure_errors == before + 1


def test_a_jail_that_keeps_failing_is_no_verdict_on_the_program(jail):
    before = jail.infrastructure_errors

    def attempt(worker):
        raise JailError("out of order")

    verdict = jail.judge(attempt)
    assert (verdict.outcome, verdict.reason, verdict.detail) == ("infrastructure", "jail", "out of order")
    assert jail.infrastructure_errors == before + 3
    assert jail.run_script("print(1)").stdout == b"1\n"


def test_an_interrupted_worker_is_not_reused(jail):
    used = []

    def interrupted():
        with jail.worker() as worker:
            used.append(worker)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with jail.worker() as second:
        assert second is not used[0]


def test_without_bubblewrap_it_refuses_unless_told(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(IsolationError, match=r"bwrap is not on PATH.*isolation='unsafe'"):
        Sandbox(1)
    with Sandbox(1, isolation="unsafe") as sandbox:
        assert sandbox.run_script("print(1)").stdout == b"1\n"


def test_settings_are_checked():
    with pytest.raises(ValueError, match="workers=0"):
        Sandbox(0)
    with pytest.raises(ValueError, match="isolation='docker'"):
        Sandbox(1, isolation="docker")
    with pytest.raises(ValueError, match="time_s=0"):
        Limits(time_s=0)


def refuse(value):
    raise ValueError(f"foreign {value!r}")


def test_a_program_cannot_ask_for_more_than_its_jail_has(jail):
    with pytest.raises(ValueError, match="memory_bytes=8589934592: this worker's jail has 4294967296"):
        jail.run_script("print(1)", limits=Limits(memory_bytes=8 << 30))
    assert jail.run_script("print(1)").stdout == b"1\n"


def test_two_pools_share_no_user(jail):
    code = "import os\nprint(os.getuid())"
    with open_jail(1) as other:
        assert (jail.run_script(code).stdout == other.run_script(code).stdout) == (os.geteuid() != 0)


def test_values_keep_their_types():
    import collections

    for value in (
        *(None, True, 0, -(2**80), 1.5, float("inf"), -0.0, 2j, "", "\ud800\n", b"\x00", bytearray(b"x"), int),
        *([1, [2]], (1, (2,)), {1, "a"}, frozenset({(1, 2)}), {(1,): {2: []}}, range(3, 9, 2), collections.deque([1])),
        *(
            collections.Counter("aab"),
            collections.OrderedDict(b=1, a=2),
            Decimal("1.50"),
            Fraction(1, 3),
        ),
    ):
        back = values.decode(values.loads(values.dumps(values.encode(value, refuse))), refuse)
        assert type(back) is type(value)
        assert back == value
        assert repr(back) == repr(value)


def test_a_very_large_sequence_comes_out_as_its_digest():
    def passed(value):
        return values.decode(values.loads(values.dumps(values.encode(value, refuse))), refuse)

    large = [("x",) * 1000] * 1000 + [(1, 2.0)]
    assert isinstance(passed(large), values.Digest)
    assert passed(passed(large)) == passed(list(large))
    assert passed(large) != passed(tuple(large))
    assert passed(large) != passed([*large[:-1], (1, 2)])
    assert passed(large) != passed([*large[:-1], large[-1], ()])


def test_subclasses_come_out_as_what_they_contain():
    class Liar(int):
        def __eq__(self, other):
            return True

        __hash__ = int.__hash__

    back = values.decode(values.encode([Liar(3)], refuse), refuse)
    assert type(back[0]) is int
    assert back != [4]


@pytest.mark.parametrize(
    "raw", [b"{}", b'["x"]', b'["d",[1]]', b'["s",["l"]]', b"[]", b'["i",5]', b'["F","0x1","0x0"]', b'["T","object"]']
)
def test_what_no_encoder_writes_is_refused(raw):
    with pytest.raises(ValueError, match=r"."):
        values.decode(values.loads(raw), refuse)


def test_a_long_text_of_a_strange_value_is_cut():
    assert brief("x" * 1000) == "'" + "x" * 99
    assert brief(10**5000) == "<int>"


def run_filter(program, number, flags=0, architecture=0xC000003E):
    """What the BPF program returns: a tiny interpreter of the instructions it uses."""
    data = struct.pack("<IIQQ", number, architecture, 0, flags)
    lines = [struct.unpack_from("HBBI", program, at) for at in range(0, len(program), 8)]
    at, accumulator = 0, 0
    while True:
        code, if_true, if_false, operand = lines[at]
        at += 1
        if code == 0x20:
            accumulator = struct.unpack_from("<I", data, operand)[0]
        elif code == 0x06:
            return operand
        else:
            holds = {0x15: accumulator == operand, 0x35: accumulator >= operand, 0x45: bool(accumulator & operand)}[
                code
            ]
            at += if_true if holds else if_false


def test_the_filter_lets_through_threads_and_refuses_the_rest():
    allow, eperm, enosys, kill = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000
    strict, loose = (seccomp_program(processes=flag, machine="x86_64") for flag in (False, True))
    for program in (strict, loose):
        assert (
            run_filter(program, 0) == run_filter(program, 53) == run_filter(program, 436) == allow
        )  # read, socketpair
        assert {run_filter(program, number) for number in (41, 101, 165, 272, 308, 319, 321)} == {eperm}
        assert {run_filter(program, number) for number in (425, 435, 438, 500, 0x40000000)} == {enosys}
        assert run_filter(program, 0, architecture=0x40000003) == kill
        assert run_filter(program, 56, 0x10000 | 0x100) == allow
        assert run_filter(program, 56, 0x10000000 | 0x10000) == eperm
    assert run_filter(strict, 56, 17) == run_filter(strict, 57) == run_filter(strict, 59) == eperm
    assert run_filter(loose, 56, 17) == run_filter(loose, 57) == run_filter(loose, 59) == allow
    with pytest.raises(ValueError, match="riscv64"):
        seccomp_program(processes=False, machine="riscv64")
