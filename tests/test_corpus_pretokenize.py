"""Stored token ids give exactly the snippets of the text, are used where they fit only, and are found when damaged."""

import dataclasses
import json
from contextlib import closing

import pytest

from megatron_ra3.corpus.lines import CodeLine, split_lines
from megatron_ra3.corpus.manifest import Manifest, TokenForm
from megatron_ra3.corpus.prepare import PrepareConfig, prepare
from megatron_ra3.corpus.pretokenize import with_tokens
from megatron_ra3.corpus.shards import read_shard
from megatron_ra3.corpus.snippets import SnippetRecord
from megatron_ra3.corpus.stream import ShardStream
from megatron_ra3.corpus.tokenized import SnippetTokenizer, why_unused
from megatron_ra3.corpus.tokenizer import load_tokenizer
from megatron_ra3.corpus.verify import problems
from megatron_ra3.latents import LatentFormat

SOURCE = "# sets it\na = {n}\n\n\n# thinks a while about it\n# and more\ndef f{n}(x):\n    # adds\n    return x + {n}\n"


def make_corpus(folder, **settings):
    for number in range(9):
        path = folder / "src" / f"p{number}" / "m.py"
        path.parent.mkdir(parents=True)
        path.write_text(SOURCE.format(n=number))
    out = folder / "out"
    prepare(
        PrepareConfig(
            **{
                "sources": (str(folder / "src"),), "out": str(out), "heldout_fraction": 0.3, "samples_per_shard": 4,
                "tokenizer_vocab": 300, "pretokenize": "newline", "workers": 1,
            } | settings
        )
    )  # fmt: skip
    return out


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("tokens"))


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return load_tokenizer(corpus / "tokenizer")


def records_of(corpus, split="train"):
    shards = Manifest.load(corpus).splits[split].shards
    return [record for shard in shards for record in read_shard(corpus / shard.tar.name)]


def text_of(records):
    return [dataclasses.replace(record, tokens=None) for record in records]


def tokenise(records, tokenizer, surface="newline", comments="observe", *, use_stored, **settings):
    settings = {"max_tokens": 60, "max_rationale_tokens": 6} | settings
    fmt = LatentFormat.build(surface, tokenizer)
    return SnippetTokenizer(tokenizer, fmt, comments, use_stored=use_stored, **settings).snippets(records)


class NoText:
    """A tokenizer that refuses to encode anything but the empty prompt."""

    def __init__(self, tokenizer):
        self.vocab_size = tokenizer.vocab_size

    def encode(self, text):
        assert text == ""
        return []


def test_a_prepared_corpus_streams_its_token_ids(corpus, tokenizer):
    with closing(ShardStream(corpus, "train", seed=0)) as stream:
        records, form = stream.take(len(stream)), stream.token_form
    assert form == TokenForm(tokenizer.fingerprint, "newline", "observe")
    stored = SnippetTokenizer(
        NoText(tokenizer), LatentFormat.build("newline", tokenizer), "observe",
        max_tokens=60, max_rationale_tokens=6, use_stored=True,
    ).snippets(records)  # fmt: skip
    assert stored == tokenise(text_of(records), tokenizer, use_stored=True)
    assert len(stored) == Manifest.load(corpus).splits["train"].snippets
    lengths = {len(line) for snippet in stored for line in snippet.lines}
    assert len(lengths) > 1
    assert any(native for snippet in stored for native in snippet.native)
    tokens = sum(len(ids) for record in records for pair in record.tokens for ids in pair if ids)
    assert tokens == Manifest.load(corpus).splits["train"].tokens


@pytest.mark.parametrize("granularity", ["line", "statement", "snippet", "token"])
@pytest.mark.parametrize(
    ("surface", "comments"),
    [("newline", "observe"), ("newline", "strip"), ("special", "observe"), ("special", "keep_as_code")],
)
def test_snippets_are_those_of_the_text(corpus, tokenizer, surface, comments, granularity):
    if (surface, granularity) == ("newline", "token"):
        return
    texts = text_of(records_of(corpus))
    form = TokenForm(tokenizer.fingerprint, surface, comments)
    stored = [SnippetRecord.from_json(json.loads(with_tokens(record, tokenizer, form).encode())) for record in texts]
    for max_tokens in (12, 25, 60):
        found, expected = (
            tokenise(
                records, tokenizer, surface, comments, use_stored=True, granularity=granularity, max_tokens=max_tokens
            )
            for records in (stored, texts)
        )
        assert found == expected
    assert found
    whole = tokenise(stored, tokenizer, surface, comments, use_stored=True, max_rationale_tokens=99)
    assert any(any(snippet.native) for snippet in whole) == (comments == "observe")


