"""The checker that imports nothing of ours: what it accepts, and what it must refuse."""
import hashlib
import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from mythos_core.__main__ import main
from mythos_core.model.model import PRETRAINED
from mythos_core.proof import check
from mythos_core.proof.check import Refused

STRICT, DILATED = "parity-extrapolating", "doubling-parity"
SCANNED = "contracting-doubling-parity"
GATES = "recurrent.block.ffn.gate_up"


@pytest.mark.parametrize("name", [STRICT, DILATED, SCANNED, "state-Z5"])
def test_what_ships_is_proved(name):
    said = check.check(PRETRAINED / name)
    assert said.startswith("proved: every string of every length is answered as the machine of ")


def test_it_imports_no_torch_and_none_of_ours():
    code = ("import sys; from mythos_core.proof import check; check.check(sys.argv[1]); "
            "print(sorted(name for name in sys.modules if name.split('.')[0] in "
            "('torch', 'numpy', 'mythos_core')))")
    run = subprocess.run([sys.executable, "-c", code, PRETRAINED / DILATED], capture_output=True,
                         text=True, check=True)
    assert run.stdout.strip() == "['mythos_core', 'mythos_core.proof', 'mythos_core.proof.check']"


#: Runs a file where mythos_core cannot be imported.
ALONE = """import runpy, sys
sys.modules["mythos_core"] = sys.modules["torch"] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")"""


@pytest.fixture
def folder(tmp_path):
    """Makes a copy of a shipped model with changes: of the tensors, whose digest is then made
    right, of the certificate, and of the config."""
    def make(name, tensors=None, certificate=None, config=None, digest=True):
        out = tmp_path / name
        shutil.copytree(PRETRAINED / name, out)
        found = json.loads((out / "certificate.json").read_text(encoding="utf-8"))
        if tensors is not None:
            weights = load_file(out / "model.safetensors")
            tensors(weights)
            save_file(weights, out / "model.safetensors")
            if digest:
                found["weights"] = digest_of(weights)
        if certificate is not None:
            certificate(found)
        (out / "certificate.json").write_text(json.dumps(found), encoding="utf-8")
        if config is not None:                                   # in both: not by comparing them
            values = json.loads((out / "config.json").read_text(encoding="utf-8"))
            (out / "config.json").write_text(json.dumps(values | config), encoding="utf-8")
            found["config"] |= config
            (out / "certificate.json").write_text(json.dumps(found), encoding="utf-8")
        return out
    return make


def digest_of(weights):
    found = hashlib.sha256()
    named = {"embed.weight" if name == "head.weight" else name: x for name, x in weights.items()}
    for name, x in sorted(named.items()):
        found.update(f"{name} F32 {list(x.shape)}\n".encode() + x.numpy().tobytes())
    return found.hexdigest()


def embedding(weights):
    return weights["embed.weight" if "embed.weight" in weights else "head.weight"]


def test_a_copy_is_proved_and_the_digest_is_of_the_weights(folder):
    assert check.check(folder(STRICT, tensors=lambda weights: None))


def swap(x, a, b):
    x[[a, b]] = x[[b, a]]


def edit(*path_and_value):
    *path, key, value = path_and_value

    def change(found):
        for step in path:
            found = found[step]
        found[key] = value(found[key]) if callable(value) else value
    return change


