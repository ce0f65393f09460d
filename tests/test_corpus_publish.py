"""A kill in the very moment in which a corpus takes its place, before each thing that is done to a file there."""

import json
import subprocess
import sys

import pytest

from megatron_ra3.corpus import publish as publishing
from megatron_ra3.corpus.manifest import Manifest
from megatron_ra3.corpus.prepare import PrepareConfig, prepare
from megatron_ra3.corpus.rearrange import new_corpus

# In a child for every moment: replaces an old corpus by a new one, and dies before the n-th change of a name or a file
# from the entry of `publish` on. Prints how many moments there are.
KILL_EVERYWHERE = """
import os, shutil, signal, sys
from pathlib import Path
from megatron_ra3.corpus import prepare as module
from megatron_ra3.corpus.prepare import PrepareConfig, prepare

root = Path(sys.argv[1])
moments = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"}

def config(out):
    sources = (str(root / "new"),)
    return PrepareConfig(
        sources=sources, out=str(out), samples_per_shard=3, workers=1, overwrite=True, without=("near_duplicates",)
    )

def prepare_and_die(out, moment):
    left = moment
    armed = False

    def watch(event, arguments):
        nonlocal left
        if armed and (event in moments or (event == "open" and arguments[1] and "w" in arguments[1])):
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1

    def publish(*arguments, real=module.publish):
        nonlocal armed
        armed = True
        return real(*arguments)

    sys.addaudithook(watch)
    module.publish = publish
    prepare(config(out))
    os._exit(0)

prepare(config(root / "new-corpus"))  # imports once what the children need
moment = 0
while True:
    out = root / f"killed-{moment:02}"
    shutil.copytree(root / "old-corpus", out)
    child = os.fork()
    if child == 0:
        try:
            prepare_and_die(out, moment)
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    if os.WIFEXITED(status):
        sys.exit(os.WEXITSTATUS(status))
    assert os.WTERMSIG(status) == signal.SIGKILL, status
    moment += 1
"""


def make_sources(folder, numbers):
    for number in numbers:
        path = folder / f"p{number}" / "m.py"
        path.parent.mkdir(parents=True)
        path.write_text(f"a = {number}\nb = a\nc = b\n")


def config(root, name, out, **settings):
    defaults = {"samples_per_shard": 3, "workers": 1, "without": ("near_duplicates",)}
    return PrepareConfig(sources=(str(root / name),), out=str(out), **defaults | settings)


def tree(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_kill_while_publishing_loses_nothing(tmp_path):
    make_sources(tmp_path / "new", range(8))
    make_sources(tmp_path / "old", range(20, 32))
    old, new = tmp_path / "old-corpus", tmp_path / "new-corpus"
    prepare(config(tmp_path, "old", old, tokenizer_vocab=270))
    subprocess.run([sys.executable, "-c", KILL_EVERYWHERE, tmp_path], check=True)
    killed = sorted(tmp_path.glob("killed-*"))
    finished = killed.pop()  # more moments than there are
    assert tree(finished) == tree(new)
    assert len(killed) > 25
    left = {"no corpus": 0, "old": 0, "new": 0}
    for out in killed:
        found = {name: content for name, content in tree(out).items() if not name.startswith(".")}
        if "manifest.json" not in found:
            left["no corpus"] += 1
        else:
            left["old" if found == tree(old) else "new"] += 1
            assert found in (tree(old), tree(new))
        pending = publishing.is_publishing(out)
        if found == tree(new) and not pending:
            assert set(tree(out)) - set(found) <= {".preparing/lock"}
            continue
        again = prepare(config(tmp_path, "new", out, overwrite=True))
        assert again == Manifest.load(new)
        assert tree(out) == tree(new)
    assert left["no corpus"] > 5
    assert left["new"] > 1
    assert left["old"] > 1


def pending(tmp_path):
    """A corpus that a killed process was about to put into `out`."""
    make_sources(tmp_path / "new", range(8))
    make_sources(tmp_path / "other", range(40, 45))
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(publishing, "finish_publication", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare(config(tmp_path, "new", out))
    assert publishing.is_publishing(out)
    assert not (out / "manifest.json").exists()
    return out


def test_another_command_completes_what_was_begun_and_then_does_its_own(tmp_path):
    out = pending(tmp_path)
    with pytest.raises(FileExistsError, match="already holds a corpus; choose another --out or pass --overwrite"):
        prepare(config(tmp_path, "other", out))
    assert Manifest.load(out).files_seen == 8
    assert prepare(config(tmp_path, "other", out, overwrite=True)).files_seen == 5


def test_a_merge_does_not_take_the_place_of_what_was_begun(tmp_path):
    out = pending(tmp_path)
    with pytest.raises(FileExistsError, match="already holds a corpus"), new_corpus(out):
        pass
    assert Manifest.load(out).files_seen == 8
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_a_killed_merge_leaves_nothing_that_its_successor_trips_over(tmp_path):
    out = tmp_path / "out"
    (out / ".preparing" / "corpus").mkdir(parents=True)
    (out / ".preparing" / "corpus" / "train-00000.tar").write_text("half")
    with new_corpus(out) as folder:
        assert list(folder.iterdir()) == []
    with pytest.raises(ZeroDivisionError), new_corpus(out) as folder:
        (folder / "train-00000.tar").write_bytes(bytes(1 // 0))
    assert list(out.iterdir()) == []


def test_a_corpus_with_a_damaged_manifest_can_be_overwritten(tmp_path):
    make_sources(tmp_path / "new", range(8))
    out = tmp_path / "out"
    prepare(config(tmp_path, "new", out, tokenizer_vocab=270))
    (out / "manifest.json").write_text(json.dumps({"format_version": 1}))
    (out / "train-mine.tar").write_text("mine")
    prepare(config(tmp_path, "new", out, overwrite=True))
    prepare(config(tmp_path, "new", tmp_path / "fresh"))
    assert tree(out) == tree(tmp_path / "fresh") | {"train-mine.tar": b"mine"}


def test_a_foreign_report_or_tokenizer_is_not_replaced(tmp_path):
    make_sources(tmp_path / "new", range(8))
    out = tmp_path / "out"
    for name in ("report.html", "tokenizer/tokenizer.json"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("mine")
        with pytest.raises(FileExistsError, match=rf"{name} is in the way and belongs to no corpus"):
            prepare(config(tmp_path, "new", out, tokenizer_vocab=270))
        assert (out / name).read_text() == "mine"
        (out / name).unlink()
