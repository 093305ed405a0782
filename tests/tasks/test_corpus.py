"""Corpora: split by file without overlap, the same everywhere; the baselines against counting by
hand."""
import lzma
import math
import sys
import zlib
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from texts import FILES, prose

from mythos_core.study.baselines import baselines, ngram_bits, xz_bits, zlib_bits
from mythos_core.tasks import corpus as corpora
from mythos_core.tasks.corpus import (
    PASSAGE,
    SPLITS,
    Corpus,
    load_corpus,
    overlap,
    side,
    split_files,
)


def test_each_file_is_on_one_side_whole_and_a_hash_of_its_name_says_which():
    of = split_files("forty", FILES)
    for name, text in FILES.items():
        assert [split for split in SPLITS if text in getattr(of, split)] == [side(name)]
    assert of.dropped == 0 and overlap(of) == 0
    fewer = split_files("thirty", {name: FILES[name] for name in list(FILES)[:30]})
    assert all(FILES[name] in getattr(fewer, side(name)) for name in list(FILES)[:30])
    shares = Counter(side(str(i)) for i in range(5000))
    assert all(abs(shares[split] / 5000 - share) < 0.02
               for split, share in zip(SPLITS, (0.8, 0.1, 0.1)))


def test_the_order_in_which_files_come_changes_nothing_and_one_letter_the_fingerprint():
    of, turned = split_files("x", FILES), split_files("x", dict(reversed(FILES.items())))
    assert of == turned and of.fingerprint == turned.fingerprint
    longer = split_files("x", FILES | {"file 0": FILES["file 0"] + b"!"})
    assert longer.fingerprint != of.fingerprint
    assert of.as_dict()["sha256"] == of.fingerprint and len(of.fingerprint) == 16


def of_side(split):
    return next(name for name in FILES if side(name) == split)


@pytest.mark.parametrize("held_back", ["validation", "test"])
def test_what_is_trained_on_is_taken_out_of_the_other_splits_and_only_that(held_back):
    shared = prose(99, 100)
    own, behind = prose(102, 200), prose(103)
    files = FILES | {of_side("train"): prose(101, 200) + b" " + shared + b".",
                     of_side(held_back): own + b"\n\n>> " + shared + b"\n\n" + behind}
    of = split_files("planted", files)
    assert shared in of.train and shared[:PASSAGE] not in getattr(of, held_back)
    assert overlap(of) == 0 and of.dropped == len(shared) + 3 + 2
    assert own + b"\n\n" + behind in getattr(of, held_back)


