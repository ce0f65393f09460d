"""The one order in which training sees the corpus, and an exact place in it.

A cursor kept per rank goes wrong as soon as a job restarts on another number of ranks: samples are skipped or seen
twice. Here the order belongs to the corpus and the seed, the cursor counts the samples of all ranks together, and
a rank only chooses its share of the next step. Resuming is a seek.

What cannot be read is skipped in place, counted over all ranks and limited. The ranks agree on it in every step, so
that all of them end where one of them must.
"""

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ra3.config import StreamConfig
from megatron_ra3.corpus.order import EpochOrder
from megatron_ra3.corpus.prefetch import Prefetcher
from megatron_ra3.corpus.reader import SplitReader, load_manifest
from megatron_ra3.corpus.snippets import SnippetRecord

_SLICE_SAMPLES = 1024

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Cursor:
    """How many samples of the current epoch were delivered, over all ranks."""

    epoch: int = 0
    position: int = 0


@dataclass(frozen=True, slots=True)
class BadSample:
    """A sample that could not be delivered: how far into the step it stood, its shard, and what is wrong."""

    ahead: int
    place: str
    reason: str


@dataclass(frozen=True, slots=True)
class Report:
    """What one rank tells the others after its share of a step."""

    bad: tuple[BadSample, ...]
    waited_s: float


