"""Inputs: every kind yields the same documents, and damage of any kind is counted, never raised and never silent."""

import gzip
import io
import json
import os
import subprocess
import tarfile
import tracemalloc

import pytest

from megatron_ra3.corpus.documents import Document, Progress, Selection, Unreadable
from megatron_ra3.corpus.inputs import Input, find_inputs, read_documents, walk

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
zstandard = pytest.importorskip("zstandard")

PY = frozenset({".py"})
FILES = {
    "alone.py": b"a = 1\n",
    "app/main.py": b"m = 1\n",
    "app/readme.md": b"no\n",
    "app/tests/t.py": b"t = 1\n",
    "lib/u.py": "u = '\u00fc'\n".encode(),
}
DOCUMENTS = [
    Document("alone", "alone.py", "", b"a = 1\n"),
    Document("app", "main.py", "", b"m = 1\n"),
    Document("lib", "u.py", "", "u = '\u00fc'\n".encode()),
]


def inputs(path):
    return find_inputs([str(path)], suffixes=PY, exclude=("tests",))


def read(path, max_file_bytes=1000):
    """All that the only input at `path` yields; its progress must come to its size."""
    (source,) = inputs(path)
    progress = Progress()
    found = list(
        read_documents(source, suffixes=PY, exclude=("tests",), max_file_bytes=max_file_bytes, progress=progress)
    )
    assert progress.bytes == source.bytes or any(isinstance(item, Unreadable) for item in found)
    return found


def compressed(path, data):
    if path.suffix in {".gz", ".tgz"}:
        return gzip.compress(data)
    return zstandard.ZstdCompressor(write_checksum=True).compress(data) if path.suffix == ".zst" else data


