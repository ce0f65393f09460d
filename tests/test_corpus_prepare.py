"""Preparing a corpus: equal bytes for equal input, every file accounted for, clear refusals."""

import argparse
import contextlib
import fcntl
import json
import os
import subprocess
import sys
import tarfile
import time
import warnings
from pathlib import Path

import pytest
import webdataset

from megatron_ra3.corpus import prepare as prepare_module
from megatron_ra3.corpus import staging
from megatron_ra3.corpus.commands import add_prepare_arguments, run_prepare
from megatron_ra3.corpus.documents import Document
from megatron_ra3.corpus.examine import decode
from megatron_ra3.corpus.examine import examine as examine_one
from megatron_ra3.corpus.languages import language_of
from megatron_ra3.corpus.lines import annotate, join_lines
from megatron_ra3.corpus.manifest import Manifest
from megatron_ra3.corpus.prepare import PrepareConfig, prepare
from megatron_ra3.corpus.reader import SplitReader
from megatron_ra3.corpus.snippets import SnippetLimits
from megatron_ra3.corpus.tokenizer import load_tokenizer
from tests.corpora import split_of

RUN_PREPARE = "import sys; from megatron_ra3.cli import main; sys.exit(main(['prepare', *sys.argv[1:]]))"
PREPARE_SCRIPT = Path(__file__).parents[1] / "tools" / "prepare_corpus.py"


def source(number):
    return f"# module {number}\nimport os\n\n\ndef f{number}(x):\n    # add it\n    return x + {number}\n"


@pytest.fixture
def sources(tmp_path):
    folder = tmp_path / "src"
    for number in range(40):
        path = folder / f"p{number // 2}" / f"m{number}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source(number))
    return folder


def config(folder, out, **settings):
    defaults = {
        "sources": (str(folder),), "out": str(out), "heldout_fraction": 0.25, "samples_per_shard": 7, "workers": 1,
        "without": ("near_duplicates",),
    }  # fmt: skip
    return PrepareConfig(**defaults | settings)


def read_all(out, split):
    reader = SplitReader(out, Manifest.load(out).splits[split], verify_checksums=True)
    records = [reader.read(sample) for sample in range(len(reader))]
    reader.close()
    return records


