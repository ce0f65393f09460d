"""What data sets, packages and files say about their licence, as identifiers that can be compared.

A corpus is only as usable as its strictest licence. "Apache 2.0", "apache-2.0", "['Apache-2.0']" and a classifier of a
package index are one licence; a filter that compared them as they stand would drop three of the four.
"""

import re

# SPDX identifiers, in lower case, of licences that allow use in closed work and ask for no more than attribution.
# After the Blue Oak Council's list (ratings model to bronze), public-domain dedications and the Python licences.
PERMISSIVE: frozenset[str] = frozenset(
    """0bsd afl-3.0 apache-1.1 apache-2.0 artistic-2.0 blueoak-1.0.0 bsd-2-clause bsd-2-clause-patent bsd-3-clause
    bsd-3-clause-clear bsd-3-clause-lbnl bsl-1.0 cc0-1.0 curl ecl-2.0 fsfap hpnd isc libpng-2.0 mit mit-0 mit-modern
    mit-cmu ms-pl mulanpsl-2.0 ncsa postgresql psf-2.0 python-2.0 python-2.0.1 unicode-dfs-2016 unicode-3.0 unlicense
    upl-1.0 w3c wtfpl x11 zlib zpl-2.1""".split()  # noqa: SIM905 - a table, not a literal list of forty rows
)

_ALIASES = {
    "apache": "apache-2.0",
    "apache-2": "apache-2.0",
    "apache-software": "apache-2.0",
    "asl-2.0": "apache-2.0",
    "bsd-2": "bsd-2-clause",
    "freebsd": "bsd-2-clause",
    "simplified-bsd": "bsd-2-clause",
    "bsd-3": "bsd-3-clause",
    "new-bsd": "bsd-3-clause",
    "modified-bsd": "bsd-3-clause",
    "boost-software-1.0": "bsl-1.0",
    "boost-1.0": "bsl-1.0",
    "cc0": "cc0-1.0",
    "cc0-1.0-universal": "cc0-1.0",
    "expat": "mit",
    "mit-x11": "mit",
    "isc-iscl": "isc",
    "iscl": "isc",
    "gpl-2.0-only": "gpl-2.0",
    "gpl-2": "gpl-2.0",
    "gplv2": "gpl-2.0",
    "gpl-3": "gpl-3.0",
    "gplv3": "gpl-3.0",
    "gnu-gpl-v2.0": "gpl-2.0",
    "gnu-general-public-v2-gplv2": "gpl-2.0",
    "gnu-general-public-v3-gplv3": "gpl-3.0",
    "gnu-general-public-v3.0": "gpl-3.0",
    "gnu-general-public-v2.0": "gpl-2.0",
    "gnu-lesser-general-public-v3-lgplv3": "lgpl-3.0",
    "gnu-affero-general-public-v3": "agpl-3.0",
    "lgplv3": "lgpl-3.0",
    "agplv3": "agpl-3.0",
    "mpl-2": "mpl-2.0",
    "mozilla-public-2.0-mpl-2.0": "mpl-2.0",
    "psf": "psf-2.0",
    "psfl": "psf-2.0",
    "python-software-foundation": "psf-2.0",
    "the-unlicense": "unlicense",
    "the-unlicense-unlicense": "unlicense",
    "public-domain": "public-domain",
    "zlib-libpng": "zlib",
}
_NOTHING_SAID = frozenset(
    {"", "none", "null", "nan", "unknown", "no-license", "noassertion", "other", "other-proprietary"}
)

# Separators that separate nothing: "Apache License, Version 2.0" and BSD's '"New" or "Revised"'.
_INSIDE_A_NAME = re.compile(r"""["']?new["']?\sor\s["']?revised["']? | ,(?=\s*version\b)""", re.IGNORECASE | re.VERBOSE)
_SEPARATORS = re.compile(r"[,;|\[\]'\"]|\s(?:and|or)\s", re.IGNORECASE)
_EXCEPTION = re.compile(r"\s+with\s+.*", re.IGNORECASE)
_FILLERS = re.compile(r"\b(?:the|licen[cs]es?|version|v(?=\.?\s?\d))\b\.?", re.IGNORECASE)
_SPDX_HEADER = re.compile(r"SPDX-License-Identifier:[ \t]*([^\n\r]+)")
_HEADER_CHARS = 4096
_HEADER_ROWS = 40


def normalise(declared: str) -> tuple[str, ...]:
    """The licences that `declared` names, as lower-case identifiers like SPDX's, sorted; () if it names none.

    Reads identifiers, common names, SPDX expressions, comma-separated and bracketed lists, and the classifiers of the
    Python Package Index. The alternatives of an expression ("MIT OR GPL-3.0") count as several licences; an exception
    ("WITH ...") is left out. A name that is not known comes back as written, in lower case and with hyphens: it is on
    no allow-list by accident.
    """
    names = (_identifier(part) for part in _SEPARATORS.split(_INSIDE_A_NAME.sub(" ", declared)))
    return tuple(sorted({name for name in names if name not in _NOTHING_SAID}))


def spdx_header(text: str) -> str:
    """The expression after `SPDX-License-Identifier:` in the first rows of a source file, or ''."""
    if "SPDX-License-Identifier:" not in text[:_HEADER_CHARS]:
        return ""
    rows = text[:_HEADER_CHARS].split("\n")[:_HEADER_ROWS]
    found = next((match for row in rows if (match := _SPDX_HEADER.search(row))), None)
    return found[1].strip(" \t*/-><\"'") if found else ""


def allowed(ids: tuple[str, ...], allow: frozenset[str], *, unknown: bool) -> bool:
    """Whether a file under the licences `ids` may be used: only if `allow` has all of them, for all may apply.

    The licences that a data set lists are those found anywhere in a repository; which of them covers a file is not
    said. `unknown` decides about files of which nothing is said.
    """
    return allow.issuperset(ids) if ids else unknown


def _identifier(name: str) -> str:
    name = _EXCEPTION.sub("", name.rpartition("::")[2]).lower()
    bare = re.sub(r"[^a-z0-9.+]+", "-", _FILLERS.sub(" ", name)).strip("-.")
    whole = re.sub(r"[^a-z0-9.+]+", "-", name).strip("-.")
    if whole in _NOTHING_SAID or whole in PERMISSIVE:
        return whole
    bare = bare.removesuffix("-only")
    return _ALIASES.get(bare, bare)
