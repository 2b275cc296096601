"""Interpolated Witten-Bell n-grams of characters: bits per character of a data part's test text.

    python scripts/baselines/ngram.py [stdlib_source|bible] [N]

Training and test text (`held_out`) are those of the data part. The estimate is
P(w | h) = (c(hw) + T(h) P(w | h')) / (c(h) + T(h)), with T(h) the number of different characters
after h, and h' the history without its first character (Witten and Bell 1991; Chen and Goodman
1998, section 2.4); without history all characters of the vocabulary are equally likely.
"""

import sys
import time

import numpy as np

import framework as fw

MOST = 8  # characters in 64 bits
LAST = np.uint64(8)  # bits of the last character of an n-gram, the lowest ones


def keys(ids: np.ndarray, length: int) -> np.ndarray:
    """Return the last `length` ids up to each position as one number, padded with zeros."""
    joined = np.zeros(len(ids), dtype=np.uint64)
    for back in range(min(length, len(ids))):
        joined[back:] |= ids[: len(ids) - back] << np.uint64(8 * back)
    return joined


def counts_of(wanted: np.ndarray, values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return the counts of the wanted values, 0 for values without count."""
    places = np.searchsorted(values, wanted).clip(max=len(values) - 1)
    return np.where(values[places] == wanted, counts[places], 0)


def probabilities(train: np.ndarray, test: np.ndarray, order: int, vocabulary: int) -> np.ndarray:
    """Return the probability of each test character given the previous ones."""
    likely = np.full(len(test), 1 / vocabulary)
    for length in range(1, order + 1):
        grams, times = np.unique(keys(train, length), return_counts=True)
        histories, first, different = np.unique(
            grams >> LAST, return_index=True, return_counts=True
        )
        totals = np.add.reduceat(times, first)  # n-grams with the same history are adjacent
        wanted = keys(test, length)
        t = counts_of(wanted >> LAST, histories, different)
        c = counts_of(wanted >> LAST, histories, totals)
        estimate = (counts_of(wanted, grams, times) + t * likely) / np.maximum(c + t, 1)
        likely = np.where(c > 0, estimate, likely)
    return likely


def main(name: str = "stdlib_source", order: str = "6") -> None:
    fw.discover()
    began = time.perf_counter()
    data = fw.datasets.build(name, tokenizer="char")
    vocabulary = data.tokenizer.size
    if vocabulary > 256 or int(order) > MOST:
        raise SystemExit(f"{vocabulary} characters and n-grams of {order} do not fit into 64 bits")
    train = np.array(data.tokenizer.encode(data.fitted_on), np.uint64)
    test = np.array(data.tokenizer.encode(data.held_out), np.uint64)
    bits = -np.log2(probabilities(train, test, int(order), vocabulary)).mean()
    seconds = time.perf_counter() - began
    print(
        f"{name}: Witten-Bell {order}-grams of {len(train):,} characters, measured on "
        f"{len(test):,}: {bits:.4f} bits per character, {seconds:.0f} s"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
