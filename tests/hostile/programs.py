"""Programs that try to pass without solving their task, to look outside, or to harm whoever comes next.

Where an attack has a result, the program answers right only if the attack succeeded: a pass is a broken jail.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Hostile:
    name: str
    code: str
    reasons: str
    """Reasons of failure that are in order, separated by blanks."""


SYSCALL = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
def syscall(*arguments):
    return libc.syscall(*(ctypes.c_long(argument) for argument in arguments))
"""
ATTACK = """
def add(a, b):
    try:
        succeeded = attack()
    except (OSError, MemoryError, AttributeError, KeyError, IndexError):
        succeeded = False
    return a + b if succeeded else -999
"""
WRONG = "\ndef add(a, b):\n    return -999\n"


def attack(name, code, reasons="wrong"):
    return Hostile(name, code + ATTACK, reasons)


ADDING = [
    # lying about equality and type
    Hostile("eq", "class L:\n  def __eq__(s, o): return True\ndef add(a, b): return L()", "wrong"),
    Hostile("eq_of_an_int", "class L(int):\n  def __eq__(s, o): return True\ndef add(a, b): return L(-9)", "wrong"),
    Hostile("ne_and_hash", "class L(str):\n  __hash__ = lambda s: 3\n  __ne__ = lambda s, o: False\n"
            "  __eq__ = lambda s, o: True\ndef add(a, b): return L('x')", "wrong"),
    Hostile("class", "class L:\n  __class__ = int\n  def __eq__(s, o): return True\n  def __index__(s): return 3\n"
            "def add(a, b): return L()", "wrong error data"),
    Hostile("reflected_eq", "class M(type):\n  def __eq__(s, o): return True\n  __hash__ = type.__hash__\n"
            "class L(metaclass=M): pass\ndef add(a, b): return L", "wrong"),
    Hostile("bool", "class L:\n  def __bool__(s): return True\n  def __sub__(s, o): return 0\ndef add(a, b): return L()", "wrong"),
    Hostile("nan", "def add(a, b): return float('nan')", "wrong"),
    # ending before the verdict
    Hostile("os_exit", "import os\ndef add(a, b): os._exit(0)", "exit"),
    Hostile("exit_on_import", "import sys\nsys.exit(0)", "error"),
    Hostile("atexit", "import atexit, os\natexit.register(os._exit, 0)" + WRONG, "wrong"),
    Hostile("excepthook", "import os, sys\nsys.excepthook = lambda *_: os._exit(0)\ndef add(a, b): raise ValueError", "error"),
    Hostile("thread_exit", "import os, threading, time\ndef run():\n  time.sleep(0.02)\n  os._exit(0)\n"
            "threading.Thread(target=run).start()\ndef add(a, b):\n  time.sleep(0.2)\n  return -999", "exit"),
    Hostile("keyboard_interrupt", "def add(a, b): raise KeyboardInterrupt", "error"),
    Hostile("evil_exception", "import os\nclass E(BaseException):\n  def __str__(s): os._exit(0)\ndef add(a, b): raise E", "exit"),
    Hostile("raising_str", "class E(Exception):\n  def __str__(s): raise s\ndef add(a, b): raise E", "exit"),
    Hostile("segfault", "import ctypes\ndef add(a, b): ctypes.string_at(1)", "exit"),
    Hostile("kill_all", "import os, signal\ndef add(a, b):\n  os.kill(-1, signal.SIGKILL)\n  return -999", "wrong error exit"),
    Hostile("kill_group", "import os, signal\ndef add(a, b):\n  os.killpg(0, signal.SIGKILL)\n  return -999", "wrong error exit"),
    # time
    Hostile("loop", "def add(a, b):\n  while True: pass", "time exit"),
    Hostile("ignored_signals", "import signal\nfor s in range(1, 64):\n  try: signal.signal(s, signal.SIG_IGN)\n"
            "  except (OSError, ValueError): pass\ndef add(a, b):\n  while True: pass", "time exit"),
    Hostile("sleep", "import time\ndef add(a, b): time.sleep(1000)", "time"),
    Hostile("stopped", "import os, signal\ndef add(a, b):\n  os.kill(os.getpid(), signal.SIGSTOP)\n  return -999", "time wrong"),
    Hostile("big_power", "def add(a, b): return 9 ** 9 ** 9", "time exit error"),
    Hostile("regex", "import re\ndef add(a, b): return re.match('(a+)+$', 'a' * 40 + 'b')", "time exit"),
    Hostile("patched_clock", "import time\ntime.time = time.monotonic = time.perf_counter = lambda: 0.0\n"
            "time.sleep = lambda s: None\ndef add(a, b):\n  while True: pass", "time exit"),
    attack("set_clock", "import time\ndef attack(): time.clock_settime(time.CLOCK_REALTIME, 0); return True"),
    # memory, files, descriptors, tasks
    Hostile("memory", "def add(a, b): return len(bytearray(1 << 40))", "error exit"),
    Hostile("memory_in_steps", "def add(a, b):\n  kept = []\n  while True: kept.append(bytearray(1 << 24))", "error exit time"),
    attack("anonymous_files", SYSCALL + "def attack(): return syscall(319 if ctypes.sizeof(ctypes.c_long) == 8 else 0, "
           "ctypes.addressof(ctypes.create_string_buffer(b'x')), 0) >= 0"),
    attack("full_disk", "def attack():\n  size = 0\n  for i in range(40):\n    with open(f'/tmp/{i}', 'wb') as f: size += f.write(bytes(1 << 22))\n  return True"),
    attack("many_files", "import os\ndef attack():\n  for i in range(100000): os.mkdir(f'/tmp/{i}')\n  return True"),
    attack("descriptors", "import os\nkept = []\ndef attack():\n  for i in range(5000): kept.append(os.open('/dev/null', 0))\n  return True"),
    Hostile("threads", "import threading, time\ndef add(a, b):\n  for i in range(1000): threading.Thread(target=time.sleep, args=(99,), daemon=True).start()\n  return a + b", "error exit"),
    Hostile("fork_bomb", "import os\ndef add(a, b):\n  while True: os.fork()", "error"),
    attack("subprocess", "import subprocess\ndef attack(): return subprocess.run(['/bin/true']).returncode == 0"),
    attack("vfork_by_clone", SYSCALL + "def attack():\n  pid = syscall(56, 17, 0, 0, 0, 0)\n  if pid == 0: libc._exit(0)\n  return pid > 0"),
    # answers that hurt who reads them
    Hostile("huge_text", "def add(a, b): return 'x' * (1 << 27)", "output error"),
    Hostile("huge_number", "def add(a, b): return 1 << (1 << 28)", "output error"),
    Hostile("deep_list", "def add(a, b):\n  x = []\n  for i in range(100000): x = [x]\n  return x", "error data"),
    Hostile("cycle", "def add(a, b):\n  x = []\n  x.append(x)\n  return x", "error data"),
    Hostile("branching", "def add(a, b):\n  x = []\n  for i in range(100): x = [x, x]\n  return x", "time exit error"),
    Hostile("colliding_keys", "def add(a, b): return {i * (2**61 - 1) for i in range(3000)}", "data time"),
    Hostile("huge_range", "def add(a, b): return range(10**18)", "data"),
    Hostile("huge_decimal", "from decimal import Decimal\ndef add(a, b): return Decimal('1e99999999')", "data"),
    Hostile("endless_iterator", "import itertools\ndef add(a, b): return itertools.count()", "wrong"),
    # reaching for the grader
    attack("frames", "import sys\ndef attack():\n  frame = sys._getframe()\n  while frame:\n    for name in ('expected', 'target', 'verdict', 'outcome', 'test'):\n"
           "      if name in frame.f_locals: return True\n      frame.f_globals[name] = frame.f_locals.get(name)\n    frame = frame.f_back"),
    attack("objects", "import gc\ndef attack(): return any('assert add' in str(value) for holder in gc.get_objects() if type(holder) is dict "
           "for value in list(holder.values()) if type(value) is str and 'gc.get_' not in value)"),
    attack("own_memory", "import re\ndef attack():\n  with open('/proc/self/mem', 'rb', 0) as mem:\n"
           "    for line in open('/proc/self/maps'):\n      low, high = (int(x, 16) for x in line.split()[0].split('-'))\n"
           "      if 'rw' not in line or high - low > 1 << 26: continue\n      mem.seek(low)\n"
           "      if re.search(rb'asser[t] add\\(1, 2\\) == [3]', mem.read(high - low)): return True"),
    attack("tests_on_disk", "import os\ndef attack():\n  for top in ('/ra3', '/tmp', '/home', '/var', '/mnt', '/work', '/opt', '/srv'):\n"
           "    for folder, _, files in os.walk(top):\n      for name in files:\n        if 'hostile' in name or 'jsonl' in name: return True"),
    Hostile("patched_codec", "import sys\nfor name, module in list(sys.modules.items()):\n  if name.endswith('values'):\n"
            "    module.encode = lambda *_: True\n    module.dumps = lambda *_: b'{\"value\": true}'" + WRONG, "data wrong"),
    Hostile("patched_builtins", "import builtins\nbuiltins.exec = builtins.compile = builtins.isinstance = lambda *_: True" + WRONG, "wrong error exit data"),
    Hostile("trace", "import sys\ndef jump(frame, event, arg):\n  return jump\nsys.settrace(jump)" + WRONG, "wrong"),
    Hostile("own_check", "def check(candidate): pass\nclass AssertionError(Exception): pass" + WRONG, "wrong"),
    Hostile("forged_answer", "import os, struct\ntext = b'{\"value\":[\"t\",3]}'\nfor i in range(1):\n  os.write(3, struct.pack('<I', len(text)) + text)" + WRONG, "wrong data"),
    Hostile("forged_object", "import os, struct\ntext = b'{\"value\":[\"t\",[\"h\",0,\"int\",true],[\"l\"]]}'\ndef add(a, b):\n  os.write(3, struct.pack('<I', len(text)) + text)\n  return -999", "wrong data"),
    Hostile("garbage", "import os\ndef add(a, b):\n  os.write(3, bytes(range(256)) * 8)\n  return -999", "output data"),
    Hostile("no_json", "import os, struct\ndef add(a, b):\n  os.write(3, struct.pack('<I', 4) + b'\\xff\\xff{{')", "data"),
    Hostile("endless_header", "import os\ndef add(a, b):\n  while True: os.write(3, b'\\xff' * 65536)", "output"),
    Hostile("forged_end", "import os\ndef add(a, b):\n  for i in range(64):\n    try: os.write(i, b'{\"event\": \"ended\", \"code\": 0, \"passed\": true}')\n    except OSError: pass\n  return -999", "output data"),
    Hostile("closed", "import os\ndef add(a, b):\n  os.closerange(0, 64)\n  return -999", "data exit"),
    attack("more_descriptors", "import os\ndef attack(): return [n for n in map(int, os.listdir('/proc/self/fd')) if n > 4] and any(os.path.exists(f'/proc/self/fd/{n}') for n in range(5, 64))"),
    # the host
    attack("socket", "import socket\ndef attack(): return socket.socket(socket.AF_INET, socket.SOCK_STREAM)"),
    attack("unix_socket", "import socket\ndef attack(): return socket.socket(socket.AF_UNIX)"),
    attack("download", "import urllib.request\ndef attack(): return urllib.request.urlopen('http://127.0.0.1:80')"),
    attack("environment", "import os\ndef attack(): return 'RA3_HOSTILE_SECRET' in os.environ or b'RA3_HOSTILE' in open('/proc/1/environ', 'rb').read()"),
    attack("shadow", "def attack(): return open('/etc/shadow').read()"),
    attack("passwd", "def attack(): return open('/etc/passwd').read()"),
    attack("other_processes", "import os\ndef attack(): return [p for p in os.listdir('/proc') if p.isdigit() and int(p) != os.getpid()]"),
    attack("proc_root", "import os\ndef attack(): return os.path.exists('/proc/1/root/root/.bashrc') or os.path.exists('/proc/1/cwd/../etc/shadow')"),
    attack("proc_sys", "def attack(): return open('/proc/sys/kernel/core_pattern', 'w')"),
    attack("sysrq", "def attack(): return open('/proc/sysrq-trigger', 'w')"),
    attack("raw_disk", "import os\ndef attack():\n  os.mknod('/tmp/disk', 0o60600, os.makedev(254, 0))\n  return os.open('/tmp/disk', 0)"),
    attack("write_system", "def attack():\n  for name in ('/usr/x', '/ra3/x', '/dev/shm/x', '/x', '/etc/x'):\n    try: open(name, 'w')\n    except OSError: continue\n    return True"),
    attack("become_root", "import os\ndef attack(): os.setuid(0); return True"),
    attack("user_namespace", SYSCALL + "def attack(): return libc.unshare(0x10000000) == 0 or libc.unshare(0x20000) == 0"),
    attack("clone_namespace", SYSCALL + "def attack():\n  pid = syscall(56, 0x10000011, 0, 0, 0, 0)\n  if pid == 0: libc._exit(0)\n  return pid > 0"),
    attack("mount", SYSCALL + "def attack(): return libc.mount(b'proc', b'/tmp', b'proc', 0, None) == 0 or libc.umount(b'/tmp') == 0"),
    attack("ptrace", SYSCALL + "def attack(): return libc.ptrace(0, 0, 0, 0) == 0 or libc.ptrace(16, 1, 0, 0) == 0"),
    attack("kernel_interfaces", SYSCALL + "def attack():\n  calls = [(425, 8, 0), (321, 0, 0, 0), (298, 0, 0, 0, 0, 0), (250, 0, -3, 0), (323, 0), (29, 0, 4096, 0o1600), (435, 0, 0), (438, 0, 0, 0)]\n"
           "  results = []\n  for call in calls:\n    ctypes.set_errno(0)\n    results.append(syscall(*call) >= 0 or ctypes.get_errno() not in (1, 38))\n  return any(results)"),
    attack("symlinks", "import os\ndef attack():\n  for target in ('/etc/shadow', '/proc/1/root/etc/shadow', '/root/.profile'):\n"
           "    os.symlink(target, f'/tmp/{abs(hash(target))}')\n    try: return open(f'/tmp/{abs(hash(target))}').read()\n    except OSError: pass"),
    # whoever comes next
    Hostile("poison", "import sys, builtins, math, json, os, random\nbuiltins.sum = lambda *_: 0\nmath.pi = 3\njson.dumps = None\nsys.path.insert(0, '/tmp')\n"
            "open('/tmp/heapq.py', 'w').write('1/0')\nopen('/tmp/left', 'w').write('x')\nos.chdir('/')\nos.umask(0o777)" + WRONG, "wrong error data exit"),
]

