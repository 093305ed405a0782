"""Text in bytes: what CPython ships and so every reader has, or files of the reader's; split by
file, with no passage on two sides."""
import fnmatch
import hashlib
import os
import sysconfig
from dataclasses import dataclass, field
from importlib import import_module
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

SPLITS = ("train", "validation", "test")
HELD_BACK = 0.1     # share of the files that validation gets, and that test gets
PASSAGE = 64        # bytes of a stretch that two splits may not share
PIECE = 4096        # bytes, at least, of the pieces that take the place of files in a single one
STORIES = 20_000    # of TinyStories, about 18 MB
BASE = 0x9E3779B97F4A7C15   # an odd number, of which stretches make theirs
#: Folders of the standard library that are not on every machine, or not part of it.
LEFT_OUT = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3"})


@dataclass(frozen=True)
class Corpus:
    """Three texts: to train on, to look at in training, and to report.

    Attributes:
        name: by which `load_corpus` finds it again.
        dropped: bytes of validation and test that were left out, since an earlier split has them.
    """

    name: str
    train: bytes = field(repr=False)
    validation: bytes = field(repr=False)
    test: bytes = field(repr=False)
    dropped: int = 0

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits of SHA-256 of what the three splits hash to."""
        parts = b"".join(hashlib.sha256(getattr(self, split)).digest() for split in SPLITS)
        return hashlib.sha256(parts).hexdigest()[:16]

    def as_dict(self) -> dict:
        """Name, hash, and bytes of each split, as JSON has it."""
        return {"name": self.name, "sha256": self.fingerprint, "dropped": self.dropped,
                **{split: len(getattr(self, split)) for split in SPLITS}}

    def numbers(self, split: str) -> UInt8[Tensor, "bytes"]:
        """The bytes of a split as uint8."""
        return torch.frombuffer(bytearray(getattr(self, split)), dtype=torch.uint8)

    def require(self, split: str, seq_len: int):
        """ValueError unless there is such a split, with a window of so many bytes and one more."""
        if split not in SPLITS:
            raise ValueError(f"strings = {split!r}: must be one of {SPLITS}")
        size = len(getattr(self, split))
        if size <= seq_len:
            raise ValueError(f"corpus = {self.name!r}: its {split} split has {size:,} bytes: must "
                             f"have at least {seq_len + 1:,}, a window and the byte behind it")

    def make_batch(self, batch: int, seq_len: int, generator: torch.Generator | None = None,
                   device=None, strings: str = "train"
                   ) -> tuple[Int[Tensor, "batch seq"], Int[Tensor, "batch seq"]]:
        """Bytes from uniformly drawn places of a split, and at each the byte that follows.

        Args:
            generator: source of randomness, on the CPU; default torch's own.
            strings: the split.
        """
        text = self.numbers(strings)
        starts = torch.randint(len(text) - seq_len, (batch, 1), generator=generator)
        return _pairs(text, starts, seq_len, device)

    def windows(self, split: str, seq_len: int, most: int | None = None, device=None
                ) -> tuple[Int[Tensor, "windows seq"], Int[Tensor, "windows seq"]]:
        """A split cut into windows, and at each byte the one that follows: so every byte but the
        first is to be predicted once, from those before it in its window; what is left at the end
        is not. With `most`, at most so many windows, evenly spread."""
        text = self.numbers(split)
        starts = torch.arange(0, len(text) - seq_len, seq_len)
        if most is not None and most < len(starts):
            starts = starts[torch.arange(most) * len(starts) // most]
        return _pairs(text, starts[:, None], seq_len, device)


def _pairs(text, starts, seq_len, device):
    """(n, seq) bytes from each of the starts (n, 1), and the same one byte later."""
    spans = text[starts + torch.arange(seq_len + 1)].long().to(device)
    return spans[:, :-1], spans[:, 1:]


def side(name: str) -> str:
    """The split of a file: by a hash of its name, so that it stays where it is whatever the others
    are, and in every version of Python."""
    share = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2 ** 64
    return ("train" if share < 1 - 2 * HELD_BACK
            else "validation" if share < 1 - HELD_BACK else "test")


def split_files(name: str, files: dict[str, bytes]) -> Corpus:
    """The corpus of these files.

    Files with the same text count once, by the first of their names. Of a file in validation or
    test, paragraphs are left out that share a stretch of `PASSAGE` bytes with an earlier split: a
    topic of Python's may be a section of another.

    Raises:
        ValueError: a split would be empty.
    """
    texts: dict[str, list[bytes]] = {split: [] for split in SPLITS}
    file_of = {text: file for file, text in sorted(files.items(), reverse=True)}
    seen, dropped = np.zeros(0, np.uint64), 0
    for split in SPLITS:
        in_split = sorted((file, text) for text, file in file_of.items() if side(file) == split)
        for _, text in in_split:
            texts[split].append(_without(seen, text))
            dropped += len(text) - len(texts[split][-1])
        seen = np.sort(np.concatenate([seen, *(_hashes(text) for _, text in in_split)]))
    if not all(any(parts) for parts in texts.values()):
        raise ValueError(f"corpus = {name!r}: its {len(file_of)} different files leave a split "
                         f"empty: { {split: len(parts) for split, parts in texts.items()} } files")
    return Corpus(name, **{split: b"\n".join(texts[split]) for split in SPLITS}, dropped=dropped)


def _hashes(text: bytes) -> np.ndarray:
    """A number for each stretch of `PASSAGE` bytes, a power of two: sum_j x_j b^j modulo 2^64, put
    together from those of half the length."""
    hashes, power, size = np.frombuffer(text, np.uint8).astype(np.uint64), BASE, 1
    while size < PASSAGE:
        hashes = hashes[:-size] + hashes[size:] * np.uint64(power)
        power, size = power * power % 2 ** 64, 2 * size
    return hashes


def _without(seen: np.ndarray, text: bytes) -> bytes:
    """The text without the paragraphs that touch a stretch whose number is among those seen, which
    are sorted."""
    if len(text) < PASSAGE or not len(seen):
        return text
    hashes = _hashes(text)
    order = hashes.argsort()    # what is asked in order is found in places side by side
    places = np.searchsorted(seen, hashes[order]).clip(max=len(seen) - 1)
    starts = order[seen[places] == hashes[order]]
    edges = (np.bincount(starts, minlength=len(text) + 1)
             - np.bincount(starts + PASSAGE, minlength=len(text) + 1))
    shared, paragraphs, position = edges.cumsum() > 0, [], 0
    for paragraph in text.split(b"\n\n"):
        if not shared[position:position + len(paragraph)].any():
            paragraphs.append(paragraph)
        position += len(paragraph) + 2
    return b"\n\n".join(paragraphs)


def overlap(corpus: Corpus, length: int = PASSAGE, most: int = 1000) -> float:
    """Share of the test and validation pieces of `length` bytes, evenly spread and at most so many
    of each, that are in the text trained on: found by search, not by how the split was made."""
    pieces = [text[i:i + length] for text in (corpus.validation, corpus.test)
              for i in range(0, len(text) - length + 1, max(length, len(text) // most))]
    return sum(piece in corpus.train for piece in pieces) / max(1, len(pieces))


def _topics() -> dict[str, bytes]:
    return {name: text.encode() for name, text in
            import_module("pydoc_data.topics").topics.items()}


def _stdlib() -> dict[str, bytes]:
    return _folder(Path(sysconfig.get_paths()["stdlib"]), "*.py", LEFT_OUT)


def _tinystories() -> dict[str, bytes]:
    try:
        datasets = import_module("datasets")
    except ImportError as error:
        raise ValueError("corpus = 'tinystories': needs the package datasets") from error
    stories = datasets.load_dataset("roneneldan/TinyStories", split="train", streaming=True)
    return {str(i): story["text"].encode() for i, story in enumerate(islice(stories, STORIES))}


def _folder(root: Path, pattern: str = "*",
            excluded: frozenset[str] = frozenset()) -> dict[str, bytes]:
    """Files below a folder, by their path in it, without folders of those names; files with a zero
    byte are no text."""
    texts = {}
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in excluded]  # are not entered
        for file in map(Path(folder).joinpath, fnmatch.filter(files, pattern)):
            if file.is_file():
                name = file.relative_to(root).as_posix()
                texts[name] = file.read_bytes().replace(b"\r\n", b"\n")
    return {name: text for name, text in texts.items() if text and b"\0" not in text}


def _pieces(file: Path) -> dict[str, bytes]:
    """A single file cut at empty lines into pieces of at least `PIECE` bytes, by their number."""
    pieces = [b""]
    for paragraph in file.read_bytes().replace(b"\r\n", b"\n").split(b"\n\n"):
        if len(pieces[-1]) >= PIECE:
            pieces.append(b"")
        pieces[-1] += paragraph + b"\n\n"
    return {str(i): piece for i, piece in enumerate(pieces)}


NAMED = {"topics": _topics, "stdlib": _stdlib, "tinystories": _tinystories}


def load_corpus(name: str) -> Corpus:
    """A corpus by its name: "topics", the language reference in `pydoc_data.topics`, by topic;
    "stdlib", the sources of the standard library, by file; "tinystories" (Eldan & Li 2023), its
    first 20,000 stories, fetched through `datasets`; or a path: a folder of texts, by file,
    or one text, cut into pieces.

    Raises:
        ValueError: for a name that is none of these, and a text too short to be split.
    """
    if name in NAMED:
        return split_files(name, NAMED[name]())
    path = Path(name)
    if not path.exists():
        raise ValueError(f"corpus = {name!r}: must be one of {sorted(NAMED)}, "
                         "or a file or a folder that there is")
    return split_files(name, _folder(path) if path.is_dir() else _pieces(path))
