"""A checker of certificates that trusts nothing of what made them.

    python -m mythos_core.proof.check DIR

reads config.json, model.safetensors and certificate.json, with no module of this package and no
PyTorch, and proves again what the certificate says: by balls of real numbers (Arb, in python-flint)
around the exact value of every context, and a bound of how far rounding may take any machine from
it. docs/certificate.md has the format, the theorems and the bounds. Exit 0: proved; 2: not, and
why. `mythos check DIR` does the same, and so does `python check.py DIR` with a copy of this file.
"""
import argparse
import hashlib
import json
import sys
from functools import lru_cache
from itertools import chain, combinations, product
from pathlib import Path

import safetensors
from flint import arb, arb_mat

#: By arithmetic: the dtype of the weights, unit roundoff, and the largest number looked at.
ARITHMETIC = {"float32": ("F32", arb(2) ** -24, 1e9), "float64": ("F64", arb(2) ** -53, 1e60)}
FUNCTION, EPS, TINY, ZERO = 8, arb("1e-6"), arb("1e-32"), arb(0)
FLAT, BENT, CURLED = arb("1.1"), arb("0.5"), arb("0.31")     # above |silu'|, |silu''|, |silu'''|
MUST_BE = {"window": 1, "stride": 1, "carry": False, "rope": False, "attn_type": "gqa",
           "max_seq_len": None, "lora_rank": 0, "token_shift": False, "loop_embedding": False}


class Refused(Exception):
    """Why it is not proved."""


def require(holds, why):
    if not holds:
        raise Refused(why)


def total(x):
    return sum(x, ZERO)


def length(x):
    square = total(a * a for a in x)             # of numbers near 0 the ball may reach below it
    return (square.upper().sqrt().union(ZERO) if square.contains(ZERO) else square.sqrt())


def most(x):
    return max((abs(a) for a in x), key=lambda a: float(a.upper()))


def lowest(numbers):
    """The least, or one that is no number, if there is one."""
    numbers = list(numbers)
    return next((a for a in numbers if a != a), min(numbers, default=float("inf")))


def least(a, b):
    return a if a < b else b


def spectral(A):
    """|A|^2 = |A^T A| <= |(A^T A)^8|_F^(1/8)."""
    A = A.transpose() * A
    for _ in range(3):
        A = A * A
    return (length(A.entries()) + TINY ** 9).root(16)


def identity(n):
    return arb_mat([[i == j for j in range(n)] for i in range(n)])


class Ball:
    """x; a machine is off by at most `error` in any way and by A z, |z| <= 1, for each A `along`.
    All of these are one: the A / sqrt(share) side by side, with shares that add up to 1."""

    def __init__(self, x, error=ZERO, along=()):
        self.x, self.error, self.along, self.radius = x, error, along, error
        if len(along) == 1:
            self.radius += spectral(along[0])
        elif along:
            sizes = [spectral(A) for A in along]
            parts = [(A / (size / total(sizes)).sqrt()).tolist() for A, size in zip(along, sizes)]
            self.radius += spectral(arb_mat([[*chain(*rows)] for rows in zip(*parts)]))

    def shaped(self):
        return Ball(self.x, ZERO, (*self.along, self.error * identity(len(self.x))))


class Step:
    """An operation's value, its Jacobians, bounds of their norms, and `off`: second order and
    rounding."""

    def __init__(self, x, J, off, steep):
        self.x, self.J, self.off, self.steep = x, J, off, steep

    def of(self, *balls):
        error = self.off + total(steep * b.error for steep, b in zip(self.steep, balls))
        return Ball(self.x, error, tuple(J * A for J, b in zip(self.J, balls) for A in b.along))