def tar_bytes(files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def write_folder(folder, files):
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def git(folder, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path):
    folder = write_folder(tmp_path / "project", FILES)
    (folder / ".gitattributes").write_bytes(b"main.py export-ignore\n*.py text eol=crlf\n")
    git(folder, "init")
    git(folder, "add", ".")
    git(folder, "commit", "-m", "first")
    return folder


def test_a_folder(tmp_path):
    folder = write_folder(tmp_path / "src", FILES)
    (source,) = inputs(folder)
    assert source == Input("folder", folder, sum(len(document.data) for document in DOCUMENTS))
    assert read(folder) == DOCUMENTS


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.tgz", "a.tar.zst"])
def test_a_tar_archive_holds_the_same_documents(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(compressed(path, tar_bytes({f"./{file}": data for file, data in FILES.items()})))
    assert inputs(path) == [Input("tar", path, path.stat().st_size)]
    assert read(path) == DOCUMENTS


def test_git_reads_what_was_committed_and_nothing_else(repository):
    (repository / "app" / "main.py").write_bytes(b"changed")
    (repository / "new.py").write_bytes(b"untracked")
    expected = [Document("project", path, "", FILES[path]) for path in ("alone.py", "app/main.py", "lib/u.py")]
    assert inputs(repository) == [Input("git", repository, sum(len(document.data) for document in expected))]
    assert read(repository) == expected


def test_a_bare_repository(repository, tmp_path):
    git(tmp_path, "clone", "--bare", str(repository), "bare.git")
    assert [document.repo for document in read(tmp_path / "bare.git")] == ["bare"] * 3


def test_large_linked_and_lost_files_of_git_are_counted(repository):
    (repository / "link.py").symlink_to("alone.py")
    (repository / "large.py").write_bytes(b"#" * 2000)
    git(repository, "add", ".")
    git(repository, "commit", "-m", "second")
    for name, ruin in {"lib/u.py": lambda path: path.unlink(), "alone.py": lambda path: path.write_bytes(b"?")}.items():
        found = subprocess.run(["git", "rev-parse", f"HEAD:{name}"], cwd=repository, check=True, capture_output=True)
        object_id = found.stdout.decode().strip()
        path = repository / ".git" / "objects" / object_id[:2] / object_id[2:]
        path.chmod(0o644)
        ruin(path)
    assert read(repository) == [
        Unreadable("alone.py", "unreadable"),
        Document("project", "app/main.py", "", b"m = 1\n"),
        Unreadable("large.py", "too_large"),
        Unreadable("lib/u.py", "unreadable"),
        Unreadable("link.py", "unreadable"),
    ]


def test_git_problems_name_the_repository(tmp_path, monkeypatch):
    (tmp_path / "fresh").mkdir()
    git(tmp_path / "fresh", "init")
    with pytest.raises(ValueError, match=r"git cannot read HEAD of .*fresh: fatal: .*check out a commit"):
        inputs(tmp_path / "fresh")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OSError, match=r"git is not installed, but .*fresh is a git repository"):
        inputs(tmp_path / "fresh")


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.json.gz"])
def test_jsonl(tmp_path, name):
    rows = [
        {
            "content": "x = '\u00fc'",
            "max_stars_repo_path": "/p/x.py",
            "max_stars_repo_name": "o",
            "licenses": ["MIT"],
        },
        {"code": "y", "path": "y.py", "repo_name": "q", "license": None},
        {"content": "no", "path": "n.js"},
        {"content": "excluded", "path": "tests/n.py"},
        {"text": "plain"},
    ]
    path = tmp_path / name
    path.write_bytes(compressed(path, "\n\n".join(map(json.dumps, rows)).encode()))
    assert read(path) == [
        Document("o", "p/x.py", "MIT", "x = '\u00fc'".encode(), is_text=True),
        Document("q", "y.py", "", b"y", is_text=True),
        Document("", "row-8.py", "", b"plain", is_text=True),
    ]


def test_bad_lines_of_jsonl_are_counted(tmp_path):
    good = json.dumps({"content": "x", "path": "x.py"})
    lines = [good, '{"content": "to', "[1]", '{"path": "a.py"}', '{"content": "x", "path": null}', '{"content": 3}']
    lines += ["[" * 100_000, json.dumps({"content": "\x01" * 1001}), "x" * 100_000 + "\n" + good]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines))
    found = read(path)
    assert [item.path for item in found if isinstance(item, Document)] == ["x.py", "x.py"]
    assert [(item.path.rpartition(":")[2], item.reason) for item in found if isinstance(item, Unreadable)] == [
        *((str(number), "unreadable") for number in range(2, 7)),
        ("7", "too_large"),
        ("row-7.py", "too_large"),
        ("9", "too_large"),
    ]


def test_a_lone_surrogate_does_not_end_the_run(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"content": "\\ud800", "path": "\\ud800.py", "repo": "\\ud800"}')
    assert read(tmp_path / "a.jsonl") == [Document("?", "?.py", "", b"\xed\xa0\x80", is_text=True)]


def write_parquet(path, **settings):
    table = pa.table(
        {
            "size": [1, 2, 3, 4],
            "content": ["x = '\u00fc'", "#" * 2000, None, "y"],
            "path": ["x.py", "l.py", "n.py", "y.rb"],
            "detected_licenses": [["MIT", "Apache-2.0"], [], None, []],
            "license_type": ["permissive"] * 4,
            "repo_name": ["o/r"] * 4,
        }
    )
    parquet.write_table(table, path, **settings)


def test_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    write_parquet(path)
    assert read(path) == [
        Document("o/r", "x.py", "MIT,Apache-2.0", "x = '\u00fc'".encode(), is_text=True),
        Unreadable("l.py", "too_large"),
        Unreadable(f"{path}: row 2", "unreadable"),
    ]


def test_parquet_without_paths_and_with_several_batches(tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"text": [str(row) for row in range(200)]}), path, row_group_size=90)
    found = read(path)
    assert [(document.path, document.data) for document in found] == [
        (f"row-{row}.py", str(row).encode()) for row in range(200)
    ]


