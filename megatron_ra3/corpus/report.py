"""The report of a prepared corpus: what was kept, what was left out and why, as JSON and as a page to look at.

Whoever trains on a corpus should have looked at it. The page is one file without scripts or links, so that it can be
opened over ssh-mounted folders and sent by mail.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_ra3.corpus.lines import join_lines
from megatron_ra3.corpus.manifest import Manifest
from megatron_ra3.corpus.originals import Family, Originals
from megatron_ra3.corpus.publish import PAGE, REPORT
from megatron_ra3.corpus.shards import read_shard

_LARGEST = 15
_SNIPPETS_SHOWN = 3
_STYLE = """
:root { color-scheme: light dark; --bar: #4a7ebb; --lost: #c0703a; --soft: #8884; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
.tiles { display: flex; flex-wrap: wrap; gap: .75rem; margin: 1rem 0; }
.tile { border: 1px solid var(--soft); border-radius: .5rem; padding: .5rem .9rem; }
.tile b { display: block; font-size: 1.25rem; }
table { border-collapse: collapse; width: 100%; } td, th { padding: .15rem .5rem; text-align: left; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.bar { width: 50%; } td.bar div { height: .8rem; border-radius: .2rem; background: var(--bar); min-width: 1px; }
.lost td.bar div { background: var(--lost); }
pre { overflow-x: auto; border: 1px solid var(--soft); border-radius: .5rem; padding: .7rem; font-size: 13px; }
summary { cursor: pointer; } small { opacity: .7; }
"""


@dataclass(frozen=True)
class Report:
    """What the report says beyond the manifest.

    `repos` counts the files of each repository that are kept; `examples` holds (path, detail) of some files that were
    dropped, by reason; `families` come from `report_families`.
    """

    manifest: Manifest
    repos: Counter[str]
    examples: Mapping[str, Sequence[Sequence[str]]]
    families: Sequence[Mapping[str, Any]] = ()


def report_families(
    found: Originals, families: Sequence[Family], names: Mapping[int, str | None]
) -> list[dict[str, Any]]:
    """Families of duplicates as JSON values: the name of the file that stayed, and of some that went."""
    return [
        {
            "kept": names[family.kept],
            "duplicates": family.exact,
            "near_duplicates": family.near,
            "examples": [
                [names[file], "duplicate" if found.exact[file] else "near duplicate"] for file in family.first
            ],
        }
        for family in families
    ]


def write_report(folder: Path, report: Report) -> None:
    """Writes `report.json` and `report.html` beside the shards in `folder`."""
    content = _content(report)
    (folder / REPORT).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    page = _page(content, _samples(folder, report.manifest))
    (folder / PAGE).write_text(page, encoding="utf-8", errors="backslashreplace")


def _content(report: Report) -> dict[str, Any]:
    manifest = asdict(report.manifest)
    splits = {
        name: {figure: value for figure, value in split.items() if figure != "shards"}
        | {"shards": len(split["shards"])}
        for name, split in manifest.pop("splits").items()
    }
    return {
        "splits": splits,
        "files_kept": sum(split["files"] for split in splits.values()),
        **{name: manifest[name] for name in ("files_seen", "bytes_seen", "files_dropped", "cut_dropped", "scrubbed")},
        "licences": _ranked(report.manifest.licences),
        "languages": _ranked(report.manifest.languages),
        "largest_repositories": dict(list(_ranked(report.repos).items())[:_LARGEST]),
        "largest_groups_of_duplicates": list(report.families),
        "examples_of_dropped": {reason: list(found) for reason, found in sorted(report.examples.items())},
        "settings": manifest["settings"],
    }


def _ranked(counts: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _samples(folder: Path, manifest: Manifest) -> list[tuple[str, str]]:
    """Title and text of the first snippets of the training split."""
    shards = manifest.splits["train"].shards[:1]
    records = (record for shard in shards for record in read_shard(folder / shard.tar.name))
    return [(f"{record.repo}/{record.source}", join_lines(record.lines)) for record in islice(records, _SNIPPETS_SHOWN)]


def _page(content: Mapping[str, Any], samples: Sequence[tuple[str, str]]) -> str:
    seen, kept = content["files_seen"], content["files_kept"]
    dropped = _ranked(content["files_dropped"])
    body = [
        "<h1>Corpus report</h1>",
        _tiles(content),
        "<h2>Files</h2>",
        _bars({"kept": kept}, seen) + _bars(dropped, seen, lost=True),
        "<h2>Splits</h2>",
        _split_table(content["splits"]),
        f"<h2>Within kept files</h2>{_bars(_ranked(content['cut_dropped'] | content['scrubbed']), None, lost=True)}",
        f"<h2>Languages</h2>{_bars(content['languages'], kept)}",
        f"<h2>Licences</h2>{_bars(content['licences'], kept)}",
        f"<h2>Largest repositories, files</h2>{_bars(content['largest_repositories'], kept)}",
        "<h2>Largest groups of duplicates</h2>",
        "".join(map(_family, content["largest_groups_of_duplicates"])) or "<p>none</p>",
        "<h2>Examples of what was left out</h2>",
        *(_examples(reason, found, dropped[reason]) for reason, found in content["examples_of_dropped"].items()),
        "<h2>First snippets</h2>",
        *(f"<p><small>{escape(title)}</small></p><pre>{escape(text)}</pre>" for title, text in samples),
        f"<h2>Settings</h2><pre>{escape(json.dumps(content['settings'], indent=1, ensure_ascii=False))}</pre>",
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Corpus report</title>'
        f"<style>{_STYLE}</style></head><body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def _tiles(content: Mapping[str, Any]) -> str:
    splits = content["splits"].values()
    sums = {name: sum(split[name] for split in splits) for name in ("repos", "snippets", "lines", "native_comments")}
    tokens = [split["tokens"] for split in splits]
    figures = {
        f"of {content['files_seen']:,} files kept": f"{content['files_kept']:,}",
        "MB read": f"{content['bytes_seen'] / 1e6:,.1f}",
        "repositories": f"{sums['repos']:,}",
        "snippets": f"{sums['snippets']:,}",
        "lines of code": f"{sums['lines']:,}",
        "lines with a native comment": f"{sums['native_comments']:,}",
    }
    if None not in tokens:
        figures["tokens"] = f"{sum(tokens):,}"
    tiles = "".join(f'<div class="tile"><b>{value}</b>{escape(name)}</div>' for name, value in figures.items())
    return f'<div class="tiles">{tiles}</div>'


def _bars(counts: Mapping[str, int], whole: int | None, *, lost: bool = False) -> str:
    """A table of counts, each with a bar and, of a whole, its share."""
    if not counts:
        return "<p>none</p>"
    longest = whole or max(counts.values())
    rows = "".join(
        f'<tr><td>{escape(name).replace("_", " ")}</td><td class="number">{count:,}</td>'
        + (f'<td class="number">{count / whole:.1%}</td>' if whole else "")
        + f'<td class="bar"><div style="width:{100 * count / max(longest, 1):.2f}%"></div></td></tr>'
        for name, count in counts.items()
    )
    return f"<table{' class=lost' if lost else ''}>{rows}</table>"


def _split_table(splits: Mapping[str, Mapping[str, Any]]) -> str:
    names = list(next(iter(splits.values())))
    head = "".join(f'<th class="number">{name.replace("_", " ")}</th>' for name in names)
    rows = "".join(
        f"<tr><th>{escape(split)}</th>"
        + "".join(f'<td class="number">{"" if (v := figures[name]) is None else f"{v:,}"}</td>' for name in names)
        + "</tr>"
        for split, figures in splits.items()
    )
    return f"<table><tr><th></th>{head}</tr>{rows}</table>"


def _examples(reason: str, found: Sequence[Sequence[str]], total: int) -> str:
    return _details(f"{reason.replace('_', ' ')}: {len(found)} of {total:,}", found)


def _family(family: Mapping[str, Any]) -> str:
    title = f"{family['kept']}: {family['duplicates']:,} duplicates, {family['near_duplicates']:,} near duplicates"
    return _details(title, family["examples"])


def _details(title: str, found: Sequence[Sequence[str]]) -> str:
    rows = "".join(f"<tr><td>{escape(path)}</td><td>{escape(detail)}</td></tr>" for path, detail in found)
    return f"<details><summary>{escape(title)}</summary><table>{rows}</table></details>"
