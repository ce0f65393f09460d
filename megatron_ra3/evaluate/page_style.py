"""The look of an evaluation's pages, written into each of them: a page must open anywhere, alone, years from now."""

import base64
import hashlib

CSS = """
:root { color-scheme: light dark; --ink: #1d2330; --soft: #667085; --paper: #fbfbf9; --card: #fff; --line: #e3e4e0;
  --good: #11734b; --good-bg: #e2f4ea; --bad: #a8321f; --bad-bg: #fbe7e2; --odd: #80600c; --odd-bg: #fbf1d3;
  --thought: #6a4bb0; --thought-bg: #f1ecfb; --key: #0b5cad; --text: #2d7a3a; --number: #9a4f00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e6ea; --soft: #98a1b0; --paper: #14171c; --card: #1b1f26;
  --line: #2d333d; --good: #6fd6a3; --good-bg: #17352a; --bad: #f29684; --bad-bg: #3d211c; --odd: #e3c46b;
  --odd-bg: #373019; --thought: #bda7f2; --thought-bg: #292340; --key: #7db7f0; --text: #8fce98; --number: #e6a868; } }
* { box-sizing: border-box; }
body { margin: 0; font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); }
header { position: sticky; top: 0; z-index: 2; display: flex; flex-wrap: wrap; gap: .4rem 1rem; align-items: baseline;
  padding: .6rem 1.2rem; background: var(--card); border-bottom: 1px solid var(--line); }
header h1 { margin: 0; font-size: 1.05rem; }
main { padding: 1rem 1.2rem 4rem; max-width: 110rem; margin: 0 auto; }
h2 { font-size: 1.05rem; margin: 1.8rem 0 .5rem; }
a { color: var(--key); text-decoration: none; } a:hover { text-decoration: underline; }
.soft { color: var(--soft); font-size: .87rem; }
button { font: inherit; font-size: .87rem; padding: .1rem .7rem; border: 1px solid var(--line); border-radius: 1rem;
  background: none; color: inherit; cursor: pointer; } button[aria-pressed=true] { background: var(--ink);
  color: var(--paper); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid var(--line); font-weight: normal; }
th { color: var(--soft); font-size: .87rem; } th:first-child, td:first-child, .left { text-align: left; }
tbody tr:hover { background: var(--card); }
.scroll { overflow-x: auto; margin: 0 0 1rem; }
.chip { display: inline-block; min-width: 3.6rem; padding: 0 .55rem; border-radius: 1rem; font-size: .85rem;
  text-align: center; }
.pass { color: var(--good); background: var(--good-bg); } .fail { color: var(--bad); background: var(--bad-bg); }
.infrastructure, .mixed { color: var(--odd); background: var(--odd-bg); }
.models { display: grid; grid-auto-flow: column; grid-auto-columns: minmax(24rem, 1fr); gap: 1rem; overflow-x: auto; }
.sample { margin: 0 0 1rem; border: 1px solid var(--line); border-radius: .5rem; background: var(--card); }
.sample > p { margin: 0; padding: .4rem .8rem; border-bottom: 1px solid var(--line); }
.sample > p.detail { overflow-wrap: anywhere; }
pre { margin: 0; padding: .6rem .8rem; overflow-x: auto; font: 13px/1.5 ui-monospace, monospace; tab-size: 4; }
details { margin: .5rem 0; border: 1px solid var(--line); border-radius: .5rem; background: var(--card); }
summary { padding: .35rem .8rem; cursor: pointer; color: var(--soft); font-size: .87rem; }
.sample details { margin: 0; border: 0; border-top: 1px solid var(--line); border-radius: 0; }
.r { color: var(--thought); background: var(--thought-bg); border-radius: .2rem; } .c { color: var(--soft); }
.s { color: var(--text); } .k { color: var(--key); } .n { color: var(--number); }
.hidden { display: none; }
"""
SCRIPT = """
const buttons = document.querySelectorAll("button[data-show]");
for (const button of buttons) button.addEventListener("click", () => {
  for (const other of buttons) other.setAttribute("aria-pressed", other === button);
  for (const item of document.querySelectorAll("[data-kind]")) {
    const wanted = button.dataset.show;
    item.classList.toggle("hidden", wanted !== "all" && !item.dataset.kind.split(" ").includes(wanted));
  }
});
document.addEventListener("keydown", event => {
  const names = {ArrowLeft: "previous", ArrowRight: "next"};
  const link = names[event.key] && document.getElementById(names[event.key]);
  if (link && !event.altKey && !event.ctrlKey && !event.metaKey) location.href = link.href;
});
"""


def _source(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


POLICY = f"default-src 'none'; style-src {_source(CSS)}; script-src {_source(SCRIPT)}; base-uri 'none'"
"""Lets a browser run this script and nothing else, whatever a model wrote."""