def test_ids_of_another_form_are_not_looked_at(corpus, tokenizer):
    form = TokenForm(tokenizer.fingerprint, "special", "strip")
    records = [with_tokens(record, tokenizer, form) for record in text_of(records_of(corpus))]
    assert tokenise(records, tokenizer, use_stored=False) == tokenise(text_of(records), tokenizer, use_stored=True)
    assert tokenise(records, tokenizer, use_stored=True) != tokenise(text_of(records), tokenizer, use_stored=True)
    assert why_unused(form, form) == ""
    reason = why_unused(form, TokenForm(tokenizer.fingerprint, "newline", "observe"))
    assert "with surface=special instead of newline, comments=strip instead of observe; its text is" in reason


def test_a_line_that_reads_as_a_latent_is_refused_either_way(tokenizer):
    form = TokenForm(tokenizer.fingerprint, "newline", "observe")
    record = SnippetRecord("s", "m.rs", "", (CodeLine("", "#[inline]"), CodeLine("", "x")), language="rust")
    for shown in (record, with_tokens(record, tokenizer, form)):
        with pytest.raises(ValueError, match="snippet s: a line starts with '#'"):
            tokenise([shown], tokenizer, use_stored=True)


def test_trivia_after_the_last_line_has_ids_and_no_action(tokenizer):
    form = TokenForm(tokenizer.fingerprint, "newline", "observe")
    record = SnippetRecord("s", "m.py", "", tuple(split_lines("a = 1\nb = a\n# end\n")))
    stored = with_tokens(record, tokenizer, form)
    assert len(stored.tokens) == 3
    assert tokenise([stored], tokenizer, use_stored=True) == tokenise([record], tokenizer, use_stored=True)


@pytest.mark.parametrize(
    "tokens", [[[[1], None]], [[[1], None], [[2]]], [[[1], 3], [[2], None]], [[["1"], None]] * 2, 5]
)
def test_malformed_ids_are_a_bad_sample(tokens):
    record = SnippetRecord("s", "m.py", "", (CodeLine("", "a"), CodeLine("", "b"))).to_json()
    assert SnippetRecord.from_json(record | {"tokens": [[[1], None], [[2, 3], [4]]]}).tokens[1] == ([2, 3], [4])
    with pytest.raises(ValueError, match="'tokens' must hold"):
        SnippetRecord.from_json(record | {"tokens": tokens})


def test_ids_outside_the_vocabulary_are_named_as_damage(corpus, tokenizer):
    record = records_of(corpus)[0]
    for wrong in (tokenizer.vocab_size, -1):
        damaged = dataclasses.replace(record, tokens=(([wrong], None), *record.tokens[1:]))
        with pytest.raises(
            ValueError, match=rf"holds token ids from .*{wrong}.* damaged; restore what `ra3 corpus ver"
        ):
            tokenise([damaged], tokenizer, use_stored=True)


def test_the_tokenizer_of_a_model_is_copied_and_nothing_else_of_it(corpus, tokenizer, tmp_path):
    (corpus / "tokenizer" / "model.safetensors").write_text("large")
    out = make_corpus(tmp_path, tokenizer_vocab=None, tokenizer=str(corpus / "tokenizer"), pretokenize="special")
    (corpus / "tokenizer" / "model.safetensors").unlink()
    manifest = Manifest.load(out)
    assert manifest.token_form == TokenForm(tokenizer.fingerprint, "special", "observe")
    assert manifest.tokenizer_sha256 == tokenizer.fingerprint
    assert not (out / "tokenizer" / "model.safetensors").exists()
    assert load_tokenizer(out / "tokenizer").encode("x = 1") == tokenizer.encode("x = 1")
    assert list(problems(out)) == []
    dataclasses.replace(manifest, token_form=None).save(out)
    assert [found.partition(": ")[2] for found in problems(out)] == [
        f"{shard.samples} samples hold token ids, against the manifest"
        for split in manifest.splits.values()
        for shard in split.shards
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pretokenize": "newline"}, "pretokenize=newline needs the tokenizer of your model"),
        ({"comments": "strip"}, "comments=strip shapes token ids alone"),
        ({"tokenizer": "t", "tokenizer_vocab": 300}, "tokenizer=t with tokenizer_vocab=300: give one of the two"),
        ({"tokenizer": "t", "pretokenize": "newline", "comments": "keep_as_code"}, "no run reads that"),
    ],
)
def test_impossible_settings(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        PrepareConfig(sources=(str(tmp_path),), out=str(tmp_path / "out"), **settings)


def test_a_missing_tokenizer_is_named_before_anything_is_read(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer folder .*nowhere does not exist"):
        make_corpus(tmp_path, tokenizer_vocab=None, tokenizer=str(tmp_path / "nowhere"))
    assert not (tmp_path / "out").exists()
