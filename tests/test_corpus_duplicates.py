"""Near duplicates against brute force, in any order of bands, and on boilerplate that would make pairs explode."""

import random
import time

import numpy as np
import pytest

from megatron_ra3.corpus import duplicates
from megatron_ra3.corpus.duplicates import NO_SHINGLE, NUM_PERM, band_shape, near_duplicates, signature
from megatron_ra3.corpus.ngrams import ngram_hashes, word_hashes


def families(count, size, rng):
    """Texts of 300 words in families: each member changes from none to a fifth of the words of its first."""
    texts = []
    for _ in range(count):
        first = [f"w{rng.randrange(10**6)}" for _ in range(300)]
        for member in range(size):
            changed = set(rng.sample(range(300), rng.randrange(12 * member + 1)))
            texts.append(" ".join(f"x{rng.randrange(10**6)}" if i in changed else w for i, w in enumerate(first)))
    rng.shuffle(texts)
    return texts


def shingles(text):
    return set(ngram_hashes(word_hashes(text), 5).tolist())


def jaccard(left, right):
    return len(left & right) / len(left | right)


def random_signatures(count, rng):
    return rng.integers(0, 2**32 - 1, (count, NUM_PERM), np.uint32)


def altered(row, places, rng):
    """A signature that differs from `row` in `places` places."""
    row = row.copy()
    row[rng.choice(NUM_PERM, places, replace=False)] ^= np.uint32(1)
    return row


def test_signature_is_a_fixed_function_of_the_words():
    text = "def area(width, height):\n    return width * height\n"
    assert signature(text).dtype == np.uint32
    assert signature(text).shape == (NUM_PERM,)
    assert signature(text).tolist() == signature("DEF area ( width ,height) :\n\n  return width*height").tolist()
    assert signature(text)[:4].tolist() == [829795919, 2105927530, 1840176874, 1189932667]
    assert (signature("one two three four") == NO_SHINGLE).all()


def test_signatures_estimate_the_jaccard_similarity():
    texts = families(4, 6, random.Random(1))
    errors = [
        np.mean(signature(left) == signature(right)) - jaccard(shingles(left), shingles(right))
        for i, left in enumerate(texts)
        for right in texts[:i]
    ]
    assert abs(np.mean(errors)) < 0.01
    assert np.max(np.abs(errors)) < 4.5 * 0.5 / NUM_PERM**0.5


def test_decisions_are_those_of_brute_force_away_from_the_threshold():
    texts = families(40, 6, random.Random(2))
    original = near_duplicates(np.stack([signature(text) for text in texts]), 0.7)
    kept = np.flatnonzero(original < 0)
    sets = [shingles(text) for text in texts]
    missed = [(i, j) for i in kept for j in kept if j < i and jaccard(sets[i], sets[j]) >= 0.85]
    dropped = np.flatnonzero(original >= 0)
    similarity = np.array([jaccard(sets[i], sets[original[i]]) for i in dropped])
    assert len(dropped) > 60
    assert missed == []
    assert similarity.min() > 0.55
    assert (similarity >= 0.7).mean() > 0.85


def test_recall_follows_the_theory_of_bands(monkeypatch):
    monkeypatch.setattr(duplicates, "LSH_WEIGHTS", (0.5, 0.5))  # few bands: enough is missed to be measured
    rng = np.random.default_rng(3)
    bands, rows = band_shape(0.7)
    firsts = random_signatures(2000, rng)
    copies = np.where(rng.random(firsts.shape) < 0.8, firsts, random_signatures(2000, rng))
    original = near_duplicates(np.concatenate([firsts, copies]), 0.7)
    found = original[2000:]
    assert (original[:2000] == -1).all()
    assert (found[found >= 0] == np.flatnonzero(found >= 0)).all()
    assert (bands, rows) == (14, 9)
    assert np.mean(found >= 0) == pytest.approx(1 - (1 - 0.8**9) ** 14, abs=0.025)


