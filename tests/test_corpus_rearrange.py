"""Splitting, merging and verifying corpora: nothing lost, nothing twice, and every kind of damage named."""

import json

import numpy as np
import pytest

from megatron_ra3.cli import main
from megatron_ra3.corpus.manifest import Manifest
from megatron_ra3.corpus.merge import merge_corpora
from megatron_ra3.corpus.prepare import PrepareConfig, prepare
from megatron_ra3.corpus.rearrange import split_corpus
from megatron_ra3.corpus.shards import read_shard
from megatron_ra3.corpus.verify import problems
from tests.corpora import split_of


def make_corpus(folder, numbers, **settings):
    sources = folder / "src"
    for number in numbers:
        path = sources / f"p{number // 3}" / f"m{number}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# sets {number}\na = {number}\nb = a\nc = b\n")
    out = folder / "corpus"
    prepare(
        PrepareConfig(
            **{
                "sources": (str(sources),), "out": str(out), "heldout_fraction": 0.3, "samples_per_shard": 4,
                "without": ("near_duplicates",), "workers": 1,
            } | settings
        )
    )  # fmt: skip
    return out


def records(corpus, split):
    shards = Manifest.load(corpus).splits[split].shards
    return [record for shard in shards for record in read_shard(corpus / shard.tar.name)]


def sources_of(corpus):
    return {
        split: {f"{record.repo}/{record.source}" for record in records(corpus, split)} for split in ("train", "heldout")
    }


@pytest.fixture
def corpus(tmp_path):
    return make_corpus(tmp_path / "whole", range(30))


def test_merging_the_parts_of_a_corpus_gives_its_files_and_counts_back(corpus, tmp_path):
    whole = Manifest.load(corpus)
    outs = [tmp_path / name for name in ("a", "b", "c")]
    parts = split_corpus(corpus, outs)
    repos = [{record.repo for split in ("train", "heldout") for record in records(out, split)} for out in outs]
    assert sum(map(len, repos)) == len(set().union(*repos)) == 10
    assert sum(part.splits["train"].snippets for part in parts) == whole.splits["train"].snippets
    sizes = [sum(split.snippets for split in part.splits.values()) for part in parts]
    assert max(sizes) - min(sizes) <= 3
    merged = merge_corpora(outs, tmp_path / "merged", samples_per_shard=4).manifest
    assert sources_of(tmp_path / "merged") == sources_of(corpus)
    for split in ("train", "heldout"):
        counts, expected = merged.splits[split], whole.splits[split]
        for figure in ("files", "repos", "snippets", "lines", "native_comments", "chars"):
            assert getattr(counts, figure) == getattr(expected, figure), figure
        assert [shard.samples for shard in counts.shards] == [shard.samples for shard in expected.shards]
    assert merged.languages == whole.languages
    assert merged.files_dropped.get("duplicate", 0) == 0
    assert list(problems(tmp_path / "merged")) == []


def test_a_file_that_two_parts_hold_is_merged_once(tmp_path):
    parts = [make_corpus(tmp_path / "one", range(20)), make_corpus(tmp_path / "two", range(12, 30))]
    merged = merge_corpora(parts, tmp_path / "merged", samples_per_shard=100).manifest
    together = [
        f"{record.repo}/{record.source}"
        for split in ("train", "heldout")
        for record in records(tmp_path / "merged", split)
    ]
    assert sorted(together) == sorted(f"p{number // 3}/m{number}.py" for number in range(30))
    assert merged.files_dropped["duplicate"] == 8
    assert (merged.files_seen, merged.settings["samples_per_shard"]) == (38, 100)


def test_every_copy_is_counted(tmp_path):
    parts = [make_corpus(tmp_path / name, range(9)) for name in ("one", "two", "three")]
    merged = merge_corpora(parts, tmp_path / "merged", samples_per_shard=100).manifest
    kept = sum(split.files for split in merged.splits.values())
    assert (kept, merged.files_dropped, merged.files_seen) == (9, {"duplicate": 18}, 27)


def test_a_held_back_file_that_another_repository_trains_on_is_dropped(tmp_path):
    names = [f"p{number}" for number in range(40)]
    trained = [name for name in names if split_of(name, 0.3) == "train"]
    heldout = next(name for name in names if split_of(name, 0.3) == "heldout")
    same, other = "a = 1\nb = a\nc = b\n", "x = 2\ny = x\nz = y\n"
    parts = []
    for number, files in enumerate([{trained[0]: same}, {heldout: same, trained[1]: other}]):
        for repo, text in files.items():
            path = tmp_path / f"src{number}" / repo / "m.py"
            path.parent.mkdir(parents=True)
            path.write_text(text)
        parts.append(tmp_path / f"part{number}")
        source = str(tmp_path / f"src{number}")
        prepare(PrepareConfig(sources=(source,), out=str(parts[-1]), heldout_fraction=0.3, workers=1))
    assert sources_of(parts[1])["heldout"] == {f"{heldout}/m.py"}
    merged = merge_corpora(parts, tmp_path / "merged", samples_per_shard=100).manifest
    assert sources_of(tmp_path / "merged") == {"train": {f"{name}/m.py" for name in trained[:2]}, "heldout": set()}
    assert merged.files_dropped == {"duplicate": 1}