#: What is wrong, in which model, by which change, and a word of the reason.
WEIGHTS = {
    "an expert that overflows": (SCANNED, lambda w: w[GATES][:, 2].mul_(1e28), "too large"),
    "experts too large together": (SCANNED, lambda w: w[GATES].mul_(2e8), "too large"),
    "letters exchanged": (STRICT, lambda w: swap(embedding(w), 1, 2), "leads by"),
    "codes exchanged": (STRICT, lambda w: swap(w["recurrent.codes"], 0, 1), "leads by"),
    "a code beside another": (STRICT, lambda w: w["recurrent.codes"][1].copy_(
        w["recurrent.codes"][0] + 1e-3), "leads by"),
    "a code twice": (STRICT, lambda w: w["recurrent.codes"][1].copy_(w["recurrent.codes"][0]), ""),
    "not a number": (STRICT, lambda w: w["recurrent.codes"][0, :1].fill_(torch.nan), ""),
    "infinite": (STRICT, lambda w: w["recurrent.norm.weight"][:1].fill_(torch.inf), ""),
    "overflow": (STRICT, lambda w: embedding(w)[1, :1].fill_(3e38), "too large"),
    "the mixture": (STRICT, lambda w: w["recurrent.block.ffn.shared.0.down.weight"].mul_(-3),
                    "leads by"),
    "an expert": (STRICT, lambda w: w["recurrent.block.ffn.down"].mul_(-9), "leads by"),
    "values": (DILATED, lambda w: w["recurrent.block.attn.out.weight"].zero_(), "leads by"),
    "coda": (STRICT, lambda w: w["coda.0.ffn.down.weight"].mul_(-20), "answer"),
    "nothing before the start": (DILATED, lambda w: w["recurrent.block.attn.start"].neg_().mul_(3),
                                 "leads by"),
    "queries": (DILATED, lambda w: w["recurrent.block.attn.qkv.weight"][:64].neg_().mul_(4), ""),
    "letters of a scan": (DILATED, lambda w: swap(embedding(w), 1, 2), "leads by"),
    "codes of a scan": (DILATED, lambda w: swap(w["recurrent.codes"], 0, 1), "leads by"),
    "norm": (DILATED, lambda w: w["recurrent.loop_norm.weight"].neg_(), "leads by"),
}
CERTIFICATES = {
    "a product twice": (SCANNED, edit("table", "products", lambda rows: rows + rows[:1]), "twice"),
    "a product of balls": (SCANNED, edit("table", "products", -1, 1, lambda b: 1 - b), "mean"),
    "a missing product of balls": (SCANNED, edit("table", "products", lambda rows: rows[1:]),
                                   "missing"),
    "a ball elsewhere": (SCANNED, edit("table", "centres", 0, 0, lambda x: x + 0.5), "leads by"),
    "smaller balls": (SCANNED, edit("table", "radius", lambda r: r / 20), "leads by"),
    "balls that are too large": (SCANNED, edit("table", "radius", lambda r: 20 * r), ""),
    "a radius below 0": (SCANNED, edit("table", "radius", lambda r: -r), "of none"),
    "no radius": (SCANNED, edit("table", "radius", float("nan")), "of none"),
    "an infinite radius": (SCANNED, edit("table", "radius", float("inf")), ""),
    "an answer in a ball": (SCANNED, edit("table", "answers", 0, 1, lambda token: 3 - token), ""),
    "a narrow ball": (SCANNED, edit("table", "centres", 0, lambda x: x[:-1]), "another space"),
    "not proved": (STRICT, edit("proved", False), "it says"),
    "another digest": (STRICT, edit("weights", "0" * 64), "other weights"),
    "another arithmetic": (STRICT, edit("arithmetic", "bfloat16"), "must be one of"),
    "a wrong start": (STRICT, edit("asked", "start", 1), ""),
    "an answer asked for": (STRICT, edit("asked", "answer", 0, 0, 2), "is not answered"),
    "a move": (STRICT, edit("asked", "next_state", 0, 0, 1), ""),
    "no start": (STRICT, edit("table", "rows", lambda rows: rows[1:]), "start of a string"),
    "a missing context": (STRICT, edit("table", "rows", lambda rows: rows[:-1]), "goes nowhere"),
    "a code that follows": (STRICT, edit("table", "rows", 1, 2, 0, lambda code: 1 - code), ""),
    "an answer": (STRICT, edit("table", "answers", 0, 1, lambda token: 3 - token), ""),
    "no table": (STRICT, edit("table", None), ""),
    "no contexts": (STRICT, edit("table", "rows", []), "start of a string"),
    "a missing product": (DILATED, edit("table", "products", lambda rows: rows[:-1]), "missing"),
    "a missing letter": (DILATED, edit("table", "letters", lambda rows: rows[1:]), "missing"),
    "a product": (DILATED, edit("table", "products", -1, 1, lambda code: 1 - code), "mean"),
    "rest": (DILATED, edit("table", "products", 0, 1, lambda code: 1 - code), ""),
    "a meaning": (DILATED, edit("table", "meaning", 0, 1, lambda act: act[::-1]), "mean"),
    "a missing meaning": (DILATED, edit("table", "meaning", lambda rows: rows[1:]), ""),
    "nothing asked": (STRICT, lambda found: found.update(
        asked={"name": "S5", "next_state": [[0]], "answer": [[]], "start": 0},
        table={"rows": [[None, 0, []]], "answers": []}), "no whole table"),
    "all answers left out": (STRICT, edit("asked", "answer", [[-1, -1]] * 2), "asked: nothing"),
    "a column left out": (DILATED, edit("asked", "answer", lambda rows: [r[:1] for r in rows]),
                          "no whole table"),
    "a state that there is not": (STRICT, edit("asked", "next_state", 0, 0, -1), "no machine"),
    "another config": (STRICT, edit("config", "n_heads", 2), "n_heads is not as in"),
    "an answer of a scan": (DILATED, edit("table", "answers", 0, 1, lambda token: 3 - token), ""),
    "a start of a scan": (DILATED, edit("asked", "start", 1), "not answered"),
}
BALLS = {
    "a ball that is elsewhere": edit("table", "centres", 0, 0, lambda x: x + 0.05),
    "larger balls": edit("table", "radius", 0.1), "smaller balls": edit("table", "radius", 1e-4),
    "another ball": edit("table", "rows", 0, 2, 0, lambda ball: (ball + 1) % 2),
    "a missing ball": edit("table", "rows", lambda rows: rows[:-1]),
    "an answer in a ball": edit("table", "answers", 3, 1, lambda token: 3 - token)}
