"""Pages to browse an evaluation: scores and all tasks on one, every answer of a task with its verdict on its own.

A score hides why; the way to trust it, or not, is to read answers. What models wrote is shown as text and never as
part of the page: everything is escaped, and a policy in the page lets only its own script run.
"""

from __future__ import annotations

import collections
import html
import keyword
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_ra3 import durable
from megatron_ra3.evaluate.compare import ModelRecords
from megatron_ra3.evaluate.page_style import CSS, POLICY, SCRIPT
from megatron_ra3.evaluate.prompts import Prompt, cut, extract_program
from megatron_ra3.evaluate.records import Key
from megatron_ra3.evaluate.suites import Suite
from megatron_ra3.evaluate.tasks import AssertTask, PlusTask, Task

_WORDS = re.compile(
    r"(?P<r>(?m:^[ \t]*\#[^\n]*))|(?P<c>\#[^\n]*)"
    r"|(?P<s>'''[\s\S]*?(?:'''|\Z)|\"\"\"[\s\S]*?(?:\"\"\"|\Z)|'(?:\\.|[^'\\\n])*'?|\"(?:\\.|[^\"\\\n])*\"?)"
    rf"|\b(?P<k>{'|'.join(keyword.kwlist)})\b|\b(?P<n>\d[\w.]*)"
)
_SHOWN_TESTS = 12
_OUTCOMES = ("pass", "fail", "infrastructure")


def write_pages(
    folder: Path,
    suites: Mapping[str, Suite],
    records: Mapping[str, Mapping[str, ModelRecords]],
    result: Mapping[str, Any],
) -> None:
    """Write `index.html` and one page per task below `folder`; `records` are by suite and model."""
    folder.mkdir(parents=True, exist_ok=True)
    sections = []
    for name, suite in suites.items():
        (folder / name).mkdir(exist_ok=True)
        sections.append(_scores(name, suite, result["suites"][name]) + _tasks(name, suite, records[name]))
        ids = [task.task_id for task in suite.tasks]
        by_task = {model: _by_task(found) for model, found in records[name].items()}
        for place, (task, prompt) in enumerate(zip(suite.tasks, suite.prompts, strict=True)):
            around = (ids[place - 1] if place else None, ids[place + 1] if place + 1 < len(ids) else None)
            own = {model: found[task.task_id] for model, found in by_task.items() if task.task_id in found}
            _write(folder / name / file_name(task.task_id), task_page(name, task, prompt, own, around))
    shown = (("all", "all tasks"), ("solved", "all pass"), ("split", "some pass"), ("unsolved", "none pass"))
    filters = _filters(*shown)
    _write(folder / "index.html", _page("Evaluation", f"<h1>Evaluation</h1>{filters}", "".join(sections)))


def _by_task(records: ModelRecords) -> dict[str, ModelRecords]:
    """The same, task by task."""
    found: dict[str, tuple[dict[Key, Any], dict[Key, Any]]] = {}
    for key, completion in records.completions.items():
        found.setdefault(key[0], ({}, {}))[0][key] = completion
    for key, verdict in records.verdicts.items():
        found.setdefault(key[0], ({}, {}))[1][key] = verdict
    return {task_id: ModelRecords(*parts) for task_id, parts in found.items()}


def file_name(task_id: str) -> str:
    """Of a task's page; different for different ids."""
    return re.sub(r"[^A-Za-z0-9-]", lambda match: "_" if match[0] == "/" else f"_{ord(match[0]):x}_", task_id) + ".html"


def task_page(
    suite: str, task: Task, prompt: Prompt, records: Mapping[str, ModelRecords], around: tuple[str | None, str | None]
) -> str:
    """All answers to one task, a column per model; `records` are this task's, `around` the ids before and after it."""
    links = [
        f'<a id="{name}" href="{file_name(task_id)}">{html.escape(arrow)}</a>' if task_id else ""
        for name, arrow, task_id in zip(("previous", "next"), ("<- before", "next ->"), around, strict=True)
    ]
    bar = (
        f'<h1>{html.escape(task.task_id)}</h1><a href="../index.html">{html.escape(suite)}</a>{"".join(links)}'
        + _filters(("all", "all answers"), ("pass", "pass"), ("fail", "fail"), ("infrastructure", "infrastructure"))
    )
    columns = "".join(_column(name, prompt, found) for name, found in records.items())
    body = f'{_folded("prompt", prompt.text, is_open=True)}{_about(task)}<div class="models">{columns}</div>'
    return _page(task.task_id, bar, body)