class ShardStream:
    """An endless stream over one split of a corpus; every epoch delivers each sample once, in a new order."""

    def __init__(
        self,
        folder: str | Path,
        split: str,
        seed: int,
        *,
        cursor: Cursor | None = None,
        verify: bool = False,
        config: StreamConfig | None = None,
    ) -> None:
        """Opens a corpus and checks that all its files are there in full size, as far as its storage tells cheaply.

        Args:
            folder: where `ra3 prepare` wrote the corpus; a path, URL or pipe as `corpus.folder`.
            split: "train" or "heldout".
            seed: with the epoch, decides the order. At least 0.
            cursor: where to start; the beginning if not given.
            verify: also compare each file's sha256, which reads the whole split; of a URL, the sizes.
            config: how to mix, to read and what to tolerate; see there.

        Raises:
            OSError, ValueError: the corpus is missing, empty or damaged; names the file and the fix.
        """
        if seed < 0:
            raise ValueError(f"seed must be at least 0, found {seed}")
        self._config = config = config or StreamConfig()
        manifest, self.manifest_sha256 = load_manifest(folder, config)
        self.token_form = manifest.token_form
        """How the token ids in the samples were made; None: they hold text alone."""
        if split not in manifest.splits:
            raise ValueError(f"corpus {folder} has no split {split!r}; it has {', '.join(manifest.splits)}")
        info = manifest.splits[split]
        if not info.snippets:
            raise ValueError(f"split {split!r} of {folder} is empty; prepare more files or change --heldout-fraction")
        self._reader = SplitReader(folder, info, verify_checksums=verify, config=config)
        for problem in self._reader.damage:
            log.warning("%s; samples of it that cannot be read will be skipped", problem)
        self._prefetcher = Prefetcher(
            self._reader.read_chunk,
            self._reader.place_of,
            threads=config.read_threads,
            capacity=2 * max(1, config.window_samples // config.chunk_samples),
            stall_s=config.stall_s,
        )
        self._shard_samples = [shard.samples for shard in info.shards]
        self._identity = {
            "split": split,
            "seed": seed,
            "shuffle_shards": config.shuffle_shards,
            "chunk_samples": config.chunk_samples,
            "window_samples": config.window_samples,
            "shards_sha256": hashlib.sha256("".join(shard.tar.sha256 for shard in info.shards).encode()).hexdigest(),
        }
        self._seed = seed
        self._orders: dict[int, EpochOrder] = {}
        self._requested = 0  # absolute position up to which chunks were asked for
        self._warmed = (0, 0)  # epoch, and how many of its shards in their order were announced to the storage
        self._shown: set[str] = set()  # shards whose first bad sample was logged
        self._waited_s = 0.0
        self.bad_samples = 0
        """Samples skipped so far because they could not be read, over all ranks."""
        self._cursor = Cursor()
        self._seek(cursor or Cursor())

    def __len__(self) -> int:
        """Samples in one epoch."""
        return len(self._reader)

    @property
    def cursor(self) -> Cursor:
        """The place of the next sample."""
        return self._cursor

    def take(
        self,
        num_samples: int,
        rank: int = 0,
        world_size: int = 1,
        *,
        reads: bool = True,
        gather: Callable[[Report], Sequence[Report]] = lambda report: [report],
    ) -> list[SnippetRecord]:
        """Delivers a rank's share of the next `num_samples` samples of all ranks: every `world_size`-th of them.

        All ranks must ask for the same `num_samples`; each then advances by it, also where its own share is smaller.

        Args:
            num_samples: of all ranks together.
            rank: of this reader.
            world_size: number of readers.
            reads: false for a process that gets its share from another one; it advances and delivers nothing.
            gather: a collective that returns the reports of all processes.

        Raises:
            ValueError: more than `max_bad_samples` samples could not be read, on all ranks alike.
        """
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, world_size), found rank={rank}, world_size={world_size}")
        if num_samples < 0:
            raise ValueError(f"num_samples must be at least 0, found {num_samples}")
        start = self._cursor.epoch * len(self) + self._cursor.position
        waited_s = self._prefetcher.waited_s
        share: list[SnippetRecord] = []
        bad: list[BadSample] = []
        for begin in range(0, num_samples if reads else 0, _SLICE_SAMPLES):
            places = range(begin + (rank - begin) % world_size, min(begin + _SLICE_SAMPLES, num_samples), world_size)
            self._read(start, places, share, bad)
        self._seek(Cursor(*divmod(start + num_samples, len(self))))
        report = Report(tuple(bad), self._prefetcher.waited_s - waited_s)
        self._settle(gather(report), shows=reads and rank == 0)
        return share

    def take_waited_s(self) -> float:
        """Seconds that steps have waited for their samples since the last call, each for its slowest rank."""
        waited_s, self._waited_s = self._waited_s, 0.0
        return waited_s

    def state_dict(self) -> dict[str, Any]:
        """The place in the stream, what was skipped, and what identifies the stream it is a place in."""
        return self._identity | asdict(self._cursor) | {"bad_samples": self.bad_samples}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a saved place.

        Raises:
            ValueError: the place belongs to another split, seed, corpus or way of mixing.
        """
        for key, value in self._identity.items():
            if state.get(key) != value:
                raise ValueError(
                    f"saved stream state has {key}={state.get(key)!r}, this stream {value!r}: the order would differ; "
                    "resume with the corpus, the seed and the settings the run started with"
                )
        self._seek(Cursor(state["epoch"], state["position"]))
        self.bad_samples = state["bad_samples"]

    def close(self) -> None:
        """Ends reads under way and removes temporary files."""
        self._prefetcher.close()
        self._reader.close()

    def _seek(self, cursor: Cursor) -> None:
        if cursor.epoch < 0 or not 0 <= cursor.position < len(self):
            raise ValueError(f"{cursor} is not in an epoch of {len(self)} samples")
        self._cursor = cursor

    def _read(self, start: int, places: range, share: list[SnippetRecord], bad: list[BadSample]) -> None:
        """Appends the samples at `places`, counted from the absolute position `start`, to `share` or to `bad`."""
        if not places:
            return
        samples = self._samples(start + places.start, start + places.stop)[:: places.step]
        chunks = self._reader.chunks_of(samples).tolist()
        self._announce(start + places.start + self._config.prefetch_samples)
        self._prefetcher.release(start + places.start)
        self._prefetcher.request(chunks, until=start + places.stop)
        self._read_ahead(start, places)
        for ahead, sample, chunk in zip(places, samples.tolist(), chunks, strict=True):
            try:
                share.append(self._prefetcher.get(chunk).record(sample))
            except (OSError, ValueError) as error:
                bad.append(BadSample(ahead, self._reader.place_of(chunk), str(error)))

    def _read_ahead(self, start: int, places: range) -> None:
        """Asks for the chunks of the samples after `places`, as if the steps to come were shared like this one."""
        begin, end = start + places.stop, start + places.stop + self._config.prefetch_samples
        if not begin <= self._requested <= end:  # a seek
            self._requested = begin
        begin = self._requested + (start + places.start - self._requested) % places.step
        if begin < end:
            samples = self._samples(begin, end)[:: places.step]
            self._prefetcher.request(self._reader.chunks_of(samples).tolist(), until=end)
            self._requested = end

    def _announce(self, absolute: int) -> None:
        """Tells the storage which shards come next, seen from where reading ahead has come to."""
        epoch, position = divmod(absolute, len(self))
        first, stop = self._order(epoch).shards_wanted(position)
        if self._warmed[0] == epoch:
            first = max(first, self._warmed[1])
        for number in range(first, stop):
            epochs, place = divmod(number, len(self._shard_samples))
            self._reader.warm(int(self._order(epoch + epochs).shards[place]))
        self._warmed = (epoch, stop)

    def _samples(self, start: int, stop: int) -> np.ndarray:
        """The samples at absolute positions, which go on from epoch to epoch."""
        parts = []
        while start < stop:
            epoch, position = divmod(start, len(self))
            end = min(stop - start + position, len(self))
            parts.append(self._order(epoch).samples(position, end))
            start += end - position
        return np.concatenate(parts)

    def _order(self, epoch: int) -> EpochOrder:
        if epoch not in self._orders:
            self._orders = {kept: order for kept, order in self._orders.items() if abs(kept - epoch) == 1}
            self._orders[epoch] = EpochOrder(self._shard_samples, self._seed, epoch, self._config)
        return self._orders[epoch]

    def _settle(self, reports: Sequence[Report], *, shows: bool) -> None:
        """Counts what all ranks report; ValueError, the same on every rank, when it is more than may be skipped."""
        self._waited_s += max(report.waited_s for report in reports)
        bad = sorted((item for report in reports for item in report.bad), key=lambda item: item.ahead)
        allowed = self._config.max_bad_samples
        left = max(0, allowed - self.bad_samples)
        self.bad_samples += len(bad)
        for item in bad[:left]:
            if item.place not in self._shown and shows:
                log.warning(
                    "skipped: %s; %d bad samples so far (corpus.max_bad_samples=%d); its shard's next are counted only",
                    item.reason, self.bad_samples, allowed,
                )  # fmt: skip
            self._shown.add(item.place)
        if len(bad) > left:
            raise ValueError(
                f"{bad[left].reason}; or let such samples be skipped: {self.bad_samples} could not be read so "
                f"far, corpus.max_bad_samples={allowed}"
            )
