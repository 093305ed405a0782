"""Language: bits against counting by hand, arms of equal size and cost, what a strict loop
promises on text, and a run from the command to its row."""
import argparse
import json
import math
import shlex

import pytest
import torch
from texts import FILES
from torch.utils.flop_counter import FlopCounterMode

from mythos_core import OpenMythos
from mythos_core.__main__ import main
from mythos_core.model.weights import PRETRAINED
from mythos_core.probes import multiply_adds
from mythos_core.study import RESULTS, language, on_text, unpack
from mythos_core.study.language import ARMS, language_config, language_recipe
from mythos_core.study.on_text import (
    KINDS,
    LOOPS,
    bits_by_loops,
    bits_one_loop,
    continuation,
    experts_by_kind,
    kinds_of,
    loops_until,
    settling,
)
from mythos_core.tasks.corpus import Corpus, split_files
from mythos_core.training import train
from mythos_core.training.losses import bits
from mythos_core.training.step import held_out

CORPUS = split_files("forty", FILES)
SEQ = 8


def model_of(arm, seed=0, **changes) -> OpenMythos:
    """One of dim 64 with weights large enough that loops matter."""
    torch.manual_seed(seed)
    return OpenMythos(language_recipe(arm, CORPUS, 64, **{"config.init_std": 0.3,
                                                          **changes}).config).eval()


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def text(windows=3, seq=SEQ):
    return CORPUS.windows("test", seq, windows)


def test_bits_as_counted_by_hand():
    p = torch.tensor([[0.5, 0.25, 0.125, 0.125]])
    assert bits(p.log(), torch.tensor([2])).tolist() == pytest.approx([3.0])
    logits = torch.zeros(2, 3, 256)
    logits[0, 1, 7] = math.log(255)                               # as much as the others together
    expected = torch.full((2, 3), 8.0)
    expected[0, 1] = 1.0
    targets = torch.full((2, 3), 9)
    targets[0, 1] = 7
    expected[0, 1] = -math.log2(255 / 510)
    torch.testing.assert_close(bits(logits, targets), expected)


def test_a_model_that_knows_nothing_needs_eight_bits_a_byte():
    recipe = language_recipe("strict", CORPUS, 64, lengths=[16, 16])
    model = OpenMythos(recipe.config)
    torch.nn.init.zeros_(model.embed.weight)
    assert held_out(model, recipe) == 8.0
    assert (bits_by_loops(model, *text(), [1, 5]) == 8.0).all()


@pytest.mark.parametrize("dim", [64, 128])
def test_arms_are_of_equal_parameters_and_the_deep_one_of_equal_compute(dim):
    size, cost = {}, {}
    with torch.device("meta"):
        for arm in ARMS:
            recipe = language_recipe(arm, CORPUS, dim)
            model = OpenMythos(recipe.config)
            size[arm] = sum(p.numel() for p in model.parameters())
            cost[arm] = multiply_adds(model, recipe.loops[1], 64.5)
    same = size["random-loops"]
    assert all(abs(n / same - 1) < 0.01 for arm, n in size.items() if arm != "unlooped-deep")
    assert size["strict"] == size["strict-carry"] == size["unlooped"] == same
    assert abs(cost["unlooped-deep"] / cost["strict"] - 1) < 0.04
    assert cost["unlooped"] < 0.4 * cost["strict"] and size["unlooped-deep"] > 2 * same


@pytest.mark.parametrize("arm", ["strict", "reference", "unlooped-deep"])
@pytest.mark.parametrize("n_loops", [1, 3])
def test_the_cost_is_what_torch_counts(arm, n_loops):
    # all experts chosen: torch computes those that are not, too
    model, seq = model_of(arm, **{"config.n_experts": 2}), 10
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, seq, dtype=torch.int64), n_loops)
    halting = n_loops * model.config.dim if model.recurrent.act is not None else 0
    count = multiply_adds(model, n_loops, float(seq))
    assert counter.get_total_flops() / 2 / seq == pytest.approx(count, abs=halting + 1)


