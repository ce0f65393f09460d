"""Replaces e-mail addresses and secrets in source code by placeholders, and counts them.

A model repeats what it has read; an access key that works, or a person's address, must not be in the corpus. The
patterns of secrets are those of detect-secrets' specific detectors. Its entropy and keyword detectors are not used:
they call every checksum, test vector and default password a secret.
"""

import importlib
import re
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache
from typing import NamedTuple

EMAIL = "email@example.com"


class _Kind(NamedTuple):
    """A kind of secret: the detector (module, class) of detect-secrets, and substrings one of which each secret needs.

    The substrings are looked for first: they cost a thousandth of the patterns. `whole` is set where the detector
    yields only a part of what its pattern matches ("ghp" of a GitHub token).
    """

    name: str
    module: str
    detector: str
    needs: tuple[str, ...]
    whole: bool = False


_GITLAB = (
    *("glpat-", "gldt-", "glft-", "glsoat-", "glrt-", "glcbt-", "glimt-", "glptt-", "glagent-", "gloas-"),
    "GR1348941",
)
# Left out: Artifactory, Cloudant, Discord, IBM and SoftLayer, whose patterns fit names of variables and plain hashes.
_KINDS = (
    _Kind("aws_key", "aws", "AWSKeyDetector", ("AKIA", "ASIA", "ABIA", "ACCA", "A3T", "aws", "AWS", "Aws")),
    _Kind("azure_key", "azure_storage_key", "AzureStorageKeyDetector", ("AccountKey=",)),
    _Kind("github_token", "github_token", "GitHubTokenDetector", ("ghp_", "gho_", "ghu_", "ghs_", "ghr_"), True),
    _Kind("gitlab_token", "gitlab_token", "GitLabTokenDetector", _GITLAB, True),
    _Kind("json_web_token", "jwt", "JwtTokenDetector", ("eyJ",)),
    _Kind("mailchimp_key", "mailchimp", "MailchimpDetector", ("-us",)),
    _Kind("openai_key", "openai", "OpenAIDetector", ("T3BlbkFJ",)),
    _Kind("pypi_token", "pypi_token", "PypiTokenDetector", ("pypi-Ag",)),
    _Kind("sendgrid_key", "sendgrid", "SendGridDetector", ("SG.",)),
    _Kind("slack_token", "slack", "SlackDetector", ("xox", "XOX", "hooks.slack.com")),
    _Kind("square_secret", "square_oauth", "SquareOAuthDetector", ("sq0csp-",)),
    _Kind("stripe_key", "stripe", "StripeDetector", ("k_live_",)),
    _Kind("telegram_token", "telegram_token", "TelegramBotTokenDetector", (":AA",)),
    _Kind("twilio_key", "twilio", "TwilioKeyDetector", ("AC", "SK")),
)
# What detect-secrets 1.5 does not know yet, and npm's tokens, which it takes to reach to the end of the row.
_OWN_PATTERNS = {
    "anthropic_key": ("sk-ant-", re.compile(r"\bsk-ant-[\w-]{32,}")),
    "github_token": ("github_pat_", re.compile(r"\bgithub_pat_\w{36,}")),
    "google_key": ("AIza", re.compile(r"\bAIza[\w-]{35}(?![\w-])")),
    "huggingface_token": ("hf_", re.compile(r"\bhf_[A-Za-z]{34}(?!\w)")),
    "npm_token": (":_authToken=", re.compile(r"(?<=:_authToken=)(?:npm_\w+|[A-Fa-f0-9-]{36})")),
}

_WORD_START = r"(?:(?<![A-Za-z0-9])|(?<=\\[nrt]))"
_KEY_BLOCK = re.compile(r"(-----BEGIN ([A-Z0-9 ]*)PRIVATE KEY(?: BLOCK)?-----)(.{32,20000}?)(?=-----END \2)", re.DOTALL)
# An escape such as \n is no part of the base64 text that follows it.
_KEY_TEXT = re.compile(r"(\\[A-Za-z])|[A-Za-z0-9+/]{12,}={0,2}")
_PASSWORD_IN_URL = re.compile(
    r"(?<=://)([^:/?#\[\]@!$&'()*+,;=\s\"<>]+):([^:/?#\[\]@!$&'()*+,;=\s\"<>\\{}%]+)(?=@[\w.])"
)
_SHOWN_IN_DOCUMENTS = frozenset({"pass", "passwd", "password", "pw", "pwd", "secret", "token", "xxx", "xxxx"})