CONFIGS = {
    "window": (STRICT, {"window": 2}, "window"), "carry": (STRICT, {"carry": True}, "carry"),
    "positions": (STRICT, {"rope": True}, "rope"), "a window of True": (
        STRICT, {"window": True}, "window"), "length": (STRICT, {"max_seq_len": 8}, "max_seq_len"),
    "angles": (DILATED, {"rope_theta": 0.1}, "rope_theta"),
    "heads": (STRICT, {"n_kv_heads": 4}, ""),
    "kind": (STRICT, {"strict": False}, "strict"),
    "more experts than there are": (SCANNED, {"n_experts_per_tok": 9}, "other experts"),
    "no experts": (STRICT, {"n_experts_per_tok": 0}, "other experts"),
    "codes": (SCANNED, {"codes": 2}, "other codes"),
    "reach": (DILATED, {"dilation": 3}, ""),
    "prelude": (DILATED, {"prelude_layers": 0}, "leads by")}


@pytest.mark.parametrize("what", WEIGHTS)
def test_other_weights_are_refused(what, folder):
    name, change, why = WEIGHTS[what]
    with pytest.raises((Refused, ArithmeticError, IndexError, ValueError), match=why or None):
        check.check(folder(name, tensors=change))


@pytest.mark.parametrize("what", CERTIFICATES)
def test_other_certificates_are_refused(what, folder):
    name, change, why = CERTIFICATES[what]
    with pytest.raises((Refused, KeyError, TypeError), match=why or None):
        check.check(folder(name, certificate=change))


@pytest.mark.parametrize("what", BALLS)
def test_other_balls_are_refused(what, folder):
    with pytest.raises(Refused):
        check.check(folder("contracting-parity", certificate=BALLS[what]))


@pytest.mark.parametrize("what", CONFIGS)
def test_other_configs_are_refused(what, folder):
    name, change, why = CONFIGS[what]
    with pytest.raises((Refused, KeyError, IndexError, ValueError), match=why or None):
        check.check(folder(name, config=change))


def test_one_bit_of_the_weights(folder):
    out = folder(STRICT)
    data = bytearray((out / "model.safetensors").read_bytes())
    data[-5] ^= 1
    (out / "model.safetensors").write_bytes(data)
    with pytest.raises(Refused, match="the certificate is of other weights"):
        check.check(out)


def test_the_command_says_what_it_found_and_exits_accordingly(folder, capsys):
    assert main(["check", str(folder(DILATED))]) == 0
    assert capsys.readouterr().out.startswith("proved: ")
    broken = folder(STRICT, certificate=edit("asked", "start", 1))
    for of, why in ((broken, "not proved: "),
                    (broken / "nowhere", "not proved: FileNotFoundError")):
        assert main(["check", str(of)]) == 2
        assert capsys.readouterr().out.startswith(why)
    (broken / "model.safetensors").write_bytes(b"nothing")
    assert main(["check", str(broken)]) == 2 and "not proved" in capsys.readouterr().out


def test_a_copy_of_the_file_alone_checks_too(folder, tmp_path):
    """In a folder of its own, and where there is no package of ours."""
    copy = shutil.copy(check.__file__, tmp_path / "copy.py")
    for of, code, said in ((folder(DILATED), 0, "proved: "), (tmp_path, 2, "not proved: ")):
        done = subprocess.run([sys.executable, "-I", "-c", ALONE, copy, of], capture_output=True,
                              text=True, cwd=tmp_path)
        assert done.returncode == code and done.stdout.startswith(said), done.stderr


def test_weights_of_another_dtype_than_the_arithmetic_are_refused(folder):
    with pytest.raises(Refused, match="is F32: must be F64 for float64"):
        check.check(folder(STRICT, certificate=edit("arithmetic", "float64")))


