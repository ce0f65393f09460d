r"""Text to token ids and back without loss, for code that may contain anything.

Source code may spell `<|endoftext|>` or `<think>`. Read as special tokens, they would let a corpus file end a document
or fake a decision of the policy, so text is always encoded as text and special tokens enter sequences only by id.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
ACT, THINK, END_THINK = "<act>", "<think>", "</think>"
_SPECIAL_TOKENS = [END_OF_TEXT, PAD, ACT, THINK, END_THINK]
SMALLEST_VOCAB = 256 + len(_SPECIAL_TOKENS)
FOLDER = "tokenizer"
"""Where a corpus keeps its tokenizer."""
_FILE = "tokenizer.json"
_PROBE = "    def f(x):  # \u00fc \u4e16 e\u0301\n\n\treturn  x<|endoftext|> # <think>\r\n "


class CodeTokenizer:
    """A Hugging Face fast tokenizer restricted to what is exact.

    Attributes:
        folder: where it was loaded from; give it to the engine too.
        fingerprint: sha256 of its `tokenizer.json`.
        vocab_size: ids run from 0 to `vocab_size - 1`, added tokens included.
        eos_id: the end-of-text token.
    """

    def __init__(self, backend: Any, *, folder: Path, eos_id: int) -> None:
        """Takes a `tokenizers.Tokenizer`; use `load_tokenizer`."""
        self.folder = folder
        self.fingerprint = tokenizer_fingerprint(folder)
        self.eos_id = eos_id
        self._backend = _exact_backend(backend)
        self._added = {id_: token.content for id_, token in self._backend.get_added_tokens_decoder().items()}
        self._byte_level = "ByteLevel" in json.dumps(json.loads(self._backend.to_str())["decoder"])
        self.vocab_size = 1 + max(self._backend.get_vocab(with_added_tokens=True).values())

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; adds nothing, and what looks like a special token is text."""
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def count(self, texts: Sequence[str]) -> int:
        """How many tokens `texts` make, each encoded alone; on all cores."""
        return sum(map(len, self._backend.encode_batch_fast(texts, add_special_tokens=False)))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special tokens shown. The inverse of `encode`."""
        return str(self._backend.decode(ids, skip_special_tokens=False))

    def id_of(self, token: str) -> int:
        """Id of a token given by its exact content, as `<think>`.

        Raises:
            ValueError: the vocabulary has no such token.
        """
        id_ = self._backend.token_to_id(token)
        if id_ is None:
            raise ValueError(
                f"the tokenizer in {self.folder} has no token {token!r}; add it as a special token and resize the "
                "embeddings, or choose the newline form of the latents, which needs no extra tokens"
            )
        return int(id_)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for, none for an unused id; several tokens together may spell one character."""
        if token_id in self._added:
            return self._added[token_id].encode()
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if self._byte_level:
            return bytes(_byte_of_symbol()[symbol] for symbol in token)
        return self.decode([token_id]).encode()


def load_tokenizer(folder: str | Path) -> CodeTokenizer:
    """Loads a Hugging Face tokenizer from a local folder, its `tokenizer.json` as it stands; never asks the network.

    Not by AutoTokenizer: beside a model's config.json that takes the class of its model family, which cuts text by its
    own rules, whatever the file says.

    Raises:
        FileNotFoundError: no such folder, or no `tokenizer.json` in it.
        ValueError: its files are broken, it lacks an end-of-text token, or it cannot give back exactly the text it
            encoded.
    """
    from transformers import PreTrainedTokenizerFast

    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"tokenizer folder {folder} does not exist; train one with `ra3 prepare --tokenizer-vocab N`, "
            "or point to a downloaded Hugging Face model"
        )
    if not (folder / _FILE).is_file():
        raise FileNotFoundError(
            f"{folder} holds no {_FILE}; load the tokenizer once with transformers.AutoTokenizer "
            "and save_pretrained() it there to convert it"
        )
    try:
        loaded = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # broken files raise anything, from KeyError to a bare Exception
        raise ValueError(f"the tokenizer in {folder} cannot be read ({error!r}); save it there again") from error
    if loaded.eos_token_id is None:
        raise ValueError(f"the tokenizer in {folder} has no eos_token; set one in its tokenizer_config.json")
    tokenizer = CodeTokenizer(loaded.backend_tokenizer, folder=folder, eos_id=loaded.eos_token_id)
    decoded = tokenizer.decode(tokenizer.encode(_PROBE))
    if decoded != _PROBE:
        raise ValueError(
            f"the tokenizer in {folder} changes text: {_PROBE!r} comes back as {decoded!r}; use a byte-level one"
        )
    return tokenizer


def tokenizer_fingerprint(folder: Path) -> str:
    """The sha256 of the folder's `tokenizer.json`; empty if it has none."""
    path = folder / _FILE
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: str | Path) -> CodeTokenizer:
    """Trains a byte-level BPE on `texts` and saves it as a Hugging Face tokenizer folder.

    Every newline is a token of its own, so no token spans two lines. Small corpora may yield fewer than `vocab_size`
    tokens.

    Raises:
        ValueError: `vocab_size` has no room for the 256 bytes and the special tokens.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < SMALLEST_VOCAB:
        raise ValueError(
            f"tokenizer vocabulary of {vocab_size} is too small; it needs {SMALLEST_VOCAB} entries or more"
        )
    backend = Tokenizer(models.BPE())
    newline_alone = pre_tokenizers.Split(Regex("\n"), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([newline_alone, byte_level])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=_SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        extra_special_tokens=[ACT, THINK, END_THINK],
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)
    return load_tokenizer(folder)


def _exact_backend(backend: Any) -> Any:
    """A copy that encodes all text as text, without normalization, truncation or padding.

    `encode_special_tokens` exempts special tokens from being found in text; models also add tokens such as `<think>`
    that are not marked special, so all are marked here. Added runs of whitespace are ordinary text pieces and stay.
    """
    from tokenizers import Tokenizer

    data = json.loads(backend.to_str())
    for token in data["added_tokens"]:
        token["special"] = not token["content"].isspace()
    if (data["normalizer"] or {}).get("type") == "NFC":
        data["normalizer"] = None
    exact = Tokenizer.from_str(json.dumps(data))
    exact.encode_special_tokens = True
    exact.no_truncation()
    exact.no_padding()
    return exact


@cache
def _byte_of_symbol() -> dict[str, int]:
    """Byte-level vocabularies spell bytes as visible characters: Latin-1 where visible, the others from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(0x100 + rank): byte for rank, byte in enumerate(hidden)}