_AFTER_AT = re.compile(r"@((?:[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?\.)+)([A-Za-z]{2,18})(?![\w(\[@:/-]|\.\w)")
_BEFORE_AT = re.compile(r"(\\?)([A-Za-z0-9](?:[\w.%+-]*[A-Za-z0-9_])?)\Z", re.ASCII)
_ESCAPE = re.compile(r"[abfnrtv]|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|[0-7]{1,3}")
_LONGEST_LOCAL_PART = 64
# `a@b.mean` multiplies matrices: only what ends in one of these is taken for an address.
_DOMAINS = frozenset(
    """ai app at au be biz br ca ch cn co com cz de dev dk edu email es eu fi fr gov hk hu ie il in info int io it jp kr
    me mil mx name net nl no nz org pl pro pt ru se sg tr tw ua uk us za""".split()  # noqa: SIM905 - a table
)
_RESERVED = re.compile(r"(?:\A|\.)(?:example\.(?:com|net|org|edu)|localhost\.localdomain)\Z", re.IGNORECASE)


def scrub(text: str) -> tuple[str, Counter[str]]:
    """Replaces secrets and e-mail addresses in source code; counts them by kind ("email", "aws_key", ...).

    A secret becomes its kind in capitals and underscores, which is harmless wherever it stood: Python stays valid, and
    rows keep their number. Of a private key only the base64 text is replaced. Addresses in the domains reserved for
    documentation stay, and so do passwords in URLs that are placeholders already. Scrubbing twice changes nothing more.
    """
    counts: Counter[str] = Counter()
    if "PRIVATE KEY" in text:
        text = _KEY_BLOCK.sub(lambda match: _without_key(match, counts), text)
    for kind in _KINDS:
        if any(part in text for part in kind.needs):
            text = _replace_detected(text, kind, counts)
    for name, (part, pattern) in _OWN_PATTERNS.items():
        if part in text:
            text, count = pattern.subn(name.upper(), text)
            counts[name] += count
    if "@" in text:
        if "://" in text:
            text = _PASSWORD_IN_URL.sub(lambda match: _without_password(match, counts), text)
        text = _without_emails(text, counts)
    return text, +counts


def _replace_detected(text: str, kind: _Kind, counts: Counter[str]) -> str:
    rows = text.split("\n")
    find = _finder(kind)
    for number, row in enumerate(rows):
        if any(part in row for part in kind.needs):
            for secret in sorted(set(find(row)), key=lambda secret: (-len(secret), secret)):
                # What begins inside a word is chance, as in strings of DNA; what continues a secret belongs to it, for
                # some tokens have grown since their pattern was written.
                pattern = rf"{_WORD_START}{re.escape(secret)}[\w-]*"
                rows[number], count = re.subn(pattern, kind.name.upper(), rows[number], flags=re.ASCII)
                counts[kind.name] += count
    return "\n".join(rows)


@cache
def _finder(kind: _Kind) -> Callable[[str], Iterable[str]]:
    """The function that yields the secrets of a kind in a row."""
    detector = getattr(importlib.import_module(f"detect_secrets.plugins.{kind.module}"), kind.detector)()
    if kind.whole:
        return lambda row: (match[0] for pattern in detector.denylist for match in pattern.finditer(row))
    return detector.analyze_string


def _without_key(match: re.Match[str], counts: Counter[str]) -> str:
    body, replaced = _KEY_TEXT.subn(lambda text: text[1] or "PRIVATE_KEY", match[3])
    counts["private_key"] += bool(replaced) and body != match[3]
    return match[1] + body


def _without_password(match: re.Match[str], counts: Counter[str]) -> str:
    if match[2].lower() in _SHOWN_IN_DOCUMENTS or match[2].lower() == match[1].lower():
        return match[0]
    counts["url_password"] += 1
    return f"{match[1]}:password"


def _without_emails(text: str, counts: Counter[str]) -> str:
    parts = []
    done = 0
    for match in _AFTER_AT.finditer(text):
        before = text[max(done, match.start() - _LONGEST_LOCAL_PART) : match.start()]
        local = _local_part(before)
        if local and _is_personal(before.removesuffix(local), local, match):
            parts += [text[done : match.start() - len(local)], EMAIL]
            done = match.end()
            counts["email"] += 1
    return "".join([*parts, text[done:]])


def _local_part(before: str) -> str:
    """The local part of an address at the end of `before`, or ''; a string's escape before it is no part of it."""
    found = _BEFORE_AT.search(before)
    if found is None:
        return ""
    if not found[1]:
        return found[2]
    escape = _ESCAPE.match(found[2])
    return found[2][escape.end() :] if escape else ""


def _is_personal(before: str, local: str, domain: re.Match[str]) -> bool:
    """Whether `local`@`domain` is an address, not a URL's user, a matrix product or an example."""
    in_url = "://" in before and not re.search(r"[\s\"'<>]", before[before.rindex("://") :])
    known = domain[2].lower() in _DOMAINS
    return known and not in_url and local != "git" and not _RESERVED.search(domain[1] + domain[2])
