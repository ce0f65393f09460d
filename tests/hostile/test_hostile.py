"""No hostile program passes, none breaks the jail, and the program after it finds everything as it should be."""

import os
import time
from pathlib import Path

import pytest

from megatron_ra3.evaluate.graders import grade
from megatron_ra3.evaluate.sandbox import Sandbox
from megatron_ra3.evaluate.tasks import AssertTask, IoTest, ScriptTask
from megatron_ra3.evaluate.worker import MIB, Limits
from tests.hostile.programs import CONTROL, FUNCTIONS, SCRIPTS
from tests.support import open_jail

ADD = AssertTask(
    task_id="add",
    prompt="",
    reference="def add(a, b):\n    return a + b\n",
    tests=("assert add(1, 2) == 3", "assert add(2, 3) == 5", "assert add(-1, 1) == 0"),
    time_s=1.0,
)
PRINT = ScriptTask(task_id="print", prompt="", tests=(IoTest("1 2\n", "3\n"), IoTest("2 3\n", "5\n")), time_s=1.0)


def check_unharmed(jail, failures):
    verdict = grade(jail, ADD, CONTROL)
    assert verdict.passed, verdict
    assert jail.infrastructure_errors == failures, jail.last_infrastructure_error


def test_the_suite_is_large_and_its_names_are_distinct():
    names = [program.name for program in (*FUNCTIONS, *SCRIPTS)]
    assert len(set(names)) == len(names) >= 40


@pytest.mark.parametrize("program", FUNCTIONS, ids=lambda program: program.name)
def test_no_program_talks_its_way_to_a_pass(jail, program):
    failures = jail.infrastructure_errors
    verdict = grade(jail, ADD, program.code)
    assert verdict.outcome == "fail"
    assert verdict.reason in program.reasons, verdict
    assert verdict.tests_passed < 2  # one right answer may be luck
    check_unharmed(jail, failures)


@pytest.mark.parametrize("program", SCRIPTS, ids=lambda program: program.name)
def test_no_script_prints_its_way_to_a_pass(jail, program):
    failures = jail.infrastructure_errors
    verdict = grade(jail, PRINT, program.code)
    assert verdict.outcome == "fail"
    assert verdict.reason in program.reasons, verdict
    check_unharmed(jail, failures)


def test_a_program_cannot_replace_what_the_tests_call(jail):
    task = AssertTask(
        task_id="set", prompt="", reference="def f(x):\n    return x\n", tests=("assert set(f([1, 2])) == set((1, 2))",)
    )
    assert not grade(jail, task, "def set(x):\n    return 0\ndef f(x):\n    return 0\n").passed
    assert grade(jail, task, "def set(x):\n    return 0\ndef f(x):\n    return [2, 1, 2]\n").passed


def test_a_test_that_swallows_errors_cannot_pass_a_program_that_ended(jail):
    test = "try:\n    f(1)\nexcept BaseException:\n    pass"
    task = AssertTask(task_id="swallow", prompt="", reference="def f(x):\n    return x\n", tests=(test,))
    verdict = grade(jail, task, "import os\ndef f(x):\n    os._exit(0)\n")
    assert (verdict.outcome, verdict.reason) == ("fail", "exit")


def test_tests_that_call_nothing_are_no_pass(jail):
    for tests in ((), ("assert True",)):
        task = AssertTask(task_id="empty", prompt="", reference="def f(x):\n    return x\n", tests=tests)
        assert grade(jail, task, task.reference).reason == "untested"


WITH_PROCESSES = Limits(time_s=2.0, processes=True, max_tasks=16, memory_bytes=512 * MIB)


def test_a_fork_bomb_stays_within_its_tasks(jail):
    code = (
        "import os, time\nn = 0\nwhile n < 200:\n  try:\n    if os.fork() == 0: time.sleep(99)\n    n += 1\n"
        "  except OSError: break\nprint(n)"
    )
    finished = jail.run_script(code, limits=WITH_PROCESSES)
    assert finished.code == 0
    assert 0 < int(finished.stdout) <= 16
    check_unharmed(jail, jail.infrastructure_errors)


def test_a_fork_bomb_that_never_ends_is_ended(jail):
    code = "import os\nwhile True:\n  try: os.fork()\n  except OSError: pass"
    assert jail.run_script(code, limits=Limits(time_s=0.5, processes=True, max_tasks=16)).exceeded == "time"
    check_unharmed(jail, jail.infrastructure_errors)


def test_daemons_end_with_their_program(jail):
    code = (
        "import os, time\nif os.fork() == 0:\n  os.setsid()\n  if os.fork() == 0:\n    os.closerange(0, 3)\n"
        "    time.sleep(600)\n  os._exit(0)\ntime.sleep(0.2)\nprint('left')"
    )
    before = processes()
    start = time.monotonic()
    finished = jail.run_script(code, limits=WITH_PROCESSES)
    assert (finished.code, finished.stdout) == (0, b"left\n")
    assert time.monotonic() - start < 60
    assert processes() <= before
    check_unharmed(jail, jail.infrastructure_errors)


def test_memory_of_many_processes_is_bounded_together(jail):
    if not jail.memory_cgroup:
        pytest.skip("this machine gives no memory cgroup; each process is bounded by itself")
    code = (
        "import os, time\nfor i in range(8):\n  if os.fork() == 0:\n    x = b'x' * (100 << 20)\n    time.sleep(99)\n"
        "for i in range(2): os.wait()\nprint('two ended')"
    )
    small = Limits(time_s=20.0, processes=True, memory_bytes=256 * MIB, files_bytes=8 * MIB)
    with open_jail(1, largest=small) as sandbox:  # 800 MiB asked for, 392 MiB for everything
        finished = sandbox.run_script(code, limits=small)
        assert finished.code in {0, -9}
        assert sandbox.run_script("print(1)", limits=small).stdout == b"1\n"
        assert sandbox.infrastructure_errors == 0, sandbox.last_infrastructure_error


def test_nothing_accumulates(jail):
    """Set RA3_SOAK_PROGRAMS for a longer run."""
    for _ in range(3):
        grade(jail, ADD, CONTROL)
    before = descriptors(), processes(), temporary_files(jail)
    resident = resident_kib()
    for _ in range(int(os.environ.get("RA3_SOAK_PROGRAMS", "80")) // 2):
        assert grade(jail, ADD, CONTROL).passed
        assert jail.run_script("open('left', 'w').write('x' * 1000)").code == 0
    assert (descriptors(), processes(), temporary_files(jail)) == before
    assert resident_kib() < resident + 16_000


def test_attacks_succeed_where_nothing_stops_them(tmp_path):
    """The attacks themselves work: without a jail they find what they look for."""
    attacks = {program.name: program for program in FUNCTIONS}
    with Sandbox(1, isolation="unsafe") as sandbox:
        for name in ("passwd", "other_processes", "vfork_by_clone"):
            verdict = grade(sandbox, ADD, attacks[name].code)
            assert verdict.passed == (name != "vfork_by_clone"), (name, verdict)  # the seccomp filter is on here, too


def descriptors():
    return len(list(Path("/proc/self/fd").iterdir()))


def resident_kib():
    """Memory of this process and the servers of its jails."""
    total = 0
    for pid in family():
        try:
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))
    return total


def processes():
    return len(family())


def family():
    """Processes below this one, jailed ones included, and itself."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents[int(stat.parent.name)] = int(fields[1])
    found = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def temporary_files(jail):
    return len(list(Path(jail._folder).rglob("*")))
