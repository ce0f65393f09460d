"""Text survives the tokenizer exactly, whatever it contains; special tokens exist only as ids."""

import hashlib
import json
import sysconfig
import tokenize
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_ra3.corpus.tokenizer import load_tokenizer, train_tokenizer

STDLIB = Path(sysconfig.get_paths()["stdlib"])
LOOKALIKES = "<|endoftext|><|pad|> # <think>a</think> <act>"


def stdlib_texts():
    for path in sorted(STDLIB.rglob("*.py")):
        if {"site-packages", "test", "tests"}.isdisjoint(path.parts):
            with tokenize.open(path) as file:
                yield path, file.read()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    texts = [line for _, text in list(stdlib_texts())[:80] for line in text.splitlines()]
    return train_tokenizer(texts, 1024, tmp_path_factory.mktemp("tokenizer"))


def test_every_stdlib_file_survives(tokenizer):
    count = 0
    for path, text in stdlib_texts():
        assert tokenizer.decode(tokenizer.encode(text)) == text, path
        count += 1
    assert count > 400


@pytest.mark.parametrize(
    "text", ["", " ", "\n\n", "\r\n\t x\x0c", "é e\u0301 \u212b 世界 🐍\u200d\x00\ufeff", " ,  ' n't .", LOOKALIKES]
)
def test_awkward_text_survives(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_what_looks_special_is_text(tokenizer):
    special = {tokenizer.id_of(token) for token in ("<|endoftext|>", "<|pad|>", "<act>", "<think>", "</think>")}
    assert special == {0, 1, 2, 3, 4}
    assert special.isdisjoint(tokenizer.encode(LOOKALIKES))
    assert tokenizer.decode([0, 1, 2, 3, 4]) == "<|endoftext|><|pad|><act><think></think>"
    assert tokenizer.eos_id == 0


def test_newline_and_hash_are_single_tokens(tokenizer):
    newline, hash_ = tokenizer.encode("\n"), tokenizer.encode("#")
    assert (len(newline), len(hash_)) == (1, 1)
    assert tokenizer.encode("a\n\n    #b").count(newline[0]) == 2
    assert [id_ for id_ in range(1024) if b"\n" in tokenizer.token_bytes(id_)] == newline


def test_token_bytes_spell_the_text(tokenizer):
    text = "def f(größe): return '世界\U0001f40d'  # ok\n"
    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(text))) == text.encode()
    assert {tokenizer.token_bytes(id_) for id_ in range(1024)} >= {bytes([byte]) for byte in range(256)}
    assert tokenizer.token_bytes(tokenizer.id_of("<think>")) == b"<think>"
    assert tokenizer.token_bytes(1024) == b""


def test_training_is_deterministic_and_learns_merges(tmp_path):
    texts = ["    return value", "return values", "value = other"] * 50
    first = train_tokenizer(texts, 300, tmp_path / "a")
    second = train_tokenizer(iter(texts), 300, tmp_path / "b")
    assert first.fingerprint == second.fingerprint
    assert first.fingerprint == hashlib.sha256((tmp_path / "a" / "tokenizer.json").read_bytes()).hexdigest()
    assert first.vocab_size == 261 + len(json.loads((tmp_path / "a" / "tokenizer.json").read_text())["model"]["merges"])
    assert len(first.encode("return value")) == 2


def test_transformers_reads_the_folder(tokenizer):
    loaded = AutoTokenizer.from_pretrained(tokenizer.folder, local_files_only=True)
    text = "def f(x):\n    return x  # square\n"
    assert loaded(text)["input_ids"] == tokenizer.encode(text)
    assert len(loaded) == tokenizer.vocab_size == 1024
    assert (loaded.eos_token, loaded.pad_token) == ("<|endoftext|>", "<|pad|>")


def save_pretrained(folder, *, normalizer=None, pre_tokenizer=None, decoder=None, **settings):
    """A tokenizer as others train them: with habits that lose text."""
    alphabet = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "\u2581", *"\n\r\t 世"]
    vocab = {symbol: number for number, symbol in enumerate(dict.fromkeys(alphabet))}
    backend = Tokenizer(models.BPE(vocab, []))
    backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoder or decoders.ByteLevel()
    backend.add_special_tokens(["<eos>"])
    backend.add_tokens([AddedToken("<think>", normalized=False), AddedToken("    ", normalized=False)])
    backend.enable_truncation(3)
    PreTrainedTokenizerFast(tokenizer_object=backend, **settings).save_pretrained(folder)
    return vocab


def test_foreign_tokenizer_is_made_exact(tmp_path):
    vocab = save_pretrained(tmp_path, normalizer=normalizers.NFC(), eos_token="<eos>")
    tokenizer = load_tokenizer(tmp_path)
    text = "<think> e\u0301 <eos>"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert max(tokenizer.encode(text)) < len(vocab)
    assert tokenizer.encode("        ") == [len(vocab) + 2] * 2
    assert tokenizer.id_of("<think>") == len(vocab) + 1
    assert tokenizer.token_bytes(len(vocab) + 2) == b"    "
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (len(vocab) + 3, len(vocab))
    with pytest.raises(ValueError, match=r"no token '<act>'; add it .* newline form"):
        tokenizer.id_of("<act>")


def test_tokenizer_that_changes_text_is_refused(tmp_path):
    save_pretrained(tmp_path, pre_tokenizer=pre_tokenizers.Metaspace(), decoder=decoders.Metaspace(), eos_token="<eos>")
    with pytest.raises(ValueError, match=r"changes text: .* use a byte-level one"):
        load_tokenizer(tmp_path)


def test_tokenizer_without_end_of_text_is_refused(tmp_path):
    save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no eos_token"):
        load_tokenizer(tmp_path)


def test_missing_folder_and_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist; train one with `ra3 prepare"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"holds no tokenizer\.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", ['{"model":', "{}", "[]"])
def test_broken_files_are_named(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=rf"tokenizer in {tmp_path} cannot be read .* save it there again"):
        load_tokenizer(tmp_path)


def test_vocabulary_too_small_for_the_bytes(tmp_path):
    with pytest.raises(ValueError, match="vocabulary of 260 is too small; it needs 261"):
        train_tokenizer(["x"], 260, tmp_path)


def test_a_model_beside_the_tokenizer_does_not_change_how_text_is_cut(tmp_path):
    """Transformers takes the class of the model's family there, with rules of its own for cutting text."""
    train_tokenizer(["x = 1  # two words\n"] * 9 + ["\n\n    y  =  22\n"] * 9, 290, tmp_path)
    text = 'a = "don\'t"  # 1234 \n\n    return x\t+ 22\n'
    alone = load_tokenizer(tmp_path).encode(text)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}')
    assert load_tokenizer(tmp_path).encode(text) == alone
