"""Copies across parts that were prepared apart: kept once, counted, shown, whatever the number of workers."""

import json
import random

import numpy as np
import pytest

from megatron_ra3.cli import main
from megatron_ra3.corpus import pool
from megatron_ra3.corpus.manifest import Manifest
from megatron_ra3.corpus.merge import merge_corpora
from megatron_ra3.corpus.originals import Originals, find_originals, largest_families
from megatron_ra3.corpus.prepare import PrepareConfig, prepare
from megatron_ra3.corpus.shards import read_shard
from megatron_ra3.corpus.snippets import SnippetLimits
from megatron_ra3.corpus.verify import problems
from tests.corpora import split_of

REPOS = [f"p{number:02}" for number in range(60)]
TRAIN = [repo for repo in REPOS if split_of(repo, 0.3) == "train"]
HELDOUT = [repo for repo in REPOS if split_of(repo, 0.3) == "heldout"]


def text(seed, *, changed=()):
    rng = random.Random(seed)
    lines = [f"v{rng.randrange(10**6)} = call_{rng.randrange(10**6)}(a, {rng.randrange(10**6)})" for _ in range(60)]
    for line in changed:
        lines[line] = f"other_{line} = {line}"
    return "\n".join(lines) + "\n"


def make_part(folder, files, **settings):
    for repo, content in files.items():
        (folder / "src" / repo).mkdir(parents=True)
        (folder / "src" / repo / "m.py").write_text(content)
    out = folder / "corpus"
    prepare(
        PrepareConfig(
            **{
                "sources": (str(folder / "src"),), "out": str(out), "heldout_fraction": 0.3, "samples_per_shard": 5,
                "limits": SnippetLimits(8, 2048, 3), "workers": 1,
            } | settings
        )
    )  # fmt: skip
    return out


def repos_of(corpus, split):
    shards = Manifest.load(corpus).splits[split].shards
    return list(dict.fromkeys(record.repo for shard in shards for record in read_shard(corpus / shard.tar.name)))


@pytest.fixture
def parts(tmp_path):
    """Two parts that share one text; two more are near copies, one of them held back in the first part."""
    first = {TRAIN[0]: text(0), TRAIN[1]: text(1), TRAIN[2]: text(2), HELDOUT[0]: text(3), HELDOUT[1]: text(4)}
    second = {
        TRAIN[10]: text(1),
        TRAIN[11]: text(2, changed=[5]),
        TRAIN[12]: text(3, changed=[50]),
        TRAIN[13]: text(13),
        HELDOUT[10]: text(0, changed=[50]),
    }
    return [make_part(tmp_path / name, files) for name, files in (("one", first), ("two", second))]


def test_copies_across_parts_are_kept_once_and_training_comes_first(parts, tmp_path, capsys):
    out = tmp_path / "merged"
    assert main(["corpus", "merge", *map(str, parts), "--out", str(out), "--samples-per-shard", "9"]) == 0
    assert "across   2 parts 1 duplicates and 3 near duplicates (similarity 0.7) dropped" in capsys.readouterr().out
    assert repos_of(out, "train") == [TRAIN[0], TRAIN[1], TRAIN[2], TRAIN[12], TRAIN[13]]
    assert repos_of(out, "heldout") == [HELDOUT[1]]
    manifest = Manifest.load(out)
    assert manifest.files_dropped == {"duplicate": 1, "near_duplicate": 3}
    assert manifest.files_seen == 10 == 4 + sum(split.files for split in manifest.splits.values())
    assert list(problems(out)) == []
    groups = json.loads((out / "report.json").read_text())["largest_groups_of_duplicates"]
    one, two = parts
    assert [(group["kept"], *group["examples"], group["duplicates"], group["near_duplicates"]) for group in groups] == [
        (f"{TRAIN[0]}/m.py in {one}", [f"{HELDOUT[10]}/m.py in {two}", "near duplicate"], 0, 1),
        (f"{TRAIN[1]}/m.py in {one}", [f"{TRAIN[10]}/m.py in {two}", "duplicate"], 1, 0),
        (f"{TRAIN[2]}/m.py in {one}", [f"{TRAIN[11]}/m.py in {two}", "near duplicate"], 0, 1),
        (f"{TRAIN[12]}/m.py in {two}", [f"{HELDOUT[0]}/m.py in {one}", "near duplicate"], 0, 1),
    ]
    assert f"<summary>{TRAIN[1]}/m.py in {one}: 1 duplicates, 0 near" in (out / "report.html").read_text()


