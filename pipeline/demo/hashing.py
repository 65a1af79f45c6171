"""The demo's embedder: words and their letters hashed into signed dimensions. No model, no download."""

import math
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import PipelineError

DIMENSIONS = 768
# A word points into this many dimensions: with one alone, two words that share it would be taken for one.
WORD_HASHES = 8
# The share of a word's squared length that its letters hold: enough for "extractall" to be near
# "extract", too little for "thread" to find "spread".
LETTERS_SHARE = 0.15
NGRAM_LENGTHS = (3, 4, 5)
# What a word of the head ("zipfile.ZipFile.extractall: ") counts, where one of the body counts 1.
HEAD_WEIGHT = 1.75
# The body's first so many words count in full, the n-th after them (LEAD_WORDS / n) ** LEAD_FADE: what
# a passage is about stands first.
LEAD_WORDS, LEAD_FADE = 10, 0.75
# The idf is raised to this power: below 1, two common words of a query outweigh one rare one.
RARITY_POWER = 0.8
# Words without a meaning, some of which a documentation uses too seldom for their rarity to tell.
_STOP_WORDS = """
a about an and are as at be been being by can could did do doing does for from had has have how i if in
into is it its may me might must my need no not of on or our please shall should so than that the their
then there these they this those to up us use used using want was we were what when where which who why
will with work works would you your
"""
STOP_WORDS = frozenset(_STOP_WORDS.split())
# Stems that are the same to whoever searches a documentation.
SYNONYMS = {
    "argument": "parameter",
    "begin": "start",
    "char": "character",
    "dict": "dictionary",
    "dir": "directory",
    "finish": "end",
    "folder": "directory",
    "int": "integer",
    "str": "string",
    "terminat": "end",
}

_HEAD = re.compile(r"[^\n]{1,120}?: ")
_TOKEN = re.compile(r"[A-Za-z]+|[0-9]+|[^\W\d_]+")
_CAMEL = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+")
# A server asked for ever new words would otherwise grow for ever (about 600 bytes a word).
_WORDS_KEPT = 200_000
_FORMAT = 1
_LOAD_HINT = "run pipeline demo again, which writes the file"

_Features = tuple[NDArray[np.intp], NDArray[np.float64]]


class EmbedderError(PipelineError):
    """A file is not a saved embedder, or an embedder cannot be made as asked."""


class HashingEmbedder:
    """Turn texts into unit vectors whose cosine tells how many telling words they share.

    Words are weighted by their rarity in the texts of ``fit`` (tf-idf, sublinear tf; Manning,
    Raghavan, Schütze, Introduction to Information Retrieval, 6.2 and 6.4); before ``fit`` all words
    weigh the same. Hashes are CRC-32: the same texts give the same vectors in every process.
    """

    def __init__(self, dimensions: int = DIMENSIONS) -> None:
        """Make an embedder that has seen no texts yet. Raises EmbedderError below 1 dimension."""
        if dimensions < 1:
            raise EmbedderError(f"an embedder cannot have {dimensions} dimensions", "give 1 or more")
        self.dimensions = dimensions
        self._documents = 0
        self._frequencies: dict[int, int] = {}
        self._features: dict[str, _Features] = {}

    def fit(self, texts: Iterable[str]) -> "HashingEmbedder":
        """Count in how many texts each word occurs, forget earlier counts, and return the embedder."""
        counts: Counter[int] = Counter()
        self._documents = 0
        for text in texts:
            counts.update({_hash(word) for word, _ in _words(text)})
            self._documents += 1
        self._frequencies = dict(counts)
        self._features = {}
        return self

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return an array (number of texts, dimensions) of vectors of length 1.

        A text without a telling word gets a vector of its characters, and a blank one the first unit
        vector, so that no vector is zero (the cosine distance from zero is NaN).
        """
        vectors = np.empty((len(texts), self.dimensions), np.float32)
        for row, text in enumerate(texts):
            vector = self._sum(_weights(text))
            if not vector.any():
                vector = self._fallback(text)
            vectors[row] = vector / math.sqrt(float(np.square(vector).sum()))
        return vectors

    def save(self, path: Path) -> None:
        """Write dimensions and document frequencies to ``path`` (.npz without pickles, about 50 kB)."""
        hashes = sorted(self._frequencies)
        with path.open("wb") as file:
            np.savez_compressed(
                file,
                head=np.array([_FORMAT, self.dimensions, self._documents], np.int64),
                hashes=np.array(hashes, np.uint32),
                frequencies=np.array([self._frequencies[key] for key in hashes], np.uint32),
            )

    @classmethod
    def load(cls, path: Path) -> "HashingEmbedder":
        """Read what ``save`` wrote. Raises EmbedderError where the file is missing or something else."""
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as saved:
                version, dimensions, documents = (int(number) for number in saved["head"])
                hashes, frequencies = saved["hashes"].tolist(), saved["frequencies"].tolist()
        except OSError as error:
            raise EmbedderError(f"{path} cannot be read: {error.strerror}", _LOAD_HINT) from error
        except (ValueError, KeyError, EOFError, TypeError, AttributeError, zipfile.BadZipFile) as error:
            raise EmbedderError(f"{path} is not a saved embedder", _LOAD_HINT) from error
        if version != _FORMAT or len(hashes) != len(frequencies):
            raise EmbedderError(f"{path} was saved by another version", _LOAD_HINT)
        embedder = cls(dimensions)
        embedder._documents = documents
        embedder._frequencies = dict(zip(hashes, frequencies, strict=True))
        return embedder

    def _sum(self, weights: dict[str, float]) -> NDArray[np.float64]:
        """Add the words' features in double precision, one after another: the same on every machine."""
        if not weights:
            return np.zeros(self.dimensions)
        features = [self._word(word) for word in weights]
        places = np.concatenate([place for place, _ in features])
        values = np.concatenate([value * weight for (_, value), weight in zip(features, weights.values(), strict=True)])
        return np.bincount(places, values, self.dimensions).astype(np.float64, copy=False)

    def _fallback(self, text: str) -> NDArray[np.float64]:
        """Return a vector that is not zero for a text of stop words, signs or nothing."""
        vector = np.zeros(self.dimensions)
        if text.strip():
            np.add.at(vector, *self._hashed(text.strip(), 1.0))
        if not vector.any():
            vector[0] = 1.0
        return vector

    def _word(self, word: str) -> _Features:
        found = self._features.get(word)
        if found is None:
            if len(self._features) >= _WORDS_KEPT:
                self._features.clear()
            found = self._features[word] = self._hashed(word, self._rarity(word))
        return found

    def _hashed(self, word: str, weight: float) -> _Features:
        """Return the dimensions that a word and its n-grams point into, and by how much."""
        names = [f"{number} {word}" for number in range(WORD_HASHES)]
        weights = [weight * math.sqrt((1 - LETTERS_SHARE) / WORD_HASHES)] * WORD_HASHES
        grams = _ngrams(word)
        names += grams
        weights += [weight * math.sqrt(LETTERS_SHARE / len(grams))] * len(grams)
        hashes = np.array([_hash(name) for name in names], np.int64)
        # The lowest bit is the sign, the others the place.
        places = (hashes >> 1) % self.dimensions
        return places.astype(np.intp), np.where(hashes & 1, 1.0, -1.0) * np.array(weights)

    def _rarity(self, word: str) -> float:
        """Return the damped idf, rounded so that no machine's own logarithm shows in the vectors."""
        if word in STOP_WORDS:
            return 0.0
        if not self._documents:
            return 1.0
        seen = self._frequencies.get(_hash(word), 0)
        return round(math.pow(math.log((self._documents + 1) / (seen + 1)), RARITY_POWER), 4)


