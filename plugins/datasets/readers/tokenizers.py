"""Tokenizers: from text to token ids and back, fitted on training texts. Id 0 is padding, id 1 an unknown token.

A kind of its own, so that one of yours is chosen like ours: `data.tokenizer=word data.tokenizer.vocabulary=5000`.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

from framework import DataError, Kind, Range, Registry

tokenizers = Registry(
    Kind("tokenizer", doc="from text to token ids and back, fitted on training texts")
)

PADDING, UNKNOWN = 0, 1
SPECIAL = 2  # ids below this stand for no text
Vocabulary = Annotated[int, Range("[3, 1000000]")]


class Tokenizer:
    """What makes ids of text. `fit` learns a vocabulary; `state` is all that it learned, in plain JSON types."""

    size: int
    """How many ids there are, padding and the unknown token included."""

    def fit(self, texts: Iterable[str]) -> None:
        """Learn the vocabulary from the training texts, and from nothing else."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text; what the vocabulary lacks is the unknown token."""
        raise NotImplementedError

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids; padding has none, and the unknown token is written �."""
        raise NotImplementedError

    def characters(self) -> list[int]:
        """Return how many characters each id stands for, so that a text's ids sum up to its length."""
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        return {}

    def load(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave."""


@tokenizers.register("byte")
class Bytes(Tokenizer):
    """A token for each byte of UTF-8: any text in 258 ids, nothing to learn."""

    size = 256 + SPECIAL

    def encode(self, text: str) -> list[int]:
        return [byte + SPECIAL for byte in text.encode("utf-8", "replace")]

    def decode(self, ids: Sequence[int]) -> str:
        shown = (
            b"\xef\xbf\xbd" if number == UNKNOWN else bytes([number - SPECIAL])
            for number in ids
            if number
        )
        return b"".join(shown).decode("utf-8", "replace")

    def characters(self) -> list[int]:
        return [0, 1, *(begins_character(byte) for byte in range(256))]


class Listed(Tokenizer):
    """A tokenizer whose vocabulary is a list of strings, the most frequent first."""

    joint = ""
    """What stands between two tokens in a text."""

    def __init__(self, vocabulary: int, min_count: int = 1):
        self.most, self.min_count = vocabulary, min_count
        self.learn([])

    def split(self, text: str) -> Iterable[str]:
        """Return the tokens of a text."""
        raise NotImplementedError

    def fit(self, texts: Iterable[str]) -> None:
        counts: Counter[str] = Counter()
        for text in texts:
            counts.update(self.split(text))
        ranked = sorted(
            counts.items(), key=lambda pair: (-pair[1], pair[0])
        )  # ties by the alphabet: the same each time
        self.learn(
            [token for token, count in ranked if count >= self.min_count][: self.most - SPECIAL]
        )

    def learn(self, tokens: Sequence[str]) -> None:
        self.tokens = list(tokens)
        self.places = {token: place for place, token in enumerate(tokens, SPECIAL)}
        self.size = len(tokens) + SPECIAL

    def encode(self, text: str) -> list[int]:
        place = self.places.get
        return [place(token, UNKNOWN) for token in self.split(text)]

    def decode(self, ids: Sequence[int]) -> str:
        shown = ["", "�", *self.tokens]
        return self.joint.join(shown[number] for number in ids if number)

    def state(self) -> dict[str, Any]:
        return {"tokens": self.tokens}

    def load(self, state: dict[str, Any]) -> None:
        self.learn(state["tokens"])


@tokenizers.register("char")
class Characters(Listed):
    """A token for each character that the training texts have.

    Args:
        vocabulary: most ids; the rarest characters beyond them are unknown.
    """

    def __init__(self, vocabulary: Vocabulary = 4096):
        super().__init__(vocabulary)

    def split(self, text: str) -> Iterable[str]:
        return text

    def characters(self) -> list[int]:
        return [0, 1, *(1 for _ in self.tokens)]


@tokenizers.register("word")
class Words(Listed):
    """A token for each frequent word (two or more letters or digits, in small letters) and each other sign.

    Decoded words stand apart by a space, so spaces and capitals are lost: for classification, not for language models.
    """

    joint = " "

    def __init__(
        self, vocabulary: Vocabulary = 20_000, min_count: Annotated[int, Range("[1, inf)")] = 2
    ):
        """Set the size.

        Args:
            vocabulary: most ids; the rarest words beyond them are unknown.
            min_count: words that training has less often are unknown.
        """
        super().__init__(vocabulary, min_count)

    def split(self, text: str) -> Iterable[str]:
        return re.findall(r"\w+|[^\w\s]", text.lower())

    def characters(self) -> list[int]:
        raise DataError("words do not make up a text again, so a language model cannot be measured per character with "
                        "them: choose data.tokenizer=char, byte or bpe")  # fmt: skip


@tokenizers.register("bpe")
class BytePairs(Tokenizer):
    """Byte-pair encoding of UTF-8 (Sennrich et al. 2016, arXiv:1508.07909; on bytes: Radford et al. 2019).

    By the package `tokenizers` (pip install 'framework[text]'). Any text can be encoded, and decoded without loss.
    """

    def __init__(self, vocabulary: Annotated[int, Range("[258, 1000000]")] = 1024):
        """Set the size.

        Args:
            vocabulary: ids in all; 258 are padding, the unknown token and the single bytes.
        """
        self.most, self.size = vocabulary, 256 + SPECIAL
        self.model: Any = None

    def fit(self, texts: Iterable[str]) -> None:
        package = load_package()
        model = package.Tokenizer(package.models.BPE())
        model.pre_tokenizer = package.pre_tokenizers.ByteLevel(add_prefix_space=False)
        model.decoder = package.decoders.ByteLevel()
        trainer = package.trainers.BpeTrainer(
            vocab_size=self.most,
            show_progress=False,
            special_tokens=[
                "\ue000padding",
                "\ue000unknown",
            ],  # private signs, or a text might hold them
            initial_alphabet=sorted(package.pre_tokenizers.ByteLevel.alphabet()),
        )
        model.train_from_iterator(texts, trainer)
        self.load({"bpe": model.to_str()})

    def encode(self, text: str) -> list[int]:
        return self.model.encode(text).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self.model.decode([number for number in ids if number])

    def characters(self) -> list[int]:
        """Count the bytes that begin a character: a token may hold parts of one."""
        vocabulary = json.loads(self.model.to_str())["model"]["vocab"]
        written = {number: token for token, number in vocabulary.items()}
        bytes_of = {sign: byte for byte, sign in byte_signs().items()}
        return [
            0,
            1,
            *(
                sum(begins_character(bytes_of[sign]) for sign in written[n])
                for n in range(2, self.size)
            ),
        ]

    def state(self) -> dict[str, Any]:
        return {"bpe": self.model.to_str()}

    def load(self, state: dict[str, Any]) -> None:
        self.model = load_package().Tokenizer.from_str(state["bpe"])
        self.size = self.model.get_vocab_size()


def load_package() -> Any:
    try:
        import tokenizers as package
        import tokenizers.decoders
        import tokenizers.models
        import tokenizers.pre_tokenizers
        import tokenizers.trainers
    except ImportError as error:
        raise DataError(
            "tokenizer bpe needs the package `tokenizers`: pip install 'framework[text]', or choose "
            "data.tokenizer=char, byte or word"
        ) from error
    return package


def begins_character(byte: int) -> int:
    """Return 1, or 0 for a byte that continues a character of UTF-8 (10xxxxxx)."""
    return int(byte >> 6 != 0b10)


def byte_signs() -> dict[int, str]:
    """Return the printable sign by which byte-level BPE writes each byte: itself, or the next one from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(256 + place) for place, byte in enumerate(rest)
    }