def test_parquet_without_content_is_refused_at_once(tmp_path):
    parquet.write_table(pa.table({"blob_id": ["a"], "path": ["a.py"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet has no column for the content.*it has blob_id, path"):
        inputs(tmp_path / "a.parquet")


def test_damaged_parquet_counts_every_lost_row(tmp_path):
    path = tmp_path / "a.parquet"
    rows = [os.urandom(300).hex() for _ in range(300)]
    parquet.write_table(
        pa.table({"content": rows}), path, row_group_size=100, write_page_checksum=True, compression="NONE"
    )
    data = bytearray(path.read_bytes())
    offset = data.find(rows[150].encode()[:20])
    data[offset : offset + 50] = b"?" * 50
    path.write_bytes(data)
    found = read(path)
    assert [item.path for item in found if isinstance(item, Unreadable)] == [
        f"{path}: row {r}" for r in range(100, 200)
    ]
    assert [item.data.decode() for item in found if isinstance(item, Document)] == rows[:100] + rows[200:]
    path.write_bytes(data[:-20])
    (lost,) = read(path)
    assert lost.path.startswith(f"{path}: broken")


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tar.zst", ".jsonl.gz", ".jsonl.zst"])
def test_a_cut_archive_says_where_it_broke(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    names = [f"r/{number}.py" for number in range(60)]
    contents = [os.urandom(400).hex() for _ in names]
    if ".tar" in suffix:
        data = tar_bytes(dict(zip(names, map(str.encode, contents), strict=True)))
    else:
        rows = zip(names, contents, strict=True)
        data = "\n".join(json.dumps({"path": name, "content": content}) for name, content in rows).encode()
    whole = compressed(path, data)
    path.write_bytes(whole)
    assert len(read(path)) == 60
    for size in {len(whole) // 3, len(whole) // 2, len(whole) - (5 if suffix != ".tar" else 20_000), 512 * 5}:
        path.write_bytes(whole[:size])
        *good, lost = read(path)
        assert all(isinstance(item, Document) for item in good)
        assert [item.data.decode() for item in good] == contents[: len(good)]
        assert lost.path.startswith(f"{path}: broken after ")
        assert lost.reason == "unreadable"


def test_damage_inside_an_archive_is_found(tmp_path):
    data = bytearray(tar_bytes({f"r/{number}.py": b"x" for number in range(9)}))
    path = tmp_path / "a.tar"
    path.write_bytes(data[:9216] + b"junk" * 256)
    assert read(path)[-1].path.startswith(f"{path}: broken after r/8.py (no end mark, ")
    data[1024 * 4 + 10] ^= 255
    path.write_bytes(data)
    assert len(read(path)) == 4 + 1
    path.write_bytes(tar_bytes({"r/a.py": b""}) + tar_bytes({"r/b.py": b""}))
    assert "data after the end mark" in read(path)[-1].path
    path.write_bytes(b"")
    assert read(path)[0].path.startswith(f"{path}: broken after its start (")
    zst = tmp_path / "b.tar.zst"
    whole = bytearray(compressed(zst, tar_bytes({"r/a.py": os.urandom(900)})))
    whole[len(whole) // 2] ^= 255
    zst.write_bytes(whole)
    assert "damaged zstd frame" in read(zst)[-1].path


def test_zstd_files_of_several_frames(tmp_path):
    path = tmp_path / "a.jsonl.zst"
    frames = [compressed(path, json.dumps({"content": str(number)}).encode() + b"\n") for number in range(3)]
    skippable = b"\x50\x2a\x4d\x18\x03\0\0\0abc"
    path.write_bytes(skippable.join(frames) + skippable)
    assert [document.data for document in read(path)] == [b"0", b"1", b"2"]


def test_files_that_cannot_be_used_are_counted(tmp_path):
    folder = write_folder(tmp_path / "src", {"a.py": b"a", "large.py": b"#" * 1001})
    (folder / "gone.py").symlink_to("nowhere")
    (folder / "loop.py").symlink_to("loop.py")
    (folder / "again").symlink_to(folder)
    os.mkfifo(folder / "pipe.py")
    (folder / "folder.py").mkdir()
    raw = os.fsencode(folder) + b"/\xff.py"
    with open(raw, "wb") as file:  # noqa: PTH123
        file.write(b"name")
    assert read(folder) == [
        Document("a", "a.py", "", b"a"),
        Unreadable("gone.py", "unreadable"),
        Unreadable("large.py", "too_large"),
        Unreadable("loop.py", "unreadable"),
        Unreadable("pipe.py", "unreadable"),
        Document("?", "?.py", "", b"name"),
    ]


def test_a_folder_that_cannot_be_listed_is_counted(tmp_path, monkeypatch):
    write_folder(tmp_path, {"a/x.py": b"", "b/x.py": b""})
    real = os.scandir

    def scandir(path):
        if str(path).endswith("/a"):
            raise PermissionError(13, "not yours")
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert read(tmp_path) == [Unreadable("a", "unreadable"), Document("b", "x.py", "", b"")]


def test_links_and_large_members_of_a_tar_are_counted(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, kind, size in [("d.py", tarfile.DIRTYPE, 0), ("l.py", tarfile.SYMTYPE, 0), ("x.py", b"0", 1001)]:
            member = tarfile.TarInfo(name)
            member.type, member.size = kind, size
            tar.addfile(member, io.BytesIO(bytes(size)))
    assert read(tmp_path / "a.tar") == [Unreadable("l.py", "unreadable"), Unreadable("x.py", "too_large")]


def test_a_folder_of_archives_is_expanded_in_order(tmp_path):
    write_folder(tmp_path, {"README.md": b"", "b.tar": b"", "a/z.jsonl": b"", "notes.txt": b"", "tests/x.tar": b""})
    (tmp_path / "a" / "gone.tar").symlink_to("nowhere")
    found = inputs(tmp_path)
    assert [(source.kind, source.path.relative_to(tmp_path).as_posix()) for source in found] == [
        ("jsonl", "a/z.jsonl"),
        ("tar", "b.tar"),
    ]
    write_folder(tmp_path, {"setup.py": b"s"})
    assert inputs(tmp_path) == [Input("folder", tmp_path, 1)]


def test_suffixes_are_found_in_either_case(tmp_path):
    write_folder(tmp_path, {"a.PY": b"1", "b.py": b"2", "c.pyx": b"3"})
    assert [item.path for item in read(tmp_path)] == ["a.PY", "b.py"]


def test_unknown_inputs_are_refused(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"")
    with pytest.raises(ValueError, match=r"a\.zip is of no known kind; known are folders, git .* \.tar\.zst"):
        inputs(tmp_path / "a.zip")
    with pytest.raises(ValueError, match="nowhere does not exist; known are"):
        inputs(tmp_path / "nowhere")


def test_exclude_matches_names_and_paths(tmp_path):
    names = ("a/x.py", "a/tests/y.py", "tests/z.py", "b/x.py", "b/x.txt", "b/.h/x.py")
    write_folder(tmp_path, dict.fromkeys(names, b""))
    selection = Selection(PY, ("tests", "a/x.*", ".*"), 10)
    assert [path for _, path in walk(tmp_path, selection)] == ["b/x.py", "b/x.txt"]
    assert [name for name in names if selection.wants(name)] == ["b/x.py"]
    assert len(list(walk(tmp_path, Selection(PY, (), 10)))) == 6


def test_memory_stays_bounded(tmp_path):
    """64 MB of zeros in one member and one line: neither is held."""
    tar, jsonl = tmp_path / "a.tar.zst", tmp_path / "a.jsonl.gz"
    tar.write_bytes(compressed(tar, tar_bytes({"r/x.py": bytes(1 << 26)})))
    jsonl.write_bytes(compressed(jsonl, b"0" * (1 << 26)))
    for path in (tar, jsonl):
        tracemalloc.start()
        assert [item.reason for item in read(path)] == ["too_large"]
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak_bytes < 40e6, path