@pytest.mark.parametrize("arm", ["reference", "random-loops", "strict"])
def test_bits_of_one_pass_are_those_of_a_pass_of_each_number_of_loops(arm, monkeypatch):
    monkeypatch.setattr(on_text, "AT_ONCE", 2)
    # in float64: an untrained loop that reads its own state grows float32's rounding beyond 1e-5
    model, (ids, targets) = model_of(arm).double(), text()
    each = bits_by_loops(model, ids, targets, [1, 2, 9])
    with torch.no_grad():
        for n, read in zip((1, 2, 9), each):
            torch.testing.assert_close(read, bits(model(ids, n), targets))
    assert each.shape == (3, 3, SEQ) and not torch.equal(each[0], each[1])


def test_a_strict_model_converges_and_one_that_reads_its_own_state_need_not():
    strict, free, (ids, targets) = model_of("strict"), model_of("random-loops"), text()
    loops = [SEQ - 1, SEQ, SEQ + 1, 3 * SEQ]
    settled, moving = (bits_by_loops(model, ids, targets, loops) for model in (strict, free))
    assert torch.equal(settled[1], settled[2]) and torch.equal(settled[1], settled[3])
    assert not torch.equal(moving[1], moving[3])
    distance, settled_after = settling(strict, ids)
    reached = torch.arange(1, SEQ + 1)
    assert distance.shape == (SEQ, 3, SEQ) and (distance[0, :, -1] > 0.01).all()
    assert all((distance[i:, :, i] == 0).all() for i in range(SEQ))
    assert (settled_after <= reached).all() and settled_after.float().mean() > 3
    for i in (0, 2, SEQ - 1):  # not a loop too many is counted, and none too few
        start, after = ids[:1, :i + 1], int(settled_after[0, i])
        with torch.no_grad():
            alone = [strict(start, after + more) for more in (-1, 0, 5) if after + more]
        assert torch.equal(alone[-2], alone[-1])
        assert len(alone) < 3 or not torch.equal(alone[0], alone[1])


def test_loops_until_something_holds_and_stays():
    holds = torch.tensor([[1, 0, 0, 1], [0, 1, 0, 1], [1, 1, 0, 1]]).bool()[:, None]
    assert loops_until(holds).tolist() == [[3, 2, 4, 1]]


@pytest.mark.parametrize("arm", ["strict", "strict-carry"])
def test_one_loop_for_each_byte_behind_a_settled_cache_scores_as_many_loops_do(arm):
    model, (ids, targets) = model_of(arm), text()
    many = bits_by_loops(model, ids, targets, [100])[0]
    one = bits_one_loop(model, ids, targets)
    torch.testing.assert_close(one, many, atol=2e-3, rtol=0)
    few = bits_by_loops(model, ids, targets, [1])[0]
    assert (one - few).abs().max() > 0.1                          # one loop alone does not


def test_a_model_that_reads_its_own_state_is_not_the_same_with_one_loop_a_byte():
    model, (ids, targets) = model_of("random-loops"), text()
    one, many = bits_one_loop(model, ids, targets), bits_by_loops(model, ids, targets, [SEQ])[0]
    assert (one - many).abs().max() > 0.1


def test_training_learns_a_text():
    steady = b"the cat sat on the mat. " * 100
    recipe = language_recipe("strict", Corpus("steady", steady, steady, steady), 64, 40,
                             lengths=[16, 16], batch=8, lr=4e-3, warmup=5, loops=[1, 4])
    run = train(recipe, 0, progress=False)
    assert run.history[-1]["held_out"] < 4 < held_out(OpenMythos(recipe.config), recipe)


def test_a_continuation_begins_with_its_prompt():
    said = continuation(model_of("strict"), torch.tensor([list(b"The loop ")]), 4, 5)
    assert said.startswith("The loop ") and len(said) <= 14


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "texts").mkdir()
    for name, of in FILES.items():
        (tmp_path / "texts" / name).write_bytes(of)
    return tmp_path


