"""Tokenizers, from text to token ids and back, fitted on training texts.

Id 0 is padding, id 1 the unknown token. Tokenizers are a kind of their own, so that a user's
tokenizer is chosen like a built-in one: `data.tokenizer=word data.tokenizer.vocabulary=5000`.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

from framework import DataError, Kind, PartOf, Range, Registry

tokenizers = Registry(
    Kind("tokenizer", doc="from text to token ids and back, fitted on training texts")
)

PADDING = 0
UNKNOWN = 1
SPECIAL = 2  # number of ids that stand for no text
Vocabulary = Annotated[int, Range("[3, 1000000]")]
TokenizerPart = Annotated[Any, PartOf("tokenizer")]
"""A setting that names a tokenizer; its value is a factory of tokenizers."""


class Tokenizer:
    """Base class of tokenizers. `fit` learns a vocabulary; `state` returns it as plain JSON."""

    size: int
    """Number of ids, including padding and the unknown token."""

    def fit(self, texts: Iterable[str]) -> None:
        """Learn the vocabulary from the training texts."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, with the unknown token for anything not in the vocabulary."""
        raise NotImplementedError

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids; padding has no text, and the text of the unknown token is �."""
        raise NotImplementedError

    def characters(self) -> list[int]:
        """Return the number of characters of each id; those of a text sum up to its length."""
        raise NotImplementedError

    example = ""
    """Python statements, without the framework, that define `encode` for an export; they may use
    `json`, `re` and `here`, the folder with `files`."""

    def files(self) -> dict[str, str]:
        """Return the contents of the files of an export by their names."""
        return {"tokenizer.json": json.dumps(self.state(), ensure_ascii=False)}

    def state(self) -> dict[str, Any]:
        return {}

    def load(self, state: dict[str, Any]) -> None:
        """Restore the result of `state`."""


def load_tokenizer(facts: Mapping[str, Any]) -> Any:
    """Return the fitted tokenizer of a run, by the facts "tokenizer" and "learned"."""
    tokenizer = tokenizers.build(facts["tokenizer"])
    tokenizer.load(facts["learned"])
    return tokenizer


@tokenizers.register("byte")
class Bytes(Tokenizer):
    """A token for each byte of UTF-8: encodes any text with 258 ids, without fitting."""

    size = 256 + SPECIAL
    example = """\
def encode(text):
    return [byte + 2 for byte in text.encode("utf-8", "replace")]"""

    def encode(self, text: str) -> list[int]:
        return [byte + SPECIAL for byte in text.encode("utf-8", "replace")]

    def decode(self, ids: Sequence[int]) -> str:
        content = bytearray()
        for number in ids:
            if number == UNKNOWN:
                content += "�".encode()
            elif number != PADDING:
                content.append(number - SPECIAL)
        return content.decode("utf-8", "replace")

    def characters(self) -> list[int]:
        return [0, 1, *(begins_character(byte) for byte in range(256))]


LIST_EXAMPLE = """\
tokens = json.loads((here / "tokenizer.json").read_text("utf-8"))["tokens"]
id_of = {{token: number for number, token in enumerate(tokens, 2)}}
def encode(text):
    return [id_of.get(token, 1) for token in {split}]"""


class ListTokenizer(Tokenizer):
    """Base class of tokenizers whose vocabulary is a list of strings, the most frequent first."""

    separator = ""
    """The text between two tokens."""

    def __init__(self, vocabulary: int, min_count: int = 1):
        self.max_size = vocabulary
        self.min_count = min_count
        self.set_tokens([])

    def split(self, text: str) -> Iterable[str]:
        """Return the tokens of a text."""
        raise NotImplementedError

    def fit(self, texts: Iterable[str]) -> None:
        counts: Counter[str] = Counter()
        for text in texts:
            counts.update(self.split(text))
        # Tokens of the same frequency in alphabetic order, so that the result is reproducible.
        ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        frequent = [token for token, count in ranked if count >= self.min_count]
        self.set_tokens(frequent[: self.max_size - SPECIAL])

    def set_tokens(self, tokens: Sequence[str]) -> None:
        self.tokens = list(tokens)
        self.id_of = {token: number for number, token in enumerate(tokens, SPECIAL)}
        self.size = len(tokens) + SPECIAL

    def encode(self, text: str) -> list[int]:
        return [self.id_of.get(token, UNKNOWN) for token in self.split(text)]

    def decode(self, ids: Sequence[int]) -> str:
        texts = ["", "�", *self.tokens]
        return self.separator.join(texts[number] for number in ids if number != PADDING)

    def state(self) -> dict[str, Any]:
        return {"tokens": self.tokens}

    def load(self, state: dict[str, Any]) -> None:
        self.set_tokens(state["tokens"])


@tokenizers.register("char")
class Characters(ListTokenizer):
    """A token for each character of the training texts.

    Args:
        vocabulary: maximum number of ids; rarer characters are unknown.
    """

    example = LIST_EXAMPLE.format(split="text")

    def __init__(self, vocabulary: Vocabulary = 4096):
        super().__init__(vocabulary)

    def split(self, text: str) -> Iterable[str]:
        return text

    def characters(self) -> list[int]:
        return [0, 1] + [1] * len(self.tokens)


@tokenizers.register("word")
class Words(ListTokenizer):
    """A token for each frequent word, in lower case, and for each punctuation mark.

    Decoded words are separated by a space, so spaces and capitals are lost: for classification, not
    for language models.

    Args:
        vocabulary: maximum number of ids; rarer words are unknown.
        min_count: words that are less frequent in training are unknown.
    """

    separator = " "
    example = LIST_EXAMPLE.format(split=r're.findall(r"\w+|[^\w\s]", text.lower())')

    def __init__(
        self, vocabulary: Vocabulary = 20_000, min_count: Annotated[int, Range("[1, inf)")] = 2
    ):
        super().__init__(vocabulary, min_count)

    def split(self, text: str) -> Iterable[str]:
        return re.findall(r"\w+|[^\w\s]", text.lower())

    def characters(self) -> list[int]:
        raise DataError(
            "data.tokenizer=word: a text cannot be restored from words, so a language model cannot "
            "be measured per character; use data.tokenizer=char, byte or bpe"
        )


@tokenizers.register("bpe")
class BytePairs(Tokenizer):
    """Byte-pair encoding of UTF-8 (Sennrich et al. 2016, arXiv:1508.07909).

    Its units are bytes (Radford et al. 2019), so any text can be encoded, and decoded without loss.
    Needs the package `tokenizers` (pip install 'framework[text]').

    Args:
        vocabulary: number of ids; 258 are padding, the unknown token and the single bytes.
    """

    example = """\