def _about(task: Task) -> str:
    """The reference and the tests, folded."""
    if isinstance(task, AssertTask):
        tests = "\n".join((task.setup.removeprefix(task.reference), *task.tests)).strip()
        return _folded("reference", task.reference) + _folded("tests", tests)
    if isinstance(task, PlusTask):
        shown = [f"{task.entry_point}(*{_short(arguments)})" for arguments in task.base_inputs[:_SHOWN_TESTS]]
        title = f"inputs: {len(task.base_inputs)} base, {len(task.plus_inputs)} extra"
        return _folded("reference", task.reference) + _folded(title, "\n".join(shown))
    shown = [f"# input\n{_short(test.input)}\n# output\n{_short(test.output)}" for test in task.tests[:_SHOWN_TESTS]]
    return _folded(f"{len(task.tests)} tests", "\n".join(shown))


def _short(value: object) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 400 else f"{text[:400]} ..."


def _column(name: str, prompt: Prompt, records: ModelRecords) -> str:
    keys = sorted(records.completions, key=lambda key: key[1])
    counts = collections.Counter(records.verdicts[key]["outcome"] for key in keys if key in records.verdicts)
    said = ", ".join(f"{counts[outcome]} {outcome}" for outcome in _OUTCOMES if counts[outcome])
    cards = "".join(_card(key, prompt, records.completions[key], records.verdicts.get(key)) for key in keys)
    return f'<section><h2>{html.escape(name)} <span class="soft">{said}</span></h2>{cards}</section>'


def _card(key: Key, prompt: Prompt, completion: Mapping[str, Any], verdict: Mapping[str, Any] | None) -> str:
    verdict = verdict or {"outcome": "infrastructure", "reason": "not judged", "detail": "", "tests_passed": 0}
    kind = html.escape(verdict["outcome"])
    facts = [verdict["reason"], f"{completion['tokens']} tokens, ended by {completion['finish']}"]
    if verdict.get("lines"):
        facts.append(f"rationales above {verdict['rationales']} of {verdict['lines']} lines")
    if "base_passed" in verdict and kind == "fail":
        facts.append("base inputs passed" if verdict["base_passed"] else "base inputs failed")
    line = html.escape("; ".join(fact for fact in facts if fact))
    detail = f'<p class="detail soft">{html.escape(verdict["detail"])}</p>' if verdict["detail"] else ""
    kept = cut(prompt, completion["text"])
    program = extract_program(prompt, completion["text"])
    shown = program[len(prompt.head) :] if program is not None else kept
    rest = completion["text"] if prompt.fenced else completion["text"][len(kept) :]
    title = "whole answer" if prompt.fenced else "after the stop"
    return (
        f'<article class="sample" data-kind="{kind}"><p><span class="chip {kind}">{kind}</span> '
        f'<span class="soft">#{key[1]} {line}</span></p>{detail}<pre>{highlighted(shown.rstrip())}</pre>'
        f"{_folded(title, rest) if rest.strip() else ''}</article>"
    )


def highlighted(code: str) -> str:
    """Escaped code with marks on rationales (`r`: on lines of their own), comments, text, keywords, numbers."""
    parts, end = [], 0
    for match in _WORDS.finditer(code):
        parts.append(html.escape(code[end : match.start()]))
        parts.append(f'<span class="{match.lastgroup}">{html.escape(match[0])}</span>')
        end = match.end()
    return "".join(parts) + html.escape(code[end:])


def _folded(title: str, code: str, *, is_open: bool = False) -> str:
    return (
        f"<details{' open' if is_open else ''}><summary>{html.escape(title)}</summary>"
        f"<pre>{highlighted(code)}</pre></details>"
    )


