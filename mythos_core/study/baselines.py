"""What methods without a network make of a text, in bits per byte: the scale for those with one."""
import lzma
import zlib

import numpy as np

ZLIB_WINDOW = 32_768    # bytes that DEFLATE looks back, at most


def _grams(text: bytes, n: int) -> np.ndarray:
    """The text's stretches of n bytes, n at most 8, as numbers; the latest byte is the lowest."""
    codes = np.frombuffer(text, np.uint8).astype(np.uint64)
    return sum((codes[n - 1 - j:len(codes) - j] << np.uint64(8 * j) for j in range(n)),
               np.zeros(max(0, len(codes) - n + 1), np.uint64))


def _look_up(keys: np.ndarray, values: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """The value of each key asked for, 0 where there is none; keys are sorted."""
    position = np.searchsorted(keys, queries).clip(max=len(keys) - 1)
    return np.where(keys[position] == queries, values[position], 0)


def ngram_bits(train: bytes, test: bytes, context: int) -> float:
    """Mean of -log2 p over the bytes of `test`, where p is counted in `train` and interpolated as
    by Witten & Bell (1991):

        p_k(c) = (count(c) + T p_{k-1}(c)) / (N + T),  p_{-1} = 1/256,

    with k the last bytes of context, N how often they occur and T how many different bytes follow
    them. With context = 0 that is the unigram.

    Args:
        context: bytes of context, 0 to 7; the first bytes of `test` have fewer.
    """
    if not 0 <= context <= 7:
        raise ValueError(f"context = {context}: must be in 0 .. 7")
    p = np.full(len(test), 1 / 256)
    for k in range(context + 1):
        grams, counts = np.unique(_grams(train, k + 1), return_counts=True)
        queries, shift = _grams(test, k + 1), np.uint64(8)
        contexts, first, types = np.unique(grams >> shift, return_index=True, return_counts=True)
        N = _look_up(contexts, np.add.reduceat(counts, first), queries >> shift)
        T = _look_up(contexts, types, queries >> shift)
        interpolated = (_look_up(grams, counts, queries) + T * p[k:]) / np.maximum(N + T, 1)
        p[k:] = np.where(N > 0, interpolated, p[k:])
    return float(-np.log2(p).mean())


def zlib_bits(train: bytes, test: bytes) -> float:
    """Bits per byte of `test` as zlib packs it (level 9) behind the last 32 KB of `train`, which is
    as far as it looks back; headers count."""
    packer = zlib.compressobj(9, zdict=train[-ZLIB_WINDOW:])
    return 8 * len(packer.compress(test) + packer.flush()) / len(test)


def xz_bits(train: bytes, test: bytes) -> float:
    """Bits per byte of `test` by which the xz file of `train` grows when `test` follows it: preset
    9 extreme, which looks back 64 MB, over all of `train` and over the past of `test` itself."""
    alone, both = (len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))
                   for text in (train, train + test))
    return 8 * (both - alone) / len(test)


def baselines(train: bytes, test: bytes) -> dict[str, float]:
    """Bits per byte of `test`: unigram, 5-gram, zlib and xz."""
    return {"unigram": ngram_bits(train, test, 0), "5-gram": ngram_bits(train, test, 4),
            "zlib": zlib_bits(train, test), "xz": xz_bits(train, test)}