import tokenizers
tokenizer = tokenizers.Tokenizer.from_file(str(here / "tokenizer.json"))
def encode(text):
    return tokenizer.encode(text).ids"""

    def __init__(self, vocabulary: Annotated[int, Range("[258, 1000000]")] = 1024):
        self.max_size = vocabulary
        self.size = 256 + SPECIAL
        self.model: Any = None

    def fit(self, texts: Iterable[str]) -> None:
        package = import_tokenizers()
        model = package.Tokenizer(package.models.BPE())
        model.pre_tokenizer = package.pre_tokenizers.ByteLevel(add_prefix_space=False)
        model.decoder = package.decoders.ByteLevel()
        trainer = package.trainers.BpeTrainer(
            vocab_size=self.max_size,
            show_progress=False,
            # Characters for private use, which texts do not contain.
            special_tokens=["\ue000padding", "\ue000unknown"],
            initial_alphabet=sorted(package.pre_tokenizers.ByteLevel.alphabet()),
        )
        model.train_from_iterator(texts, trainer)
        self.load({"bpe": model.to_str()})

    def encode(self, text: str) -> list[int]:
        return list(self.model.encode(text).ids)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.model.decode([number for number in ids if number != PADDING]))

    def characters(self) -> list[int]:
        """Count the bytes that begin a character: a token may contain parts of characters."""
        vocabulary = json.loads(self.model.to_str())["model"]["vocab"]
        token_of = {number: token for token, number in vocabulary.items()}
        byte_of = {sign: byte for byte, sign in byte_signs().items()}
        counts = [0, 1]
        for number in range(SPECIAL, self.size):
            begins = [begins_character(byte_of[sign]) for sign in token_of[number]]
            counts.append(sum(begins))
        return counts

    def files(self) -> dict[str, str]:
        return {"tokenizer.json": self.model.to_str()}

    def state(self) -> dict[str, Any]:
        return {"bpe": self.model.to_str()}

    def load(self, state: dict[str, Any]) -> None:
        self.model = import_tokenizers().Tokenizer.from_str(state["bpe"])
        self.size = self.model.get_vocab_size()


def import_tokenizers() -> Any:
    """Import the package `tokenizers`.

    Raises:
        DataError: the package is not installed.
    """
    try:
        import tokenizers as package
        import tokenizers.decoders
        import tokenizers.models
        import tokenizers.pre_tokenizers
        import tokenizers.trainers
    except ImportError as error:
        raise DataError(
            "data.tokenizer=bpe needs the package `tokenizers`: pip install 'framework[text]', or "
            "use data.tokenizer=char, byte or word"
        ) from error
    return package


def begins_character(byte: int) -> int:
    """Return 0 for a byte that continues a character of UTF-8 (10xxxxxx), else 1."""
    return int(byte >> 6 != 0b10)


def byte_signs() -> dict[int, str]:
    """Return the printable sign of each byte in byte-level BPE: itself, or one from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    signs = {byte: chr(byte) for byte in printable}
    others = sorted(set(range(256)) - set(printable))
    for offset, byte in enumerate(others):
        signs[byte] = chr(256 + offset)
    return signs