def tree(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_equal_input_gives_equal_bytes_whatever_the_workers(sources, tmp_path, monkeypatch):
    monkeypatch.setattr(staging, "BATCH_DOCUMENTS", 6)
    outs = [tmp_path / name for name in ("one", "two")]
    for out, workers in zip(outs, (1, 2), strict=True):
        prepare(config(sources, out, tokenizer_vocab=300, pretokenize="newline", workers=workers))
    found = [tree(out) for out in outs]
    assert {"manifest.json", "train-00000.tar", "heldout-00000.npy", "tokenizer/tokenizer.json", "report.html"} <= set(
        found[0]
    )
    assert found[0] == found[1]


def test_counts_and_split_by_repository(sources, tmp_path):
    manifest = prepare(config(sources, tmp_path / "out"))
    assert manifest == Manifest.load(tmp_path / "out")
    records = {split: read_all(tmp_path / "out", split) for split in manifest.splits}
    files = {split: {record.source for record in found} for split, found in records.items()}
    assert files["train"] | files["heldout"] == {f"m{number}.py" for number in range(40)}
    repos = {split: {record.repo for record in found} for split, found in records.items()}
    assert repos["train"].isdisjoint(repos["heldout"])
    assert repos["train"] | repos["heldout"] == {f"p{number}" for number in range(20)}
    train, heldout = manifest.splits["train"], manifest.splits["heldout"]
    assert 0 < heldout.files < 20
    assert (train.repos, heldout.repos) == (len(repos["train"]), len(repos["heldout"]))
    assert (train.files, train.snippets, train.lines, train.native_comments) == (
        len(files["train"]),
        len(files["train"]),
        3 * len(files["train"]),
        2 * len(files["train"]),
    )
    assert train.chars == sum(len(source(int(name[1:-3]))) for name in files["train"])
    assert manifest.bytes_seen == sum(len(source(number)) for number in range(40))
    assert [shard.samples for shard in train.shards] == [7] * (train.files // 7) + [train.files % 7] * (
        train.files % 7 > 0
    )


def test_tokens_are_those_of_the_tokenizer(sources, tmp_path):
    manifest = prepare(config(sources, tmp_path, tokenizer_vocab=300))
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    assert manifest.tokenizer_sha256 == tokenizer.fingerprint
    for split, info in manifest.splits.items():
        segments = [annotate(line, "observe") for record in read_all(tmp_path, split) for line in record.lines]
        assert info.tokens == sum(len(tokenizer.encode(text)) for pair in segments for text in pair if text)


def test_a_repository_keeps_its_split_in_any_corpus(sources, tmp_path):
    prepare(config(sources, tmp_path / "all"))
    for path in sorted(sources.rglob("*.py"))[::2]:
        path.unlink()
    prepare(config(sources, tmp_path / "half"))
    heldout = {record.repo for record in read_all(tmp_path / "all", "heldout")}
    assert {record.repo for record in read_all(tmp_path / "half", "train")}.isdisjoint(heldout)
    names = [f"repository {number}" for number in range(4000)]
    assert 0.23 < sum(split_of(name, 0.25) == "heldout" for name in names) / len(names) < 0.27
    assert {split_of(name, 0.0) for name in names} == {"train"}


def test_shards_are_ordinary_webdataset_shards(sources, tmp_path):
    manifest = prepare(config(sources, tmp_path))
    urls = [str(tmp_path / shard.tar.name) for shard in manifest.splits["train"].shards]
    read = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    records = read_all(tmp_path, "train")
    assert [sample["json"] for sample in read] == [record.to_json() for record in records]
    assert [sample["__key__"] for sample in read] == [record.id for record in records]
    with tarfile.open(urls[0]) as tar:
        assert {(member.mtime, member.uname, member.mode) for member in tar} == {(0, "ra3", 0o444)}


def test_samples_are_the_source(sources, tmp_path):
    prepare(config(sources, tmp_path))
    record = read_all(tmp_path, "train")[0]
    assert join_lines(record.lines) + "\n" == (sources / record.repo / record.source).read_text()
    assert [annotate(line, "observe")[0] for line in record.lines] == [
        f" module {record.source[1:-3]}",
        None,
        " add it",
    ]


def test_every_file_that_is_left_out_is_counted(sources, tmp_path):
    bad = {
        "undecodable": b"x = '\xff'\ny\nz\n",
        "cookie": b"# coding: rot13\nx\ny\nz\n",
        "unparsable": b"def f(:\n",
        "null": b"x = 1\n\0\n",
        "empty": b"# nothing\n\n",
        "large": b"x = 1\n" * 1000,
        "short": b"short = 1\n",
        "twin": source(3).encode(),
        "generated": b"# Generated by a tool. DO NOT EDIT.\nx = 1\ny = 2\n",
        "minified": b"x = 1;" * 500 + b"\ny = 2\n",
    }
    (sources / "cut.py").write_text("a = 1\nb = a\n" + f"c = '{'x' * 320}'\n" + "d = b\n")
    for name, data in bad.items():
        (sources / f"{name}.py").write_bytes(data)
    (sources / "gone.py").symlink_to("nowhere.py")
    os.mkfifo(sources / "pipe.py")
    manifest = prepare(config(sources, tmp_path / "out", max_file_bytes=5500, limits=SnippetLimits(40, 300, 2)))
    assert manifest.files_dropped == {
        "undecodable": 2,
        "unparsable": 2,
        "too_large": 1,
        "empty": 1,
        "no_snippet": 1,
        "duplicate": 1,
        "unreadable": 2,
        "generated": 1,
        "minified": 1,
    }
    assert manifest.cut_dropped == {"line_too_long": 1, "snippet_too_short": 1}
    assert manifest.files_seen == 41 + len(bad) + 2
    assert manifest.files_seen == sum(split.files for split in manifest.splits.values()) + 12


def test_deep_nesting_is_unparsable(sources, tmp_path):
    (sources / "deep.py").write_text("(value +\n" * 5000 + "value" + ")\n" * 5000)
    assert prepare(config(sources, tmp_path / "out")).files_dropped == {"unparsable": 1}


def test_warnings_of_parsed_files_stay_silent(sources, tmp_path):
    (sources / "w.py").write_text("a = '\\d'\nb = 1 is 1\nc = a\n")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        prepare(config(sources, tmp_path / "out"))
    assert [str(warning.message) for warning in caught if warning.category in (SyntaxWarning, DeprecationWarning)] == []


def test_text_is_decoded_as_the_interpreter_does():
    def text(data, path="m.py", **origin):
        document = Document("r", path, "", data, **origin)
        return decode(document, language_of(path))

    assert text(b"\xef\xbb\xbfx = '\xc3\xa9'\r\ny\rz") == "x = '\u00e9'\ny\nz"
    assert text(b"# coding: latin-1\nx = '\xe9'") == "# coding: latin-1\nx = '\u00e9'"
    assert text(b"# coding: latin-1\nx = '\xc3\xa9'", is_text=True) == "# coding: latin-1\nx = '\u00e9'"
    assert text(b"# coding: latin-1\nx = '\xc3\xa9'", "m.go") == "# coding: latin-1\nx = '\u00e9'"


def test_empty_corpus_says_what_was_looked_at(sources, tmp_path):
    for path in sources.rglob("*.py"):
        path.write_text("def f(:\n" + "a" * int(path.stem[1:]))
    with pytest.raises(ValueError, match=r"empty corpus.*src; 40 files seen.*dropped 40 unparsable files"):
        prepare(config(sources, tmp_path / "out"))
    assert list((tmp_path / "out").iterdir()) == []


def test_another_corpus_is_not_overwritten_unasked(sources, tmp_path):
    out = tmp_path / "out"
    first = prepare(config(sources, out))
    (out / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="--overwrite"):
        prepare(config(sources, out, limit_files=10))
    assert Manifest.load(out) == first
    second = prepare(config(sources, out, limit_files=10, overwrite=True))
    assert second.files_seen == 10
    listed = {
        file.name for split in second.splits.values() for shard in split.shards for file in (shard.tar, shard.index)
    }
    assert {path.name for path in out.iterdir()} == listed | {
        "manifest.json", "report.json", "report.html", "notes.txt",
    }  # fmt: skip


def test_failed_overwrite_leaves_the_old_corpus(sources, tmp_path):
    out = tmp_path / "out"
    first = prepare(config(sources, out))
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match="empty corpus"):
        prepare(config(tmp_path / "nothing", out, overwrite=True))
    assert Manifest.load(out) == first
    assert len(read_all(out, "train")) == first.splits["train"].snippets


