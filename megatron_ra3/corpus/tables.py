"""Streams documents out of tables of code, JSONL and Parquet, whose columns every publisher names differently.

A row that cannot be used, and every row a damaged file takes with it, is counted.
"""

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO, Any

from megatron_ra3.corpus.archives import DAMAGE, open_decompressed
from megatron_ra3.corpus.documents import Document, Progress, Selection, Unreadable, clean_path

# What a column may be called; the first that is present counts.
CONTENT = ("content", "code", "text")
PATH = ("path", "max_stars_repo_path", "file_path", "filename")
REPO = ("repo_name", "repository", "max_stars_repo_name", "repo")
LICENCE = ("license", "licenses", "max_stars_repo_licenses", "detected_licenses", "license_type")

_ROWS_AT_ONCE = 64
_JSON_OVERHEAD = 8  # a control character takes six bytes in JSON; the other columns come on top


def read_jsonl(path: Path, selection: Selection, progress: Progress) -> Iterator[Document | Unreadable]:
    """Documents of a JSONL file, one object per line; rows without a path column are called row-<number>."""
    start_bytes, number = progress.bytes, 0
    try:
        with open_decompressed(path) as (file, content):
            for number, line in enumerate(_short_lines(content, _JSON_OVERHEAD * selection.max_file_bytes + 65536)):
                progress.bytes = start_bytes + file.tell()
                place = f"{path}:{number + 1}"
                if line is None:
                    yield Unreadable(place, "too_large")
                elif line.strip():
                    document = _parse_row(line, number, place, selection)
                    if document is not None:
                        yield document
    except DAMAGE as error:
        yield Unreadable(f"{path}: broken after line {number + 1} ({error})", "unreadable")


def read_parquet(path: Path, selection: Selection, progress: Progress) -> Iterator[Document | Unreadable]:
    """Documents of a Parquet file; only the columns that are needed are read.

    Raises:
        ValueError: there is no column for the content.
    """
    import pyarrow as pa
    from pyarrow import parquet

    start_bytes, file_bytes = progress.bytes, path.stat().st_size
    try:
        file = parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False, page_checksum_verification=True)
    except (OSError, pa.ArrowException) as error:
        yield Unreadable(f"{path}: broken ({error})", "unreadable")
        return
    with file:
        columns = _columns(path, file.schema_arrow.names)
        row, rows = 0, file.metadata.num_rows
        for group in range(file.num_row_groups):
            end = row + file.metadata.row_group(group).num_rows
            try:
                for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=list(columns.values())):
                    progress.bytes = start_bytes + file_bytes * (row + len(batch)) // rows
                    yield from _documents(batch, columns, row, path, selection)
                    row += len(batch)
            except (OSError, UnicodeDecodeError, pa.ArrowException):
                yield from (Unreadable(f"{path}: row {lost}", "unreadable") for lost in range(row, end))
                row = end


def check_parquet(path: Path) -> None:
    """Tells before hours of reading what `read_parquet` would refuse; a damaged file passes, it will be counted.

    Raises:
        ValueError: there is no column for the content.
    """
    import pyarrow as pa
    from pyarrow import parquet

    try:
        names = parquet.read_schema(path).names
    except (OSError, pa.ArrowException):
        return
    _columns(path, names)


def _columns(path: Path, names: list[str]) -> dict[str, str]:
    """Which column holds what, of those that are there."""
    roles = {"content": CONTENT, "path": PATH, "repo": REPO, "licence": LICENCE}
    columns = {role: found for role, known in roles.items() if (found := _first(known, names))}
    if "content" not in columns:
        raise ValueError(
            f"{path} has no column for the content of files, which would be called {', '.join(CONTENT)}; "
            f"it has {', '.join(names)}"
        )
    return columns


def _documents(
    batch: Any, columns: dict[str, str], first_row: int, file: Path, selection: Selection
) -> Iterator[Document | Unreadable]:
    from pyarrow import compute

    content = batch.column(columns["content"])
    sizes_bytes = compute.binary_length(content).to_pylist()
    values = {role: batch.column(name).to_pylist() for role, name in columns.items() if role != "content"}
    paths = values.get("path") or [_row_name(first_row + row, selection) for row in range(len(batch))]
    nothing = [None] * len(batch)
    labels = zip(values.get("repo", nothing), paths, values.get("licence", nothing), strict=True)
    for row, (repo, path, licence) in enumerate(labels):
        name = clean_path(path) if isinstance(path, str) else None
        if name and not selection.wants(name):
            continue
        if not name or sizes_bytes[row] is None:
            yield Unreadable(f"{file}: row {first_row + row}", "unreadable")
        elif sizes_bytes[row] > selection.max_file_bytes:
            yield Unreadable(name, "too_large")
        else:
            data = content[row].as_buffer().to_pybytes()
            yield Document(_text(repo), name, _text(licence), data, is_text=True)


def _parse_row(line: bytes, number: int, place: str, selection: Selection) -> Document | Unreadable | None:
    """None if the row is not wanted."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return Unreadable(place, "unreadable")
    if not isinstance(row, dict):
        return Unreadable(place, "unreadable")
    named = _first(PATH, row)
    path = row[named] if named else _row_name(number, selection)
    name = clean_path(path) if isinstance(path, str) else None
    if name and not selection.wants(name):
        return None
    content = row.get(_first(CONTENT, row))
    if not name or not isinstance(content, str):
        return Unreadable(place, "unreadable")
    data = content.encode("utf-8", "surrogatepass")
    if len(data) > selection.max_file_bytes:
        return Unreadable(name, "too_large")
    repo, licence = (_text(row.get(_first(known, row))) for known in (REPO, LICENCE))
    return Document(repo, name, licence, data, is_text=True)


def _short_lines(content: IO[bytes], max_line_bytes: int) -> Iterator[bytes | None]:
    """The lines, None for one that is too long to be read."""
    while line := content.readline(max_line_bytes):
        if len(line) < max_line_bytes or line.endswith(b"\n"):
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = content.readline(max_line_bytes)
        yield None


def _first(known: tuple[str, ...], names: Collection[str]) -> str | None:
    return next((name for name in known if name in names), None)


def _row_name(row: int, selection: Selection) -> str:
    return f"row-{row}{selection.suffix_of_unnamed}"


def _text(value: object) -> str:
    """A label as it is written, several joined by commas, "" for none."""
    values = value if isinstance(value, list) else [value]
    return ",".join(str(part) for part in values if part is not None).encode("utf-8", "replace").decode()