def test_parts_that_hold_back_different_fractions_are_refused(tmp_path):
    parts = [
        make_corpus(tmp_path / name, range(9), heldout_fraction=fraction) for name, fraction in (("a", 0.0), ("b", 0.3))
    ]
    with pytest.raises(ValueError, match=r"different fractions of repositories, \[0.0, 0.3\]"):
        merge_corpora(parts, tmp_path / "merged", samples_per_shard=100)


def test_files_of_no_repository_are_dealt_out_one_by_one(tmp_path):
    rows = [json.dumps({"content": f"a = {number}\nb = a\nc = b\n"}) for number in range(20)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    out = tmp_path / "corpus"
    prepare(
        PrepareConfig(
            sources=(str(tmp_path / "rows.jsonl"),), out=str(out), heldout_fraction=0.0, without=("near_duplicates",)
        )
    )
    parts = split_corpus(out, [tmp_path / "a", tmp_path / "b"])
    assert [part.splits["train"].files for part in parts] == [10, 10]
    merged = merge_corpora([tmp_path / "a", tmp_path / "b"], tmp_path / "merged", samples_per_shard=9).manifest
    assert merged.splits["train"].repos == Manifest.load(out).splits["train"].repos == 20


def test_tokenizers_must_agree_and_are_kept(tmp_path):
    parts = [
        make_corpus(tmp_path / name, range(9), tokenizer_vocab=300, heldout_fraction=0.0) for name in ("one", "two")
    ]
    merged = merge_corpora(parts, tmp_path / "merged", samples_per_shard=100).manifest
    assert merged.tokenizer_sha256 == Manifest.load(parts[0]).tokenizer_sha256
    assert merged.splits["train"].tokens == Manifest.load(parts[0]).splits["train"].tokens
    assert (tmp_path / "merged" / "tokenizer" / "tokenizer.json").is_file()
    other = make_corpus(tmp_path / "three", range(9))
    with pytest.raises(ValueError, match=r"not all of .* have the same tokenizer"):
        merge_corpora([parts[0], other], tmp_path / "no", samples_per_shard=100)
    assert not (tmp_path / "no").exists()


def test_what_cannot_be_rearranged_is_refused(corpus, tmp_path):
    with pytest.raises(ValueError, match="needs two corpora or more, found 1"):
        merge_corpora([corpus], tmp_path / "out", samples_per_shard=4)
    with pytest.raises(ValueError, match="needs two different folders or more"):
        split_corpus(corpus, [tmp_path / "out"])
    with pytest.raises(FileExistsError, match="already holds a corpus"):
        split_corpus(corpus, [tmp_path / "out", corpus])
    with pytest.raises(ValueError, match="would hold no training snippet"):
        split_corpus(corpus, [tmp_path / str(number) for number in range(12)])
    assert not list(tmp_path.rglob("[0-9]*/manifest.json"))


def test_every_damaged_file_is_named(corpus, capsys):
    assert main(["corpus", "verify", str(corpus)]) == 0
    train = Manifest.load(corpus).splits["train"].shards
    tars = [corpus / shard.tar.name for shard in train]
    tars[0].unlink()
    tars[1].write_bytes(tars[1].read_bytes()[:-1])
    flipped = bytearray(tars[2].read_bytes())
    flipped[600] ^= 1
    tars[2].write_bytes(flipped)
    index = corpus / train[3].index.name
    np.save(index, np.load(index)[:-1])
    capsys.readouterr()
    assert main(["corpus", "verify", str(corpus)]) == 1
    output = capsys.readouterr()
    found = output.err.splitlines()
    assert len(found) == 4
    for line, message in zip(found, ("is missing", "is torn", "has changed", f"{index.name} is torn"), strict=True):
        assert message in line
    assert "4 problems" in output.out


def test_a_manifest_that_counts_wrong_is_found(corpus):
    path = corpus / "manifest.json"
    content = json.loads(path.read_text())
    content["splits"]["train"]["shards"][0]["samples"] = 5
    path.write_text(json.dumps(content))
    found = list(problems(corpus))
    assert len(found) == 2
    assert "has shape (4, 2), the manifest says 5 samples" in found[0]
    assert "holds 4 samples, the manifest says 5" in found[1]


def test_stats_and_head_show_what_is_there(corpus, capsys):
    assert main(["corpus", "stats", str(corpus)]) == 0
    counts = capsys.readouterr().out
    assert f"{Manifest.load(corpus).splits['train'].snippets} snippets" in " ".join(counts.split())
    assert main(["corpus", "head", str(corpus), "-n", "1", "--split", "heldout"]) == 0
    first = records(corpus, "heldout")[0]
    shown = capsys.readouterr().out
    assert shown.startswith(f"==> {first.id}  {first.repo}/{first.source} (python)\n# sets ")
    assert shown.count("==>") == 1