@pytest.mark.parametrize("arm", ["strict", "reference"])
def test_a_run_leaves_its_row_and_the_model_that_the_row_is_about(arm, folder, capsys, monkeypatch):
    for module in (language, on_text):
        monkeypatch.setattr(module, "CONTEXT", 16)
    command = ["language", "--arm", arm, "--corpus", str(folder / "texts"), "--dim", "64",
               "--steps", "3", "--windows", "4", "--set", "batch=2", "--set", "config.window=8",
               "--out", str(folder / "out")]
    main(command)
    row = read_json(folder / "out" / "row.json")
    model = OpenMythos.from_pretrained(folder / "out" / "bfloat16")
    assert row["loops"] == [1, 2, 4, 8, 16] and model.config.window == 8
    ids, targets = CORPUS.windows("test", 16, 4)
    read = bits_by_loops(model, ids, targets, row["loops"]).mean((1, 2))
    assert row["bits"] == pytest.approx(read.tolist())
    assert row["best"] == min(row["bits"]) and row["beyond"] == row["bits"][-1] - row["best"]
    assert 0 < abs(row["unrounded"] - row["bits"][3]) < 0.05
    assert row["recipe"]["corpus"]["sha256"] == CORPUS.fingerprint
    assert row["command"] == shlex.join(["mythos", *command])
    assert row["validation"][-1][0] == 3
    assert ("stopped_after" in row) == (arm == "reference")
    if arm == "strict":
        assert row["one_loop"] == pytest.approx(row["all_loops"], abs=1e-4)
        assert row["distance"][-1] == 0 < row["distance"][0]
    provenance = read_json(folder / "out" / "bfloat16" / "config.json")["provenance"]
    assert provenance["command"].startswith(f"mythos language --arm {arm} ")
    main([*command, "--resume"])
    assert read_json(folder / "out" / "row.json")["bits"] == row["bits"]
    assert "bits per byte by loops 1: " in capsys.readouterr().out


@pytest.mark.parametrize("option, said", [
    (["--arm", "looped"], "arm = 'looped': must be one of"),
    (["--arm", "strict", "--dim", "96"], "dim = 96: must be a multiple of 64"),
    (["--arm", "strict", "--corpus", "nowhere"], "corpus = 'nowhere': must be one of"),
    (["--arm", "strict", "--set", "speed=2"], "--set: 'speed=2': 'speed' must be one of ['batch'"),
    (["--arm", "strict", "--set", "config.speed=2"], "'config.speed' must be one of ['batch'"),
    (["--arm", "strict", "--set", "steps=2"], "'steps' must be one of"),
    (["--arm", "strict", "--set", "batch"], "--set: 'batch': must be NAME=JSON, such as"),
    (["--arm", "strict", "--device", "meta"], "device = 'meta': must be one that holds numbers"),
    (["--arm", "strict", "--seed", "-1"], "seed = -1: must be in 0"),
    (["--arm", "strict", "--windows", "0"], "windows = 0: must be at least 1"),
    (["--arm", "strict", "--out", ""], "out = '': must be a folder"),
    (["--arm", "strict", "--set", "lengths=[9,90000]"], "its train split has"),
    (["--arm", "strict", "--set", 'strings="all"'], "strings = 'all': must be one of")])
def test_what_no_run_can_begin_with_is_named(option, said, folder, capsys, monkeypatch):
    monkeypatch.setattr(language, "train_claimed", lambda *args, **how: pytest.fail("it trained"))
    with pytest.raises(SystemExit) as ended:
        main(["language", "--corpus", str(folder / "texts"), "--out", str(folder / "out"), *option])
    assert ended.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_a_split_shorter_than_a_window_and_a_byte_is_refused(split, folder, capsys, monkeypatch):
    """Before the training, which would not look at the test split."""
    monkeypatch.setattr(language, "train_claimed", lambda *args, **how: pytest.fail("it trained"))
    long = dict.fromkeys(("train", "validation", "test"), b"x" * 200)
    monkeypatch.setattr(language, "load_corpus",
                        lambda name: Corpus("short", **long | {split: b"x" * 128}))
    with pytest.raises(SystemExit) as ended:
        main(["language", "--arm", "strict", "--out", str(folder / "out")])
    said = f"its {split} split has 128 bytes: must have at least 129"
    assert ended.value.code == 2 and said in capsys.readouterr().err
    assert not (folder / "out").exists()