def stem(word: str) -> str:
    """Take the commonest English endings off: extracts, extracted and extracting are one word.

    Short words stay as they are. A stem need not be a word: remove is ``remov``.
    """
    if word in STOP_WORDS or len(word) < 4:
        return word
    for ending, put in (("ies", "y"), ("sses", "ss"), ("xes", "x"), ("ches", "ch"), ("s", "")):
        if word.endswith(ending) and not word.endswith(("ss", "us", "is")):
            word = word.removesuffix(ending) + put
            break
    for ending in ("ing", "ed", "er", "or", "ion"):
        if word.endswith(ending) and len(word) - len(ending) >= 4:
            word = word.removesuffix(ending)
            if word[-1] == word[-2] and word[-1] not in "lsz":
                word = word[:-1]
            break
    return word.removesuffix("e") if len(word) > 4 else word


def _hash(text: str) -> int:
    return zlib.crc32(text.encode("utf-8", "surrogatepass"))


def _weights(text: str) -> dict[str, float]:
    """Return each word's weight in a text: 1 + the logarithm of what its occurrences count together."""
    counts: dict[str, float] = {}
    for word, count in _words(text):
        counts[word] = counts.get(word, 0.0) + count
    return {word: round(1 + math.log(count), 4) if count > 1 else count for word, count in counts.items()}


def _words(text: str) -> list[tuple[str, float]]:
    """Return the stems of a text in their order, each with what this occurrence counts."""
    head = _HEAD.match(text)
    start = head.end() if head else 0
    found = [(word, HEAD_WEIGHT) for token in _TOKEN.findall(text[:start]) for word in _stems(token)]
    body = (word for token in _TOKEN.findall(text[start:]) for word in _stems(token))
    found += [(word, min(1.0, (LEAD_WORDS / place) ** LEAD_FADE)) for place, word in enumerate(body, 1)]
    return found


def _stems(token: str) -> list[str]:
    """Return a token's words: ``ZipFile`` is zipfile, zip and file."""
    parts = _CAMEL.findall(token)
    words = [token, *parts] if len(parts) > 1 else [token]
    stems = (stem(word.lower()) for word in words)
    return [SYNONYMS.get(word, word) for word in stems]


def _ngrams(word: str) -> list[str]:
    marked = f"<{word}>"
    return [marked[i : i + n] for n in NGRAM_LENGTHS for i in range(len(marked) - n + 1)]
