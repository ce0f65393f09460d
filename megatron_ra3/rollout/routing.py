"""Decides which engine a query goes to, and when it has to wait. Pure Python.

Queries of a group share a beginning that is in the prefix cache of the engine that answered one of them, its home, so
they go there; a group without a home goes where the fewest tokens are outstanding. An engine takes a bounded number of
queries, the rest wait here and not there: what waits here can still go elsewhere when an engine dies or falls behind.
Prevents both a prefix computed on every engine and a fast engine that idles while a slow one has all the work.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable

from megatron_ra3.observe.spans import TIMELINE

PATIENCE = 16
"""A query waits for its home while that has less to do, beyond what others have, than so many queries of its size."""
HOMES_KEPT = 65536


def is_far_behind(home_tokens: int, other_tokens: int, query_tokens: int, *, slots: int) -> bool:
    """Whether a home has so much more to do than another engine that a query of its groups should go there.

    Moving costs the other engine the whole prefix once more. Worth it where the home has twice as many tokens
    outstanding, and more by several times the query; fewer times where few queries run at once.
    """
    patience = min(PATIENCE, max(slots // 2, 1))
    return home_tokens - other_tokens >= max(patience * query_tokens, other_tokens)


class Router:
    """What is outstanding at each engine, in tokens and queries, and the homes of groups.

    `slots` queries may be open at one engine. `moves` counts groups that left a home which was far behind.
    """

    def __init__(self, slots: int) -> None:
        self.moves = 0
        self._slots = slots
        self._tokens: dict[str, int] = {}
        self._open: dict[str, int] = {}
        self._homes: dict[Hashable, str] = {}

    def serve(self, urls: Iterable[str]) -> None:
        """Route among `urls` from now on. What is open elsewhere no longer counts, its groups have no home."""
        urls = list(urls)
        if urls == list(self._tokens):
            return
        for url in set(self._tokens).difference(urls):
            TIMELINE.open_queries(url, 0)
        self._tokens = {url: self._tokens.get(url, 0) for url in urls}
        self._open = {url: self._open.get(url, 0) for url in urls}
        self._homes = {group: url for group, url in self._homes.items() if url in self._tokens}

    def has_room(self) -> bool:
        """Whether any engine takes one more query."""
        return any(number < self._slots for number in self._open.values())

    def choose(self, group: Hashable, tokens: int, avoid: Collection[str] = ()) -> str | None:
        """Where a query of so many tokens goes now; None: it waits. Engines in `avoid` only where there is no other."""
        allowed = [url for url in self._tokens if url not in avoid] or list(self._tokens)
        free = [url for url in allowed if self._open[url] < self._slots]
        if not free:
            return None
        least = min(free, key=self._tokens.__getitem__)
        home = self._homes.get(group)
        if home not in allowed:
            return least
        assert home is not None
        if is_far_behind(self._tokens[home], self._tokens[least], tokens, slots=self._slots):
            return least
        return home if home in free else None

    def sent(self, url: str, group: Hashable, tokens: int) -> None:
        """Note a query as open at `url`, which becomes the home of its group."""
        self._tokens[url] += tokens
        self._open[url] += 1
        TIMELINE.open_queries(url, self._open[url])
        self.moves += self._homes.get(group, url) != url
        self._homes[group] = url
        if len(self._homes) > HOMES_KEPT:
            del self._homes[next(iter(self._homes))]

    def done(self, url: str, tokens: int) -> None:
        """Note a query as no longer open at `url`, answered or not."""
        if url in self._tokens:
            self._tokens[url] -= tokens
            self._open[url] -= 1
            TIMELINE.open_queries(url, self._open[url])