def _scores(name: str, suite: Suite, found: Mapping[str, Any]) -> str:
    """A suite's scores and differences."""
    rows = [
        f'<tr><td>{html.escape(model)}</td><td class="left">{html.escape(metric)}</td>{_cells(score)}'
        f"<td>{item['infrastructure_errors']}</td><td>{item['rationales_per_line']:.2f}</td>"
        f"<td>{item['tokens_per_answer']:.0f}</td></tr>"
        for model, item in found["models"].items()
        for metric, score in item["scores"].items()
    ]
    heads = ("model", "metric", "%", "95 % interval", "tasks", "masked", "rationales per line", "tokens per answer")
    text = f"{suite.title}, {len(suite.tasks)} tasks, sha256 {suite.sha256[:12]}"
    if suite.leaked:
        text += f"; {suite.leaked} of them were trained on"
    missing = [
        f"{item['missing_samples']} of {model}" for model, item in found["models"].items() if item["missing_samples"]
    ]
    if missing:
        text += f"; missing samples: {', '.join(missing)}"
    table = f'<h2>{html.escape(name)} <span class="soft">{html.escape(text)}</span></h2>{_table(heads, rows)}'
    pairs = [
        f"<tr><td>{html.escape(pair['second'])} - {html.escape(pair['first'])}</td>"
        f'<td class="left">{html.escape(pair["metric"])}</td>{_gap(pair)}</tr>'
        for pair in found["pairs"]
        if "difference" in pair
    ]
    heads = ("difference", "metric", "points", "95 % interval", "tasks", "p, bootstrap", "solved by one", "p, McNemar")
    return table + (_table(heads, pairs) if pairs else "")


def _cells(score: Mapping[str, Any] | None) -> str:
    if score is None:
        return "<td>-</td><td></td><td>0</td>"
    low, high = 100 * score["low"], 100 * score["high"]
    return f"<td>{100 * score['value']:.1f}</td><td>{low:.1f} to {high:.1f}</td><td>{score['tasks']}</td>"


def _gap(pair: Mapping[str, Any]) -> str:
    gap, test = pair["difference"], pair.get("mcnemar")
    exact = "<td></td><td></td>"
    if test:
        exact = f"<td>{test['only_second']} : {test['only_first']}</td><td>{test['p']:.3f}</td>"
    return (
        f"<td>{100 * gap['value']:+.1f}</td><td>{100 * gap['low']:+.1f} to {100 * gap['high']:+.1f}</td>"
        f"<td>{pair['tasks']}</td><td>{pair['p_bootstrap']:.3f}</td>{exact}"
    )


def _tasks(name: str, suite: Suite, records: Mapping[str, ModelRecords]) -> str:
    """A row per task: how many answers of each model passed."""
    passed: collections.Counter[tuple[str, str]] = collections.Counter()
    judged: collections.Counter[tuple[str, str]] = collections.Counter()
    for model, found in records.items():
        for (task_id, _), verdict in found.verdicts.items():
            judged[model, task_id] += verdict["outcome"] != "infrastructure"
            passed[model, task_id] += verdict["outcome"] == "pass"
    rows = []
    for task in suite.tasks:
        counts = [(passed[model, task.task_id], judged[model, task.task_id]) for model in records]
        kinds = {"pass" if right == tried else "fail" if not right else "mixed" for right, tried in counts if tried}
        kind = {frozenset({"pass"}): "solved", frozenset({"fail"}): "unsolved"}.get(frozenset(kinds), "split")
        cells = "".join(f'<td><span class="chip {_kind(*count)}">{count[0]}/{count[1]}</span></td>' for count in counts)
        link = f'<a href="{html.escape(name)}/{file_name(task.task_id)}">{html.escape(task.task_id)}</a>'
        rows.append(f'<tr data-kind="{kind}"><td>{link}</td>{cells}</tr>')
    return f"<details open><summary>{len(suite.tasks)} tasks</summary>{_table(('task', *records), rows)}</details>"


def _kind(right: int, tried: int) -> str:
    if not tried:
        return "infrastructure"
    return "pass" if right == tried else "mixed" if right else "fail"


def _table(heads: Sequence[str], rows: Sequence[str]) -> str:
    cells = "".join(f"<th>{html.escape(head)}</th>" for head in heads)
    return f'<div class="scroll"><table><thead><tr>{cells}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _filters(*choices: tuple[str, str]) -> str:
    buttons = [
        f'<button data-show="{kind}" aria-pressed="{"true" if kind == "all" else "false"}">{html.escape(text)}</button>'
        for kind, text in choices
    ]
    return f"<span>{' '.join(buttons)}</span>"


def _page(title: str, bar: str, body: str) -> str:
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{CSS}</style></head>"
        f"<body><header>{bar}</header><main>{body}</main><script>{SCRIPT}</script></body></html>\n"
    )


def _write(path: Path, text: str) -> None:
    durable.write(path, text.encode("utf-8", "backslashreplace"))