def test_each_filter_drops_what_it_is_for_and_can_be_switched_off(sources, tmp_path):
    secret = "AKIA" + "IOSFODNN7ABCDEFG"
    (sources / "p0" / "m0.py").write_text(
        f"# SPDX-License-Identifier: GPL-3.0-only\nkey = '{secret}'\nb = key\nc = b\n"
    )
    (sources / "p1" / "m2.py").write_text(
        "# SPDX-License-Identifier: MIT\nto = 'jane.doe@company.org'\nb = to\nc = b\n"
    )
    body = "".join(f"v{number} = call_{number}(v{number - 1})\n" for number in range(60))
    (sources / "p2" / "m4.py").write_text(body)
    (sources / "p3" / "m6.py").write_text(body + "last = v59\n")
    task = {
        "task_id": "Bench/0",
        "prompt": 'def spread(xs):\n    """Return the difference between the largest and the smallest of all the '
        'numbers in the list, or zero when there are none of them."""\n',
        "canonical_solution": "    return max(xs) - min(xs) if xs else 0\n",
        "entry_point": "spread",
        "test": "def check(candidate):\n    assert candidate([1, 5]) == 4\n",
    }
    (tmp_path / "bench.jsonl").write_text(json.dumps(task) + "\n")
    (sources / "p4" / "m8.py").write_text(f"import os\n\n\n{task['prompt']}    ...\n\n\nx = os\n")
    strict = prepare(
        config(
            sources, tmp_path / "strict", without=(), licences=("MIT",), unknown_licence=True,
            benchmarks=(str(tmp_path / "bench.jsonl"),),
        )
    )  # fmt: skip
    assert strict.files_dropped == {"licence": 1, "near_duplicate": 1, "contaminated": 1}
    assert strict.licences == {"mit": 1, "unknown": 36}
    assert sum(strict.scrubbed.values()) == 1
    found = [
        line.code for split in strict.splits for record in read_all(tmp_path / "strict", split) for line in record.lines
    ]
    assert "to = 'email@example.com'" in found
    assert strict.settings["benchmarks"].keys() == {str(tmp_path / "bench.jsonl")}
    loose = prepare(config(sources, tmp_path / "loose", without=("near_duplicates", "scrub")))
    assert loose.files_dropped == {}
    assert loose.scrubbed == {}
    found = [
        line.code for split in loose.splits for record in read_all(tmp_path / "loose", split) for line in record.lines
    ]
    assert f"key = '{secret}'" in found


