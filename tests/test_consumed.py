"""One number for the samples of a step: the same for any order and split, another for any other samples."""

from megatron_ra3.report.consumed import Consumed


def test_order_and_split_do_not_matter_but_every_sample_does():
    whole = Consumed.of(["a", "b", "c", "a"])
    assert whole == Consumed.of(["a", "c"]).plus(Consumed.of(["b"])).plus(Consumed.of(["a"]))
    assert whole.samples == 4
    others = [Consumed.of(ids) for ids in (["a", "b", "c"], ["a", "b", "c", "c"], ["a", "b", "c", "d"], ["b", "c"])]
    assert len({item.digest for item in (whole, *others)}) == 5
    assert len(Consumed().to_json()["samples_digest"]) == 32
