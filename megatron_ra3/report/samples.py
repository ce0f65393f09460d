"""Annotated snippets for people: text next to the decisions behind it, one JSON object per line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from megatron_ra3.latents import Kind, Trajectory
from megatron_ra3.report.metrics import cut_back, durable_bytes


class Decoder(Protocol):
    """The half of a tokenizer that this module needs."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids."""


class SampleLog:
    """Writer of `samples.jsonl`; processes with `writes=False` write nothing."""

    def __init__(self, folder: Path, tokenizer: Decoder, *, writes: bool) -> None:
        self._tokenizer = tokenizer
        self._writes = writes
        if writes:
            self._file = (folder / "samples.jsonl").open("a", encoding="utf-8")

    @property
    def offset(self) -> int:
        """Bytes written so far, durable once this returns."""
        return durable_bytes(self._file) if self._writes else 0

    def rewind(self, offset: int) -> None:
        """Cut the file back to `offset` bytes; ValueError: it holds fewer."""
        if self._writes:
            cut_back(self._file, offset)

    def write(self, step: int, trajectories: Sequence[Trajectory]) -> None:
        """Append trajectories as (text, rationales with their line and log-prob in nats)."""
        self.append(self._record(step, item) for item in trajectories)

    def append(self, records: Iterable[Mapping[str, object]]) -> None:
        """Append what is JSON already."""
        if self._writes:
            self._file.writelines(json.dumps(record) + "\n" for record in records)
            self._file.flush()

    def _record(self, step: int, item: Trajectory) -> dict[str, object]:
        code = [token for token, kind in zip(item.token_ids, item.kinds, strict=True) if kind != Kind.PROMPT]
        return {
            "step": step,
            "snippet_id": item.snippet_id,
            "text": self._tokenizer.decode(code),
            "rationales": [self._rationale(item, line) for line, thought in enumerate(item.thought) if thought],
        }

    def _rationale(self, item: Trajectory, line: int) -> dict[str, object]:
        at = [
            index
            for index, (kind, of_line) in enumerate(zip(item.kinds, item.line_index, strict=True))
            if kind == Kind.RATIONALE and of_line == line
        ]
        return {
            "line": line,
            "text": self._tokenizer.decode([item.token_ids[index] for index in at]),
            "logprob": sum(item.engine_logprobs[index] for index in at if item.sampled[index]),
            "well_formed": item.well_formed[line],
        }
