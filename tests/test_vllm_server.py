"""A vLLM server's life: what stops it from starting, and that none of its processes outlives whoever started it."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from megatron_ra3.rollout import ports
from megatron_ra3.rollout.engine import EngineError
from megatron_ra3.rollout.server import ServerConfig, VllmServer, served_model_name

CONFIG = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 3000,
    "dtype": "float32",
}
SERVE = (
    "import sys; from pathlib import Path; from megatron_ra3.rollout.server import ServerConfig; "
    "from megatron_ra3.rollout.health import Restarts; from megatron_ra3.rollout.supervise import serve_forever; "
    "serve_forever(ServerConfig(Path(sys.argv[1]), Path(sys.argv[2]), dtype='float32', max_model_len=3000,"
    " kv_cache_bytes=1 << 26, block_size=32, extra_args=('--load-format=dummy',)),"
    " Restarts(1, 0.1, settled_s=60.0), stuck_after_s=60.0)"
)


def folder_with(path: Path, **changes) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    return path


class Process(NamedTuple):
    pid: int
    group: int
    command: str


def processes(*, parent: int | None = None, group: int | None = None) -> list[Process]:
    """All of a process group, or of the groups that children of `parent` lead; zombies aside."""
    table = subprocess.run(["ps", "-wweo", "pid=,ppid=,pgid=,stat=,args="], capture_output=True, text=True, check=True)
    rows = [line.split(None, 4) for line in table.stdout.splitlines()]
    groups = {int(row[2]) for row in rows if int(row[1]) == parent and row[0] == row[2]} | {group}
    return [Process(int(row[0]), int(row[2]), row[4]) for row in rows if int(row[2]) in groups and row[3][0] != "Z"]


def group_led_by_a_child_of(pid: int) -> int:
    wait_until(lambda: processes(parent=pid), 20)
    return processes(parent=pid)[0].group


@contextmanager
def running(command: list[str], **options) -> Iterator[subprocess.Popen]:
    with subprocess.Popen(command, **options) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_until(condition, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_model_name_depends_on_the_model_only(tmp_path):
    name = served_model_name(folder_with(tmp_path / "a"))
    assert re.fullmatch(r"Qwen2ForCausalLM-v320-[0-9a-f]{12}", name)
    assert served_model_name(folder_with(tmp_path / "b", dtype="bfloat16", transformers_version="5.0")) == name
    assert served_model_name(folder_with(tmp_path / "c", hidden_size=96)) != name
    assert "-v322-" in served_model_name(folder_with(tmp_path / "d", vocab_size=322))


def test_a_folder_without_a_model_is_refused_before_anything_starts(tmp_path):
    server = VllmServer(ServerConfig(tmp_path, tmp_path / "log"))
    with pytest.raises(ValueError, match=re.escape(f"model folder {tmp_path} has no config.json")):
        server.start()
    assert not server.poll()


def test_a_port_in_use_is_refused(tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(EngineError, match=f"cannot listen on 127.0.0.1:{port} .*choose another port"):
            VllmServer(ServerConfig(tmp_path, tmp_path / "log", port=port))


def test_a_chosen_port_is_given_to_nobody_else_and_can_be_listened_on(tmp_path):
    server = VllmServer(ServerConfig(tmp_path, tmp_path / "log"))
    asked = [ports.reserve("127.0.0.1") for _ in range(500)]
    assert server.port not in {each.getsockname()[1] for each in asked}
    for each in asked:
        each.close()
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", server.port))
        listener.listen()
        socket.create_connection(("127.0.0.1", server.port)).close()
    server.stop()


@pytest.mark.parametrize("victim", ["parent", "command"])
def test_the_watchdog_kills_the_whole_group_when_parent_or_command_dies(victim):
    # The command has a child of its own, as an API server has, which it would leave behind.
    command = "import subprocess; subprocess.run(['sleep', '321'])"
    start = (
        "import os, subprocess, sys, time; "
        "subprocess.Popen([sys.executable, '-m', 'megatron_ra3.rollout.watchdog', str(os.getpid()),"
        f" sys.executable, '-c', {command!r}], start_new_session=True); time.sleep(321)"
    )
    with running([sys.executable, "-c", start]) as parent:
        group = group_led_by_a_child_of(parent.pid)
        wait_until(lambda: any(process.command == "sleep 321" for process in processes(group=group)), 20)
        if victim == "command":
            (middle,) = [each for each in processes(group=group) if not re.search(r"watchdog|^sleep", each.command)]
            os.kill(middle.pid, signal.SIGKILL)
        else:
            parent.kill()
        wait_until(lambda: not processes(group=group), 20)


@pytest.mark.vllm
def test_a_server_that_dies_while_loading_shows_the_end_of_its_log(tmp_path):
    folder = folder_with(tmp_path / "model", architectures=["NoSuchModel"], model_type="no_such_model")
    server = VllmServer(ServerConfig(folder, tmp_path / "logs" / "vllm.log"))
    with pytest.raises(EngineError, match=r"(?s)died while starting; the end of .*vllm\.log:.*no_such_model"), server:
        pass
    assert not server.poll()


@pytest.mark.vllm
def test_a_server_that_does_not_answer_in_time_is_stopped(tmp_path):
    server = VllmServer(ServerConfig(folder_with(tmp_path / "model"), tmp_path / "log", start_timeout_s=0.5))
    server.start()
    group = server._process.pid
    with pytest.raises(EngineError, match=r"did not answer within start_timeout_s=0\.5"):
        server.wait()
    assert not processes(group=group)


@pytest.mark.vllm
def test_a_served_model_does_not_outlive_the_process_that_serves_it(tmp_path):
    folder = folder_with(tmp_path / "model")
    command = [sys.executable, "-c", SERVE, str(folder), str(tmp_path / "log")]
    # Ranks of torchrun have these; a server that took them for its own would wait for other ranks.
    torchrun = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}
    with running(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **torchrun}) as process:
        line = process.stdout.readline()
        assert re.match(rf"serving {folder} at http://127\.0\.0\.1:\d+, log in ", line)
        group = group_led_by_a_child_of(process.pid)
        assert any("EngineCore" in member.command for member in processes(group=group))
        process.kill()
        wait_until(lambda: not processes(group=group), 20)


@pytest.mark.vllm
def test_serving_ends_without_an_error_on_sigterm_even_while_it_starts(tmp_path):
    folder = folder_with(tmp_path / "model")
    with running([sys.executable, "-c", SERVE, str(folder), str(tmp_path / "log")]) as process:
        group = group_led_by_a_child_of(process.pid)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
    assert not processes(group=group)
