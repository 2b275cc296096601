"""Interpolated Witten-Bell n-grams of characters on the text of a data part: bits per character of its test split.

    python scripts/baselines/ngram.py [stdlib_source|bible] [N]

Trained on what the data part trains on, measured on the very characters that it measures (`held_out`). The estimate is
P(w | h) = (c(hw) + T(h) P(w | h')) / (c(h) + T(h)), with T(h) the number of different characters seen after h and h'
the history without its first character (Witten and Bell 1991; Chen and Goodman 1998, section 2.4); at the end of the
chain all characters of the vocabulary are equally likely.
"""

import sys
import time

import numpy as np

import framework as fw

MOST = 8  # characters that fit into 64 bits
LAST = np.uint64(8)  # bits of an n-gram's last character, the lowest


def keys(ids: np.ndarray, length: int) -> np.ndarray:
    """Return for each position the last `length` ids up to it as one number; zeros stand before the first."""
    joined = np.zeros(len(ids), dtype=np.uint64)
    for back in range(min(length, len(ids))):
        joined[back:] |= ids[: len(ids) - back] << np.uint64(8 * back)
    return joined


def found(values: np.ndarray, counts: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return the counts of the wanted values, 0 of those that are not there."""
    places = np.searchsorted(values, wanted).clip(max=len(values) - 1)
    return np.where(values[places] == wanted, counts[places], 0)


def probabilities(train: np.ndarray, test: np.ndarray, order: int, vocabulary: int) -> np.ndarray:
    """Return the probability of each test character after those before it."""
    likely = np.full(len(test), 1 / vocabulary)
    for length in range(1, order + 1):
        seen, times = np.unique(keys(train, length), return_counts=True)
        histories, first, different = np.unique(seen >> LAST, return_index=True, return_counts=True)
        totals = np.add.reduceat(times, first)  # n-grams of one history lie side by side
        wanted = keys(test, length)
        t, c = (found(histories, counts, wanted >> LAST) for counts in (different, totals))
        likely = np.where(
            c > 0, (found(seen, times, wanted) + t * likely) / np.maximum(c + t, 1), likely
        )
    return likely


def main(name: str = "stdlib_source", order: str = "6") -> None:
    fw.discover()
    began = time.perf_counter()
    data = fw.datasets.build(name, tokenizer="char")
    vocabulary = data.tokenizer.size
    if vocabulary > 256 or int(order) > MOST:
        raise SystemExit(f"{vocabulary} characters and n-grams of {order} do not fit into 64 bits")
    train, test = (
        np.array(data.tokenizer.encode(text), np.uint64) for text in (data.fitted_on, data.held_out)
    )
    bits = -np.log2(probabilities(train, test, int(order), vocabulary)).mean()
    seconds = time.perf_counter() - began
    what = f"{len(train):,} characters, measured on {len(test):,}"
    print(
        f"{name}: Witten-Bell {order}-grams of {what}: {bits:.4f} bits per character, {seconds:.0f} s"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