def test_a_killed_run_examines_only_what_is_missing(sources, tmp_path, monkeypatch):
    monkeypatch.setattr(staging, "BATCH_DOCUMENTS", 10)
    examined = []

    def examine_until(limit):
        def examine(document, rules, real=examine_one):
            if len(examined) == limit:
                raise KeyboardInterrupt
            examined.append(document.path)
            return real(document, rules)

        return examine

    monkeypatch.setattr(staging, "examine", examine_until(25))
    with pytest.raises(KeyboardInterrupt):
        prepare(config(sources, tmp_path / "out"))
    assert not (tmp_path / "out" / "manifest.json").exists()
    (sources / "p1" / "m2.py").write_text(source(222))  # in the second batch, which must be examined again
    examined.clear()
    monkeypatch.setattr(staging, "examine", examine_until(-1))
    resumed = prepare(config(sources, tmp_path / "out"))
    assert len(examined) == 30
    assert resumed == prepare(config(sources, tmp_path / "fresh"))
    assert tree(tmp_path / "out") == tree(tmp_path / "fresh")


def test_a_kill_leaves_no_worker_and_the_same_command_goes_on(sources, tmp_path):
    for number in range(300):
        path = sources / f"q{number}" / "m.py"
        path.parent.mkdir()
        path.write_text("".join(f"v{number}_{row} = {row}\n" for row in range(100)))
    out = tmp_path / "out"
    small_batches = f"from megatron_ra3.corpus import staging; staging.BATCH_DOCUMENTS = 15; {RUN_PREPARE}"
    command = [sys.executable, "-c", small_batches, sources, "--out", out, "--workers", "2"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 60
    while not list(out.glob(".preparing/batches/*.json")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while in_session(process.pid):
        assert time.monotonic() < deadline, in_session(process.pid)
        time.sleep(0.1)
    assert not (out / "manifest.json").exists()
    subprocess.run(command, check=True, capture_output=True)
    prepare(PrepareConfig(sources=(str(sources),), out=str(tmp_path / "fresh"), workers=1))
    assert tree(out) == tree(tmp_path / "fresh")


def in_session(leader):
    """Command lines of the processes of a session that have not ended."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == leader and fields[0] != "Z":
                found.append((folder / "cmdline").read_text())
    return found


def test_one_bad_document_neither_ends_the_run_nor_loses_its_work(sources, tmp_path, monkeypatch):
    (sources / "bad.py").write_bytes(b"# coding: undefined\nx = 1\n")
    assert prepare(config(sources, tmp_path / "out")).files_dropped == {"undecodable": 1}
    monkeypatch.setattr(prepare_module, "write_report", lambda *_: json.loads("{"))
    with pytest.raises(ValueError, match="Expecting"):
        prepare(config(sources, tmp_path / "late"))
    assert list((tmp_path / "late" / ".preparing" / "batches").glob("*.json"))


def test_a_foreign_file_is_neither_deleted_nor_replaced(sources, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for name in ("train-mine.tar", "heldout-notes.npy"):
        (out / name).write_text(name)
    prepare(config(sources, out))
    assert [(out / name).read_text() for name in ("train-mine.tar", "heldout-notes.npy")] == [
        "train-mine.tar", "heldout-notes.npy",
    ]  # fmt: skip
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "train-00000.tar").write_text("foreign")
    with pytest.raises(FileExistsError, match=r"train-00000\.tar is in the way and belongs to no corpus"):
        prepare(config(sources, tmp_path / "other"))
    assert (tmp_path / "other" / "train-00000.tar").read_text() == "foreign"


def test_two_runs_do_not_write_the_same_corpus(sources, tmp_path):
    out = tmp_path / "out"
    (out / ".preparing").mkdir(parents=True)
    with (out / ".preparing" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(FileExistsError, match="another process is preparing a corpus in"):
            prepare(config(sources, out))
    assert prepare(config(sources, out)).files_seen == 40


def test_the_report_names_what_was_left_out(sources, tmp_path):
    (sources / "bad<i>.py").write_text("def f(:\n")
    for name in ("q<i>", "q2"):
        (sources / name).mkdir()
        (sources / name / "twin.py").write_text(source(3))
    manifest = prepare(config(sources, tmp_path / "out"))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    dropped = {"unparsable": 1, "duplicate": 2}
    assert (report["files_seen"], report["files_kept"], report["files_dropped"]) == (43, 40, dropped)
    assert report["largest_groups_of_duplicates"] == [
        {
            "kept": "p1/m3.py", "duplicates": 2, "near_duplicates": 0,
            "examples": [["q2/twin.py", "duplicate"], ["q<i>/twin.py", "duplicate"]],
        }
    ]  # fmt: skip
    assert report["largest_repositories"]["p3"] == 2
    (example,) = report["examples_of_dropped"]["unparsable"]
    assert example[0] == "bad<i>/bad<i>.py"
    page = (tmp_path / "out" / "report.html").read_text()
    assert "bad&lt;i&gt;/bad&lt;i&gt;.py" in page
    assert "<summary>p1/m3.py: 2 duplicates, 0 near duplicates</summary><table><tr><td>q2/twin.py</td>" in page
    assert "<i>" not in page
    assert f"{manifest.splits['train'].lines:,}" in page


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heldout_fraction": 1.0}, r"heldout_fraction must be in \[0, 1\), found 1.0"),
        ({"samples_per_shard": 0}, "samples_per_shard must be at least 1, found 0"),
        ({"limit_files": 0}, "limit_files must be at least 1"),
        ({"tokenizer_vocab": 100}, "tokenizer_vocab must be at least 261, found 100"),
        ({"sources": ()}, "no source given"),
    ],
)
def test_impossible_settings(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, tmp_path / "out", **settings)


def test_missing_source_folder(tmp_path):
    with pytest.raises(ValueError, match="nowhere does not exist"):
        prepare(config(tmp_path / "nowhere", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_command_line(sources, tmp_path, capsys):
    parser = argparse.ArgumentParser()
    add_prepare_arguments(parser)
    out = tmp_path / "out"
    arguments = [str(sources), "--out", str(out), "--exclude", "m1*", "--max-lines", "9", "--heldout-fraction", "0.5"]
    assert run_prepare(parser.parse_args(arguments)) == 0
    settings = json.loads((out / "manifest.json").read_text())["settings"]
    assert settings["limits"] == {"max_lines": 9, "max_chars": 2048, "min_lines": 3}
    assert "seen 29 files" in " ".join(capsys.readouterr().out.split())


def test_standard_library_leaves_out_tests(tmp_path):
    parser = argparse.ArgumentParser()
    add_prepare_arguments(parser)
    run_prepare(parser.parse_args(["--stdlib", "--out", str(tmp_path), "--limit-files", "40", "--workers", "1"]))
    names = {record.source for split in ("train", "heldout") for record in read_all(tmp_path, split)}
    assert {"abc.py", "ast.py", "argparse.py"} <= names
    assert not any("test" in Path(name).parts for name in names)


def test_script_reports_errors_in_one_line(tmp_path):
    ran = subprocess.run(
        [sys.executable, PREPARE_SCRIPT, tmp_path, "--out", tmp_path / "out"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 1
    assert ran.stderr.startswith("error: empty corpus: no training snippet in ")
    assert len(ran.stderr.splitlines()) == 1