PRINTING = [
    Hostile("marker", "print('PASS', flush=True)\nimport os\nos._exit(0)", "wrong"),
    Hostile("silent", "import sys\nsys.exit(0)", "wrong"),
    Hostile("right_then_crash", "print(sum(map(int, input().split())), flush=True)\n1 / 0", "exit"),
    Hostile("right_then_status", "print(sum(map(int, input().split())), flush=True)\nexit(3)", "exit"),
    Hostile("flood", "while True: print('x' * 65536)", "output"),
    Hostile("flood_of_errors", "import sys\nwhile True: sys.stderr.write('x' * 65536)", "output"),
    Hostile("flood_without_python", "import os\nwhile True: os.write(1, bytes(65536))", "output"),
    Hostile("exec", "import os\nos.execv('/bin/echo', ['echo', '3'])", "exit"),
    Hostile("hidden_answer", "import os\nfor d in range(3, 64):\n  try: print(os.read(d, 1000))\n  except OSError: pass", "wrong"),
    Hostile("nan_everywhere", "print('NaN')", "wrong"),
    Hostile("endless_number", "print('9' * 5000000)", "wrong"),
    Hostile("surrogates", "import sys\nsys.stdout.buffer.write(b'\\xff\\xfe3')", "wrong"),
    Hostile("grandchild", "import os\nif os.fork() == 0:\n  os.setsid()\n  print(3)", "exit"),
]

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