def test_an_older_row_is_in_the_way(folder, capsys, monkeypatch):
    monkeypatch.setattr(language, "load_corpus", lambda name: pytest.fail("it was read"))
    (folder / "row.json").write_text("old", encoding="utf-8")
    with pytest.raises(SystemExit) as ended:
        main(["language", "--arm", "strict", "--out", str(folder)])
    assert ended.value.code == 2 and "has row.json of another run" in capsys.readouterr().err


@pytest.mark.parametrize("stopped, code", [((), 130), ((143,), 143)])
def test_a_stopped_run_has_its_signal_s_exit_code(folder, capsys, monkeypatch, stopped, code):
    def stop(*args, **how):
        raise KeyboardInterrupt(*stopped)
    monkeypatch.setattr(language, "train_claimed", stop)
    monkeypatch.setattr(language, "load_corpus", lambda name: CORPUS)
    monkeypatch.setattr(language, "CONTEXT", 16)
    with pytest.raises(SystemExit) as ended:
        main(["language", "--arm", "strict", "--out", str(folder / "out")])
    assert ended.value.code == code and "go on with --resume" in capsys.readouterr().err


def test_the_help_has_a_word_on_every_option():
    parser = argparse.ArgumentParser()
    language.options(parser)
    assert [option.dest for option in parser._actions if not option.help] == []


def test_a_byte_is_of_one_kind_or_of_none():
    assert [list(KINDS)[kind] if kind >= 0 else None for kind in kinds_of(
        torch.tensor(list(b"aZ7 \n_\t\xe9\0")))] == [*KINDS, None, None, None]
    both = "".join(KINDS.values())
    assert len(set(both)) == len(both)


def test_slots_by_kind_are_those_of_a_plain_loop_and_of_a_router_told_what_to_choose():
    model, ids = model_of("random-loops"), torch.tensor([list(b"ab 1"), list(b"c. d")])
    seen, counted = [], torch.zeros(len(KINDS), 4)
    with torch.no_grad():
        model(ids, 3, observer=lambda record: seen.append(record.expert_ids))
    for chosen in seen:
        for window, position in ((w, i) for w in range(2) for i in range(4)):
            for expert in chosen[window, position]:
                counted[kinds_of(ids)[window, position], expert] += 1
    share = experts_by_kind(model, ids, 3)
    torch.testing.assert_close(share, counted / counted.sum(1, keepdim=True), equal_nan=True)
    assert share.isnan().all(1).tolist() == [False, True, False, False, True, False]
    model.recurrent.block.ffn.router_bias += torch.tensor([9.0, 0.0, 9.0, 0.0])
    assert experts_by_kind(model, ids, 3)[0].tolist() == [0.5, 0, 0.5, 0]


def test_a_model_of_the_default_size_ships_in_bfloat16_under_one_and_a_half_megabytes():
    with torch.device("meta"):
        model = OpenMythos(language_config())
    assert 2 * sum(p.numel() for p in model.parameters()) < 1.5e6
    assert model.config.max_loop_iters == LOOPS


@pytest.mark.parametrize("arm", sorted(set(ARMS) - {"unlooped-deep", "doubling"}))
def test_of_each_small_arm_the_seed_that_was_best_on_the_validation_side_ships(arm):
    rows = [row for row in unpack(RESULTS / "language.json") if row["arm"] == arm]
    best = min(rows, key=lambda row: row["validation"][-1][1])
    source = read_json(PRETRAINED / f"text-{arm}" / "config.json")["provenance"]
    assert (source["seed"], source["commit"]) == (best["seed"], best["commit"])
    assert source["metrics"]["held_out"] == pytest.approx(best["validation"][-1][1], abs=1e-4)
    assert source["recipe"]["corpus"] == best["recipe"]["corpus"]


def test_a_shipped_model_reads_code_and_not_its_bytes_in_another_order():
    model = OpenMythos.from_pretrained("text-strict")
    code = b"def add(self, name, value):\n    self.items[name] = value\n    return self\n"
    read = torch.tensor([list(code), list(code[::-1])])
    forwards, backwards = bits_one_loop(model, read[:, :-1], read[:, 1:]).mean(1)
    assert forwards < 3.5 < 5 < backwards