def test_any_number_of_workers_merges_the_same(parts, tmp_path, monkeypatch):
    outs = [tmp_path / name for name in ("a", "b")]
    for out, workers in zip(outs, (1, 2), strict=True):
        merge_corpora(parts, out, 9, workers=workers)
    names = {path.name for path in outs[0].iterdir()}
    assert names == {path.name for path in outs[1].iterdir()}
    assert all((outs[0] / name).read_bytes() == (outs[1] / name).read_bytes() for name in names)
    monkeypatch.setattr(pool, "_WORTH_PROCESSES_BYTES", 0)
    assert pool.num_workers(0, 1) >= 1
    assert (pool.num_workers(3, 0), pool.num_workers(1, 10**9)) == (3, 1)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"without": ("near_duplicates",)}, "two/corpus prepared without looking for them"),
        ({"similarity": 0.9}, "prepared with --similarity 0.7 ("),
    ],
)
def test_parts_that_do_not_say_how_keep_near_duplicates_and_it_is_said(tmp_path, capsys, settings, reason):
    parts = [
        make_part(tmp_path / "one", {TRAIN[0]: text(0)}),
        make_part(tmp_path / "two", {TRAIN[1]: text(0, changed=[9, 20, 40, 50]), TRAIN[2]: text(0)}, **settings),
    ]
    command = ["corpus", "merge", *map(str, parts), "--out"]
    assert main([*command, str(tmp_path / "kept")]) == 0
    shown = capsys.readouterr().out
    assert "1 duplicates; near duplicates were not looked for: " in shown
    assert reason in shown
    assert len(repos_of(tmp_path / "kept", "train")) == 2
    assert main([*command, str(tmp_path / "dropped"), "--similarity", "0.7"]) == 0
    assert repos_of(tmp_path / "dropped", "train") == [TRAIN[0]]


def test_a_merged_corpus_can_be_merged_again(parts, tmp_path):
    merged = merge_corpora(parts, tmp_path / "merged", 9)
    third = make_part(tmp_path / "three", {TRAIN[20]: text(13, changed=[1]), TRAIN[21]: text(21)})
    again = merge_corpora([tmp_path / "merged", third], tmp_path / "again", 9)
    assert (merged.similarity, again.similarity, again.duplicates, again.near_duplicates) == (0.7, 0.7, 0, 1)
    assert again.manifest.files_dropped == {"duplicate": 1, "near_duplicate": 4}


def test_token_ids_of_different_forms_are_refused_and_of_one_form_kept(tmp_path):
    parts = {
        (name, surface): make_part(
            tmp_path / f"{name}-{surface}", {TRAIN[number]: text(0)}, tokenizer_vocab=300, pretokenize=surface
        )
        for number, (name, surface) in enumerate([("one", "newline"), ("two", "newline"), ("one", "special")])
    }
    one, two, other = parts.values()
    with pytest.raises(ValueError, match="hold token ids of one form"):
        merge_corpora([one, other], tmp_path / "no", 9)
    merged = merge_corpora([one, two], tmp_path / "merged", 9).manifest
    assert merged.token_form == Manifest.load(one).token_form
    assert merged.splits["train"].tokens == Manifest.load(one).splits["train"].tokens
    assert list(problems(tmp_path / "merged")) == []


def test_chains_of_copies_end_at_a_kept_file():
    signatures = np.random.default_rng(0).integers(0, 2**32 - 1, (6, 128), np.uint32)
    signatures[3] = signatures[1]  # 3 is near 1; 4 has the text of 3; 5 that of 0
    found = find_originals(np.array([[0], [1], [2], [3], [3], [0]], np.uint64), signatures, 0.7)
    assert found.original.tolist() == [-1, -1, -1, 1, 1, 0]
    assert found.exact.tolist() == [False, False, False, False, True, True]
    assert found.near.tolist() == [False, False, False, True, False, False]
    assert find_originals(np.zeros((0, 1), np.uint64), None, 0.7).original.tolist() == []


def test_the_largest_families_come_first_and_show_some_members():
    original = np.array([-1, 0, -1, 2, 2, 2, 0, -1, 7])
    found = Originals(original, np.isin(np.arange(9), [3, 6]))
    families = largest_families(found, limit=2, shown=2)
    assert [(family.kept, family.exact, family.near, family.first) for family in families] == [
        (2, 1, 2, (3, 4)),
        (0, 1, 1, (1, 6)),
    ]