def test_an_original_is_kept_and_earlier_whatever_the_order_of_the_bands():
    rng = np.random.default_rng(4)
    chain = [random_signatures(1, rng)[0]]
    for _ in range(300):
        chain.append(altered(chain[rng.integers(len(chain))], rng.integers(5, 40), rng))
    signatures = np.stack(chain)
    original = near_duplicates(signatures, 0.7)
    dropped = np.flatnonzero(original >= 0)
    assert (original[original[dropped]] == -1).all()
    assert (original[dropped] < dropped).all()
    agree = [(signatures[i] == signatures[original[i]]).mean() for i in dropped]
    assert min(agree) >= 0.7
    bands, rows = band_shape(0.7)
    turned = signatures.copy()
    turned[:, : bands * rows] = signatures[:, : bands * rows].reshape(-1, bands, rows)[:, ::-1].reshape(301, -1)
    assert (near_duplicates(turned, 0.7) >= 0).tolist() == (original >= 0).tolist()


def test_the_same_decisions_as_a_greedy_search_with_the_library():
    from datasketch import MinHash, MinHashLSH

    rng = np.random.default_rng(5)
    signatures = random_signatures(400, rng)
    for i in range(100, 400):
        signatures[i] = altered(signatures[rng.integers(i)], rng.integers(1, 50), rng)
    lsh = MinHashLSH(threshold=0.7, num_perm=NUM_PERM, weights=duplicates.LSH_WEIGHTS)
    kept = []
    for number, row in enumerate(signatures):
        minhash = MinHash(num_perm=NUM_PERM, hashvalues=row, scheme="affine32")
        if not any((signatures[other] == row).mean() >= 0.7 for other in lsh.query(minhash)):
            kept.append(number)
            lsh.insert(number, minhash)
    assert np.flatnonzero(near_duplicates(signatures, 0.7) < 0).tolist() == kept


def test_documents_without_shingle_and_empty_corpora():
    empty = np.full((3, NUM_PERM), NO_SHINGLE)
    assert near_duplicates(empty, 0.7).tolist() == [-1, -1, -1]
    assert near_duplicates(empty[:0], 0.7).tolist() == []


@pytest.mark.parametrize("threshold", [0.0, 1.5, -1.0])
def test_impossible_threshold(threshold):
    with pytest.raises(ValueError, match=r"threshold must be in \(0, 1\]"):
        near_duplicates(np.zeros((1, NUM_PERM), np.uint32), threshold)


def test_a_hundred_thousand_documents_on_disk_half_of_them_in_one_bucket(tmp_path):
    rng = np.random.default_rng(6)
    signatures = random_signatures(100_000, rng)
    _, rows = band_shape(0.7)
    signatures[:50_000, :rows] = 7  # the boilerplate
    signatures[60_000:70_000] = signatures[:10_000]
    np.save(tmp_path / "signatures.npy", signatures)
    started_s = time.process_time()
    original = near_duplicates(np.load(tmp_path / "signatures.npy", mmap_mode="r"), 0.7)
    assert time.process_time() - started_s < 20
    assert original[60_000:70_000].tolist() == list(range(10_000))
    assert np.count_nonzero(original >= 0) == 10_000


def test_blocks_do_not_show(monkeypatch):
    rng = np.random.default_rng(7)
    signatures = random_signatures(100, rng)
    signatures[50:] = [altered(row, 10, rng) for row in signatures[:50]]
    whole = near_duplicates(signatures, 0.7)
    text = " ".join(f"w{i}" for i in range(500))
    whole_signature = signature(text)
    monkeypatch.setattr(duplicates, "_ROWS_AT_ONCE", 7)
    monkeypatch.setattr(duplicates, "_SHINGLES_AT_ONCE", 10)
    assert near_duplicates(signatures, 0.7).tolist() == whole.tolist()
    assert signature(text).tolist() == whole_signature.tolist()