def test_a_planted_overlap_is_found():
    clean = split_files("x", FILES)
    taken = clean.train[:len(clean.test) // 2 // PASSAGE * PASSAGE]
    leaking = Corpus("x", clean.train, clean.validation, taken + clean.test[len(taken):])
    share = len(taken) / (len(clean.test) + len(clean.validation))
    assert overlap(leaking) == pytest.approx(share, abs=0.03)


def test_a_file_that_is_there_twice_counts_once_by_its_first_name():
    one, other = sorted([of_side("train"), of_side("test")])
    files = FILES | {other: FILES[one]}
    of = split_files("twice", files)
    assert FILES[one] in getattr(of, side(one)) and FILES[one] not in getattr(of, side(other))


def test_pieces_that_share_no_stretch_by_topic_alone_share_much():
    """Why splitting by topic is not enough, and that it is enough with what is left out."""
    topics = load_corpus("topics")
    files = corpora._topics()
    raw = Corpus("raw", **{split: b"\n".join(text for name, text in sorted(files.items())
                                             if side(name) == split) for split in SPLITS})
    assert overlap(raw) > 0.1 and overlap(topics) == 0
    assert min(topics.as_dict()[split] for split in SPLITS) > 20_000


def test_batches_are_bytes_of_the_split_and_targets_the_bytes_that_follow():
    of = split_files("x", FILES)
    ids, targets = of.make_batch(8, 30, torch.Generator().manual_seed(1))
    assert ids.shape == targets.shape == (8, 30) and ids.dtype == torch.int64
    for read, follows in zip(ids.tolist(), targets.tolist()):
        assert bytes([*read, follows[-1]]) in of.train and read[1:] == follows[:-1]
    again, _ = of.make_batch(8, 30, torch.Generator().manual_seed(1))
    assert torch.equal(ids, again)
    assert bytes(of.make_batch(1, 30, strings="test")[0][0].tolist()) in of.test


def test_every_byte_of_a_split_is_to_be_predicted_once():
    of = split_files("x", FILES)
    ids, targets = of.windows("test", 32)
    assert bytes(ids.flatten().tolist()) == of.test[:ids.numel()]
    assert bytes(targets.flatten().tolist()) == of.test[1:targets.numel() + 1]
    assert 0 <= len(of.test) - 1 - ids.numel() < 32
    some, _ = of.windows("test", 32, most=3)
    assert len(some) == 3 and all((ids == row).all(1).any() for row in some)


def test_a_folder_a_file_and_what_is_none(tmp_path):
    for name, text in FILES.items():
        (tmp_path / name).write_bytes(text.replace(b"\n", b"\r\n"))
    (tmp_path / "picture").write_bytes(b"\0\1")
    assert load_corpus(str(tmp_path)).as_dict() | {"name": ""} == split_files(
        "", FILES).as_dict()
    one = tmp_path / "one"
    one.write_bytes(b"\n\n".join(prose(i, 5000) for i in range(30)))
    assert overlap(load_corpus(str(one))) == 0
    for name, said in ((str(tmp_path / "no"), "corpus = '.*no': must be one of"),
                       (str(tmp_path / "file 0"), "leave a split empty")):
        with pytest.raises(ValueError, match=said):
            load_corpus(name)


def test_the_sources_of_the_standard_library_without_what_is_installed(tmp_path, monkeypatch):
    for i, text in enumerate(FILES.values()):
        (tmp_path / f"m{i}.py").write_bytes(text)
    for name in ("site-packages", "test"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "m.py").write_bytes(prose(77))
    monkeypatch.setattr(corpora.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    of = load_corpus("stdlib")
    assert sum(prose(77) in getattr(of, split) for split in SPLITS) == 0
    assert len(of.train) > 20 * 600


def test_tinystories_from_a_stand_in_and_without_datasets(monkeypatch):
    asked = []

    def load_dataset(*args, **options):
        asked.append((args, options))
        return iter([{"text": text.decode()} for text in FILES.values()])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert len(load_corpus("tinystories").train) > 20 * 600
    assert asked == [(("roneneldan/TinyStories",), {"split": "train", "streaming": True})]
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="the package datasets"):
        load_corpus("tinystories")


def test_the_unigram_and_the_bigram_as_counted_by_hand():
    # a, b: 3 and 1 of 4 bytes, 2 different: p_0(a) = (3 + 2/256) / 6
    p0 = {byte: (count + 2 / 256) / 6 for byte, count in {"a": 3, "b": 1, "c": 0}.items()}
    assert ngram_bits(b"aaba", b"abc", 0) == pytest.approx(
        -sum(math.log2(p0[byte]) for byte in "abc") / 3)
    # after a: a once, b once; after b: a once; after c: never anything
    p1 = {"aa": (1 + 2 * p0["a"]) / 4, "ba": (1 + p0["a"]) / 2, "bc": p0["c"] / 2, "ca": p0["a"]}
    for text, p in {b"ba": [p0["b"], p1["ba"]], b"bca": [p0["b"], p1["bc"], p1["ca"]],
                    b"aa": [p0["a"], p1["aa"]]}.items():
        assert ngram_bits(b"aaba", text, 1) == pytest.approx(-sum(map(math.log2, p)) / len(p))
    with pytest.raises(ValueError, match="context = 8"):
        ngram_bits(b"a", b"a", 8)


def test_the_probabilities_of_all_bytes_sum_to_one():
    train, before = prose(1, 100) * 2, prose(1, 100)[40:42]
    bits = [ngram_bits(train, before + bytes([byte]), 2) * 3 - ngram_bits(train, before, 2) * 2
            for byte in range(256)]
    assert sum(2 ** -x for x in bits) == pytest.approx(1, rel=1e-6)


def test_packers_know_what_they_were_trained_on():
    train, test = prose(1, 3000), prose(2, 3000)
    assert zlib_bits(train, train) < 0.2 and xz_bits(train, train) < 0.2
    assert zlib_bits(b"x", test) == pytest.approx(8 * len(zlib.compress(test, 9)) / 3000, rel=0.02)
    assert xz_bits(train, test) < 8 * len(lzma.compress(test)) / 3000
    assert baselines(train, train)["5-gram"] < 1 < baselines(train, test)["unigram"]