class Model:
    """The steps of the model, on balls."""

    def __init__(self, config, tensors, arithmetic, table):
        self.c, self.t = config, tensors
        self.centres, self.radius = tensors.get("recurrent.codes"), ZERO
        if not config["codes"]:
            self.centres, self.radius = ([[arb(a) for a in row] for row in table["centres"]],
                                         arb(table["radius"]))
            require(self.radius > 0 and all(len(row) == config["dim"] for row in self.centres),
                    "balls of another space, or of none")
        _, self.u, self.largest = ARITHMETIC[arithmetic]
        self.head, self.groups = (config["dim"] // config["n_heads"],
                                  config["n_heads"] // config["n_kv_heads"])
        # |A| <= |A|_F, which is quick, is close enough for codes, and not for balls
        self.size = (lambda A: length(A.entries())) if config["codes"] else spectral
        self.matrix = lru_cache(None)(self._matrix)
        self.tokens = lru_cache(None)(self._token)
        self.read = lru_cache(None)(lambda at: self.normed(self.state(at), "recurrent.norm"))

    def state(self, number):
        """A code, or a ball; None: the start of a string."""
        if number is None:
            return Ball([ZERO] * self.c["dim"])
        shape = () if self.c["codes"] else (self.radius * identity(self.c["dim"]),)
        return Ball(self.centres[number], ZERO, shape)

    def _matrix(self, name, rows=None, flip=False):
        """Rows of a tensor: W; W^T; |W|^T; a bound of |W|; the lengths of its rows."""
        t = self.t[name]
        W = arb_mat(t if rows is None else [t[i] for i in rows])
        W = W.transpose() if flip else W
        absolute = arb_mat([[abs(a) for a in row] for row in W.transpose().tolist()])
        return W, W.transpose(), absolute, spectral(W), [length(row) for row in W.tolist()]

    def rounded(self, n, size, functions=0):
        """Of a sum of n products in any order, and of functions: gamma_n of all its parts."""
        require(size < self.largest, "a number may be too large")
        n = n + FUNCTION * functions + 4
        return n * self.u / (1 - n * self.u) * size + TINY

    def linear(self, x, r, *key):
        """W x, and the rounding of each row for all x within r."""
        _, T, absolute, _, lengths = self.matrix(*key)
        sizes = (arb_mat([[abs(a) for a in x]]) * absolute).entries()
        return (arb_mat([x]) * T).entries(), [self.rounded(len(x), size + row * r)
                                              for size, row in zip(sizes, lengths)]

    def norm(self, b, name):
        """x w / rho and its Jacobian; half the bend, 1.53 |w| / (rho^2 sqrt(n)), times r^2."""
        w, n, r = self.t[name + ".weight"][0], len(b.x), b.radius
        rho, near = (length(b.x) ** 2 / n + EPS).sqrt(), length(b.x) - r
        nearest = ((near ** 2 if near > 0 else ZERO) / n + EPS).sqrt()
        u, steep = [a / rho for a in b.x], most(w) / nearest
        D = arb_mat([[v / rho * ((i == j) - u[i] * u[j] / n) for j in range(n)]
                     for i, v in enumerate(w)])
        x = [a * v for a, v in zip(u, w)]
        require(length(b.x) + r < self.largest, "a number may be too large")
        return Step(x, [D], arb("0.765") * steep / nearest / arb(n).sqrt() * r ** 2
                    + self.rounded(n, length(x) + steep * r, 2) + TINY * most(w), [most(w) / rho])

    def step(self, x, J, off):
        return Step(x, J, off, [self.size(A) for A in J])

    def normed(self, b, name):
        return self.norm(b, name).of(b)

    def softmax(self, z, off, by):
        """Weights; how far rounding may have them off; bounds of |D| and |D^2|."""
        e, r = [(a - z[0]).exp() for a in z], off + by
        p = [a / total(e) for a in e]
        spread = most([a - v for a in z for v in z]) + 2 * r
        steep = least(2 * most([a * (1 - a) for a in p]) * (2 * r).exp(), arb("0.5"))
        bent = least(arb(2).sqrt() * steep, arb("0.2723")) if len(z) < 3 else 2 * steep
        rounding = self.rounded(len(z), (2 * spread + 1) * (1 + r), 2) * len(z)
        return p, steep * off + rounding, steep, bent

    def unit(self, y, up, down, gates=None):
        """down(silu(gate y) up(y)). `gates` weigh channels: (weights; how far they vary in all, to
        second order, by rounding)."""
        (c, offs), r, rows = self.linear(y.x, y.radius, *up), y.radius, self.matrix(*up)[4]
        half = len(c) // 2
        h, J_gate, J_up, off, second, by = [], [], [], [], [], []
        for g, v, g_off, v_off, g_row, v_row in zip(c[:half], c[half:], offs[:half], offs[half:],
                                                    rows[:half], rows[half:]):
            s, g_by, v_by = 1 / (1 + (-g).exp()), g_row * r + g_off, v_row * r + v_off
            silu, bent = g * s, s * (1 + g * (1 - s))
            curved, big = abs(s * (1 - s) * (2 + g * (1 - 2 * s))), abs(v) + v_by
            steep, flat = least(abs(bent) + BENT * g_by, FLAT) * big, abs(silu) + FLAT * g_by
            h.append(silu * v)
            J_gate.append(bent * v)
            J_up.append(silu)
            by.append(steep * g_by + flat * v_by)
            second.append(least(curved + CURLED * g_by, BENT) * g_by ** 2 * big / 2
                          + abs(bent) * g_by * v_by)
            off.append(steep * g_off + flat * v_off + self.rounded(2, abs(h[-1]) + by[-1], 2)
                       + TINY * big)
        more, varies = ZERO, length(by)
        if gates is not None:
            w, w_by, w_second, w_off = gates
            big = length(h) + length(by)
            more = w_by * (length(by) + length(off)) + big * (w_second + w_off)
            off = [a * b + self.rounded(1, abs(v) + d) for a, b, v, d in zip(w, off, h, by)]
            h, second, J_gate, J_up = ([a * b for a, b in zip(w, of)]
                                       for of in (h, second, J_gate, J_up))
            varies = varies + big * w_by
        U, (W, _, absolute, steep, _) = self.matrix(*up)[0].tolist(), self.matrix(*down)
        x, x_off = self.linear(h, varies, *down)
        J = arb_mat([[a * v + b * t for v, t in zip(U[i], U[half + i])]
                     for i, (a, b) in enumerate(zip(J_gate, J_up))])
        return h, self.step(x, [W * J], steep * (length(off) + more) + length(x_off)
                            + length((arb_mat([second]) * absolute).entries()))

    def residual(self, f, norms, of):
        """of_0 + f(norms(of)), by |I + Df| at the centre."""
        off = f.off + total(steep * norm.off for steep, norm in zip(f.steep, norms))
        slopes = [J * norm.J[0] for J, norm in zip(f.J, norms)]
        slopes[0] += identity(len(f.x))
        x = [a + v for a, v in zip(of[0].x, f.x)]
        out = self.step(x, slopes, off).of(*of)
        return Ball(x, out.error + self.rounded(1, length(x) + out.radius), out.along)

    def attention(self, balls, at):
        """x + attention(norm(x)) of the first of `balls` over all, and, in place of None, over the
        learned start. Of one it is the value itself, as with a window of 1."""
        c, d, r = self.c, self.head, len(balls)
        there = [b for b in balls if b is not None]
        norms = [self.norm(b, at + ".attn_norm") for b in there]
        normed = iter([norm.of(b) for norm, b in zip(norms, there)])
        y = [Ball(self.t[at + ".attn.start"][0]) if b is None else next(normed) for b in balls]
        qkv, out, scale = at + ".attn.qkv.weight", at + ".attn.out.weight", 1 / arb(d).sqrt()
        x, inner, varies, J = [], [], [], [[] for _ in balls]
        for h in range(c["n_heads"]):
            m = h // self.groups * d
            Q, K, V = ((qkv, range(i, i + d)) for i in (
                h * d, c["n_heads"] * d + m, (c["n_heads"] + c["n_kv_heads"]) * d + m))
            ((q, q_off, q_by),), keys, values = (
                [self.part(b, *key) for b in of] for key, of in ((Q, y[:1]), (K, y), (V, y)))
            k, k_off, k_by = zip(*keys)
            v, v_off, v_by = zip(*values)
            k = [self.turn(a, j) for j, a in enumerate(k)]
            turning = [self.rounded(4, length(a) + by, 3 * r) for a, by in zip(k, k_by)]
            k_off, k_by = ([o + e for o, e in zip(of, turning)] for of in (k_off, k_by))
            big_q, big_k = length(q) + q_by, [length(a) + by for a, by in zip(k, k_by)]
            off = length([scale * (big_q * o + a * q_off) + self.rounded(d, scale * big_q * a)
                          for o, a in zip(k_off, big_k)])
            # slopes of the scores by y_0, without what they have in common, and by y_j
            Wq, Wk, Wv = (self.matrix(*key)[0] for key in (Q, K, V))
            by_first = [arb_mat([a]) * Wq * scale for a in k]
            by_slot = [arb_mat([self.turn(q, -j)]) * Wk * scale for j in range(r)]
            common = sum(by_first[1:], by_first[0]) / r
            moved = [a - common + (by_slot[0] if j == 0 else 0 * common)
                     for j, a in enumerate(by_first)]
            both = length([scale * q_by * b for b in k_by])
            by = both + length([length(a.entries()) * y[0].radius
                                + (length(e.entries()) * b.radius if j else ZERO)
                                for j, (a, e, b) in enumerate(zip(moved, by_slot, y))])
            p, p_off, steep, bent = self.softmax(
                [scale * total(a * b for a, b in zip(q, one)) for one in k], off, by)
            mean = [total(a * b[i] for a, b in zip(p, v)) for i in range(d)]
            big_v = length([length(a) + b for a, b in zip(v, v_by)])
            x += mean
            inner.append((p_off + steep * both + bent * by ** 2 / 2) * big_v
                         + self.rounded(r, big_v) + steep * by * length(v_by) + length(v_off))
            varies.append(steep * by * big_v + length(v_by))
            pull = [arb_mat([[w * (b - e)] for b, e in zip(a, mean)]) for w, a in zip(p, v)]
            slopes = [Wv * w + of * e for w, of, e in zip(p, pull, by_slot)]
            slopes[0] += sum((of * e for of, e in zip(pull[1:], by_first[1:])),
                             pull[0] * by_first[0])
            for rows, slope in zip(J, slopes):
                rows += slope.tolist()
        off = length(inner)
        W, _, _, steep, _ = self.matrix(out)
        f, f_off = self.linear(x, length(varies) + off, out)
        slopes = [W * arb_mat(of) for of, b in zip(J, balls) if b is not None]
        return self.residual(self.step(f, slopes, steep * off + length(f_off)), norms, there)

    def part(self, b, *key):
        """Of some rows of W: W x, its rounding, and how far it varies."""
        x, off = self.linear(b.x, b.radius, *key)
        return x, length(off), self.matrix(*key)[3] * b.radius + length(off)

    def turn(self, x, j):
        """RoPE: the pairs of x by the angles of slot j."""
        out = []
        for i in range(0, len(x), 2):
            angle = j / arb(self.c["rope_theta"]) ** (arb(i) / len(x))
            out += [x[i] * angle.cos() - x[i + 1] * angle.sin(),
                    x[i] * angle.sin() + x[i + 1] * angle.cos()]
        return out

    def feed(self, b, at):
        """x + SwiGLU(norm(x))."""
        norm = self.norm(b, at + ".ffn_norm")
        _, f = self.unit(norm.of(b), (at + ".ffn.gate_up.weight",), (at + ".ffn.down.weight",))
        return self.residual(f, [norm], [b])

    def mixtures(self, b, at="recurrent.block"):
        """x + experts(norm(x)), for each set of experts that may have the highest scores."""
        c, ffn, norm = self.c, at + ".ffn.", self.norm(b, at + ".ffn_norm")
        y, W = norm.of(b), self.t[ffn + "router.weight"]
        self.linear(y.x, y.radius, ffn + "gate_up")      # of all: 0 times what is infinite is not 0
        n, k, wide, r = c["n_experts"], c["n_experts_per_tok"], c["expert_dim"], y.radius
        (z, offs), bias = self.linear(y.x, r, ffn + "router.weight"), self.t[ffn + "router_bias"][0]
        score = [a + v for a, v in zip(z, bias)]
        loose = [a + 4 * self.u * (abs(v) + abs(o) + length(w) * r)
                 for a, v, o, w in zip(offs, bias, z, W)]
        clear = [[score[i] - score[j] > apart(W, i, j) * r + loose[i] + loose[j]
                  for j in range(n)] for i in range(n)]
        by = self.matrix(ffn + "router.weight")[3] * r
        for chosen in combinations(range(n), k):
            if any(clear[j][i] for i in chosen for j in set(range(n)) - set(chosen)):
                continue
            p, off, steep, bent = self.softmax([z[i] for i in chosen], length(offs), by)
            rows = [e * wide + i for e in chosen for i in range(wide)]
            up = ffn + "gate_up", (*rows, *(n * wide + i for i in rows))
            down = ffn + "down", tuple(rows), True
            gates = [w for w in p for _ in range(wide)]
            _, f = self.unit(y, up, down, (gates, steep * by, bent * by ** 2 / 2, off))
            J, x, off = f.J[0], f.x, f.off
            if k > 1:                                    # and by the gates
                h, _ = self.unit(y, up, down)
                mean = [total(w * W[e][m] for w, e in zip(p, chosen)) for m in range(c["dim"])]
                for one, (w, e) in enumerate(zip(p, chosen)):
                    part = arb_mat([[a if i // wide == one else ZERO] for i, a in enumerate(h)])
                    J += self.matrix(*down)[0] * part * w * arb_mat(
                        [[a - v for a, v in zip(W[e], mean)]])
            for i in range(c["n_shared_experts"]):
                _, more = self.unit(y, (f"{ffn}shared.{i}.gate_up.weight",),
                                    (f"{ffn}shared.{i}.down.weight",))
                size = (length(x) + length(J.entries()) * r + off + length(more.x)
                        + more.steep[0] * r + more.off)
                x, J = [a + v for a, v in zip(x, more.x)], J + more.J[0]
                off += more.off + self.rounded(1, size)
            yield self.residual(self.step(x, [J], off), [norm], [b])

    def lead(self, b, name, offsets, chosen):
        """By how many times its bound the chosen score leads each other, at least."""
        W, (z, off) = self.t[name], self.linear(b.x, b.radius, name)
        off = [a + self.rounded(len(b.x), abs(o)) + 4 * self.u * (abs(s) + length(w) * b.radius)
               for a, o, s, w in zip(off, offsets, z, W)]
        return lowest(float(((z[chosen] + offsets[chosen] - a - o)
                             / (apart(W, chosen, i) * b.radius + e + off[chosen])).lower())
                      for i, (a, o, e) in enumerate(zip(z, offsets, off)) if i != chosen)

    def _token(self, token):
        """e, what the prelude makes of a token."""
        b = Ball(self.t["embed.weight"][token])
        for i in range(self.c["prelude_layers"]):
            b = self.feed(self.attention([b], f"prelude.{i}"), f"prelude.{i}")
        return b

    def loop(self, z):
        """The states that the loop makes of z_0, with the others in its slots."""
        x = self.attention(z, "recurrent.block")
        for h in self.mixtures(x if self.c["codes"] else x.shaped()):
            yield self.normed(h, "recurrent.loop_norm") if self.c["loop_norm"] else h

    def arrives(self, z, to):
        """By how many times its bound what the loop makes of z is nearest to a code, at least; or
        how often it fits into a ball."""
        states = list(self.loop(z))
        require(states, "no experts")
        if self.c["codes"]:
            halves = [-total(a * a for a in row) / 2 for row in self.centres]
            return lowest(self.lead(h, "recurrent.codes", halves, to) for h in states)
        return lowest(float((self.radius / (h.radius + length(
            [a - b for a, b in zip(h.x, self.centres[to])]))).lower()) for h in states)

    def behind(self, before, letter):
        """What a strict loop reads: a state and a letter."""
        e = self.tokens(letter + 1)
        x = [a + v for a, v in zip(before.x, e.x)]
        error = before.error + e.error + self.rounded(1, length(x) + before.radius + e.radius)
        return [self.normed(Ball(x, error, before.along), "recurrent.norm")]

    def follows(self, before, letter, to):
        """Of a strict model: the state before and a letter, and the state that they lead to."""
        return self.arrives(self.behind(self.state(before), letter), to)

    def multiplies(self, kind, row, to):
        """Of a dilated one: letters or states, the earliest first, and their product."""
        z = [self.normed(self.tokens(a + 1), "recurrent.norm") if kind == "letters"
             else self.read(a) for a in reversed(row)]
        return self.arrives(z + [None] * (self.c["dilation"] - len(z)), to)

    def answers(self, state, token):
        b = Ball(self.centres[state], self.radius)
        for i in range(self.c["coda_layers"]):
            b = self.feed(self.attention([b], f"coda.{i}"), f"coda.{i}")
        return self.lead(self.normed(b, "norm"), "embed.weight",
                         [ZERO] * len(self.t["embed.weight"]), token)


def apart(W, i, j):
    return length([a - b for a, b in zip(W[i], W[j])])


def read(folder):
    """The model, with the bytes of its weights compared, and the certificate."""
    config, certificate = (json.loads((folder / name).read_text(encoding="utf-8"))
                           for name in ("config.json", "certificate.json"))
    require(certificate["proved"] is True, f"it says: {certificate['reason']}")
    require(certificate["arithmetic"] in ARITHMETIC, f"arithmetic {certificate['arithmetic']!r}: "
            f"must be one of {sorted(ARITHMETIC)}")
    for name, value in MUST_BE.items():
        require(config[name] == value and type(config[name]) is type(value),
                f"config.json: {name} = {config[name]!r}: must be {value}")
    require(config["strict"] != (config["dilation"] > 1), "config.json: strict or dilated")
    require(config["rope_theta"] >= 1, "config.json: rope_theta must be at least 1")
    for name, value in certificate["config"].items():
        require(config[name] == value, f"config.json: {name} is not as in the certificate")
    found, tensors = hashlib.sha256(), {}
    for name, t in sorted(safetensors.deserialize((folder / "model.safetensors").read_bytes())):
        name = "embed.weight" if name == "head.weight" else name
        require(name not in tensors, "the embedding is there twice")
        tensors[name] = t
    for name, t in sorted(tensors.items()):
        found.update(f"{name} {t['dtype']} {list(t['shape'])}\n".encode() + bytes(t["data"]))
    require(found.hexdigest() == certificate["weights"], "the certificate is of other weights")
    (dtype, _, largest), rows = ARITHMETIC[certificate["arithmetic"]], {}
    for name, t in tensors.items():          # the bias of a router is float32 in any model
        require(t["dtype"] == ("F32" if name.endswith("router_bias") else dtype),
                f"{name} is {t['dtype']}: must be {dtype} for {certificate['arithmetic']}")
        width = t["shape"][-1] if t["shape"] else 1
        numbers = memoryview(t["data"]).cast("d" if t["dtype"] == "F64" else "f").tolist()
        require(all(abs(a) < largest for a in numbers), f"{name}: a number may be too large")
        rows[name] = [[arb(a) for a in numbers[i:i + width]] for i in range(0, len(numbers), width)]
    require(len(rows.get("recurrent.codes", ())) == config["codes"], "config.json: other codes")
    n, k = config["n_experts"], config["n_experts_per_tok"]
    require(1 <= k <= n == len(rows["recurrent.block.ffn.router.weight"]),
            "config.json: other experts")
    return Model(config, rows, certificate["arithmetic"], certificate["table"]), certificate


def check(folder, progress=lambda done, of: None):
    """What is proved, in a line. Raises Refused, with the reason."""
    model, certificate = read(Path(folder))
    asked, table = certificate["asked"], certificate["table"]
    states, letters = machine(asked)
    jobs = (strict if model.c["strict"] else dilated)(model, asked, table)
    require(jobs, "there is nothing to look at")
    closest = float("inf")
    for done, (what, lead) in enumerate(jobs, 1):
        clear = lead(model)
        require(clear > 1, f"{what}: leads by {clear:.3g} times its bound, must be above 1")
        closest = min(closest, clear)
        progress(done, len(jobs))
    everywhere = all(answer != -1 for row in asked["answer"] for answer in row)
    about = "" if everywhere else " that is asked about"
    return (f"proved: every string of every length{about} is answered as the "
            f"machine of {states} states and {letters} letters does that is asked "
            f"for, which is called {asked['name']}; {len(jobs)} choices, each at least "
            f"{closest:.3g} times its bound")


def machine(asked):
    """Its states and letters, if it is a whole table."""
    answer, goes = asked["answer"], asked["next_state"]
    states, letters = len(goes), len(goes[0])
    require(states and letters and len(answer) == states
            and all(len(row) == letters for row in [*answer, *goes]), "asked: no whole table")
    require(all(type(x) is int and 0 <= x < states
                for row in [*goes, [asked["start"]]] for x in row)
            and all(type(x) is int and x >= -1 for row in answer for x in row), "asked: no machine")
    require(any(x != -1 for x in answer[asked["start"]]), "asked: nothing")
    return states, letters


def strict(model, asked, table):
    """The choices to be looked at, if the rows are closed and their answers right. States are codes
    or balls."""
    after = {(state, own): goes for state, own, goes in table["rows"]}
    answer, goes = dict(table["answers"]), {}
    require((None, asked["start"]) in after, "the start of a string is missing")
    for (state, own), row in after.items():
        for letter, right in enumerate(asked["answer"][own]):
            if right == -1:
                continue
            new, where = row[letter], f"letter {letter} behind state {state} ({own})"
            require(new in answer and answer[new] == right, f"{where}: is not answered {right}")
            require((new, asked["next_state"][own][letter]) in after, f"{where}: goes nowhere")
            require(goes.setdefault((state, letter), new) == new, f"{where}: goes two ways")
    return [*((f"letter {letter} behind state {state}",
               lambda m, way=(state, letter, new): m.follows(*way))
              for (state, letter), new in goes.items()), *_answers(answer)]


def dilated(model, asked, table):
    """The choices to be looked at, if the products are closed and each means what it should."""
    acts = [[list(move) for move in zip(*columns)] for columns in zip(
        zip(*asked["next_state"]), zip(*asked["answer"]))]       # by letter and state
    meaning, r = dict(table["meaning"]), model.c["dilation"]
    letters, products = ({tuple(row): code for row, code in table[name]}
                         for name in ("letters", "products"))
    require(all(move[1] != -1 for act in acts for move in act), "something is not asked")
    require(len(letters) == len(table["letters"]) and len(products) == len(table["products"]),
            "a product is there twice")

    def go(rows, known, means):
        for row in rows:
            require(row in known, f"the product of {row} is missing")
            act = means[row[0]]
            for a in row[1:]:
                act = [means[a][state] for state, _ in act]
            require(meaning.get(known[row]) == act, f"the product of {row} does not mean it")
        return {known[row] for row in rows}

    of_letters = [list(product(range(len(acts)), repeat=m)) for m in range(1, r + 1)]
    begun = set().union(*(go(rows, letters, acts) for rows in of_letters))
    full, met = {letters[row] for row in of_letters[-1]}, set()
    while (frozenset(full), frozenset(begun)) not in met:
        met.add((frozenset(full), frozenset(begun)))
        for code in begun if model.c["codes"] else ():
            require(products.get((code,)) == code, f"code {code} does not rest")
        longer = go(list(product(full, repeat=r)), products, meaning)
        begun |= set().union(*(go([(c, *row) for c in begun for row in product(full, repeat=m - 1)],
                                  products, meaning) for m in range(1, r + 1)))
        full = longer
    answer = dict(table["answers"])
    for code in begun:
        require(answer.get(code) == meaning[code][asked["start"]][1],
                f"code {code} is not answered {meaning[code][asked['start']][1]}")
    return [*((f"the product of {kind} {row}", lambda m, a=(kind, row, code): m.multiplies(*a))
              for kind, known in (("letters", letters), ("states", products))
              for row, code in known.items()),
            *_answers({code: answer[code] for code in begun})]


def _answers(answer):
    return [(f"the answer behind state {state}", lambda m, a=(state, token): m.answers(*a))
            for state, token in answer.items()]


def options(parser):
    parser.add_argument("folder", metavar="DIR",
                        help="has config.json, model.safetensors and certificate.json")


def run(args):
    def show(done, of):
        if sys.stderr.isatty():
            print(f"\r{done} of {of} choices", end="" if done < of else "\n", file=sys.stderr)

    try:
        print(check(args.folder, show))
    except (Refused, OSError, ValueError, KeyError, TypeError, IndexError, AttributeError,
            ArithmeticError, RecursionError, safetensors.SafetensorError) as error:
        print(f"not proved: {error if isinstance(error, Refused) else repr(error)}")
        return 2
    return 0


if __name__ == "__main__":
    alone = argparse.ArgumentParser(epilog="Exit codes: 0 proved; 2 not proved, or no such folder.")
    options(alone)
    sys.exit(run(alone.parse_args()))
