"""A checker of certificates that trusts nothing of what made them.

    python -m mythos_core.proof.check DIR

reads config.json, model.safetensors and certificate.json, with no module of this package and no
PyTorch, and proves again what the certificate says: by balls of real numbers (Arb, in python-flint)
around the exact value of every context, and a bound of how far rounding may take any machine from
it. docs/certificate.md has the format, the theorems and the bounds. Exit 0: proved; 1: not, and
why.
"""
import hashlib
import json
import sys
from functools import lru_cache
from itertools import combinations, product
from pathlib import Path

import safetensors
from flint import arb, arb_mat

#: By arithmetic: the dtype of the weights, unit roundoff, and the largest number looked at.
ARITHMETIC = {"float32": ("F32", arb(2) ** -24, 1e9), "float64": ("F64", arb(2) ** -53, 1e60)}
FUNCTION, EPS, TINY, ZERO, ONE = 8, arb("1e-6"), arb("1e-32"), arb(0), arb(1)
MUST_BE = {"window": 1, "stride": 1, "carry": False, "rope": False, "attn_type": "gqa"}


class Refused(Exception):
    """Why it is not proved."""


def require(holds, why):
    if not holds:
        raise Refused(why)


def length(x):
    return sum((a * a for a in x), ZERO).sqrt()


def most(x):
    return max((abs(a) for a in x), key=lambda a: float(a.upper()))


def times(x, A):
    return (arb_mat([x]) * A).entries()


class Ball:
    """x exactly. A machine is within error + slope reach of it: x varies with the input of a
    sublayer, known to within `reach`, by `slope`, and that by `bend`; the error is of rounding."""

    def __init__(self, x, error=ZERO, slope=ZERO, bend=ZERO, reach=ZERO):
        self.x, self.error, self.slope, self.bend, self.reach = x, error, slope, bend, reach
        self.radius = error + slope * reach

    def then(self, x, slope, bend, error):
        return Ball(x, slope * self.error + error, slope * self.slope,
                    bend * self.slope ** 2 + slope * self.bend, self.reach)


class Model:
    """The steps of the model, on balls."""

    def __init__(self, config, tensors, arithmetic):
        self.c, self.t = config, tensors
        _, self.u, self.largest = ARITHMETIC[arithmetic]
        self.head, self.groups = (config["dim"] // config["n_heads"],
                                  config["n_heads"] // config["n_kv_heads"])
        self.matrix = lru_cache(None)(self._matrix)
        self.tokens = lru_cache(None)(self._token)
        self.read = lru_cache(None)(lambda code: self.norm(Ball(self.t["recurrent.codes"][code]),
                                                           "recurrent.norm.weight"))

    def _matrix(self, name, begin=None, end=None, flip=False):
        """Rows of a tensor: W^T, |W|^T, bounds of |W| and of the lengths of rows; W itself."""
        W = arb_mat(self.t[name][begin:end])
        W = W.transpose() if flip else W
        power = W.transpose() * W
        for _ in range(3):                       # |W^T W|^8 <= |(W^T W)^8|_F
            power = power * power
        lengths = [length(row) for row in W.tolist()]
        return (W.transpose(), arb_mat([[abs(a) for a in row] for row in W.transpose().tolist()]),
                (length(power.entries()) + TINY ** 9).root(16), lengths, W)

    def rounded(self, n, size, functions=0):
        """Of a sum of n products, in any order, and of functions: gamma_n of all its parts."""
        require(size < self.largest, "a number may be too large")
        n = n + FUNCTION * functions + 4
        return n * self.u / (1 - n * self.u) * size + TINY

    def linear(self, b, *key):
        W, A, steep, lengths, _ = self.matrix(*key)
        size = length(times([abs(a) for a in b.x], A)) + length(lengths) * b.radius
        return b.then(times(b.x, W), steep, ZERO, self.rounded(len(b.x), size))

    def norm(self, b, name):
        w, n, near = self.t[name][0], len(b.x), length(b.x) - b.radius
        scale = (length(b.x) ** 2 / n + EPS).rsqrt()
        least = ((near ** 2 if near > 0 else ZERO) / n + EPS).sqrt()
        x, steep = [a * scale * v for a, v in zip(b.x, w)], most(w) / least
        require(length(b.x) + b.radius < self.largest, "a number may be too large")
        return b.then(x, steep, arb("1.53") * steep / least / arb(n).sqrt(),
                      self.rounded(n, length(x) + steep * b.radius, 2))

    def begin(self, b, name, reach=None):
        return self.norm(Ball(b.x, ZERO, ONE, ZERO, b.radius if reach is None else reach), name)

    def softmax(self, z, error, reach):
        """Weights, and how far they may be off; of one, which is 1, they are not."""
        e, r = [(a - z[0]).exp() for a in z], error + reach
        p = [a / sum(e, ZERO) for a in e]
        spread = most([a - v for a in z for v in z]) + 2 * r
        off = error / 2 + self.rounded(len(z), (spread + 1) * (1 + r), 2) * len(z)
        return p, off if len(z) > 1 else ZERO

    def glu(self, b, up, gates=None):
        """silu(gate) up, by a matrix of both; and of its channels' rows by the input the Jacobian.
        `gates` weigh channels: (weights, how far off they may be, slope, bend)."""
        c = self.linear(b, *up)
        half, r = len(c.x) // 2, c.radius
        gate, upper = c.x[:half], c.x[half:]
        sigma = [1 / (1 + (-a).exp()) for a in gate]
        silu, bent = ([a * s for a, s in zip(gate, sigma)],
                      [s * (1 + a * (1 - s)) for a, s in zip(gate, sigma)])
        slope = most([((abs(d) + r / 2) * (abs(v) + r)) ** 2 + (abs(a) + arb("1.1") * r) ** 2
                      for d, v, a in zip(bent, upper, silu)]).sqrt()
        x, bend = [a * v for a, v in zip(silu, upper)], (most(upper) + r) / 2 + arb("1.1")
        h = c.then(x, slope, bend, self.rounded(2, length(x) + slope * r, 2))
        weight = [ONE] * half
        if gates is not None:
            weight, off, g_slope, g_bend = gates
            high, big = most(weight) + off + g_slope * h.reach, length(h.x) + h.radius
            h = Ball([a * v for a, v in zip(h.x, weight)],
                     high * h.error + big * off + self.rounded(1, high * big),
                     high * h.slope + big * g_slope,
                     high * h.bend + 2 * g_slope * h.slope + big * g_bend, h.reach)
        rows = self.matrix(*up)[4].tolist()
        return h, arb_mat([[w * (d * v * s + a * t) for s, t in zip(rows[i], rows[half + i])]
                           for i, (w, d, v, a) in enumerate(zip(weight, bent, upper, silu))])

    def residual(self, f, slopes, of, name):
        """of_0 + f(of): by |I + Df| at the centre, and half the bend times reach^2."""
        error, w, n = f.error + f.bend * f.reach ** 2 / 2, self.t[name][0], len(f.x)
        for i, (J, b) in enumerate(zip(slopes, of)):
            scale = (length(b.x) ** 2 / n + EPS).rsqrt()
            unit, J = [a * scale for a in b.x], [[a * v * scale for a, v in zip(row, w)]
                                                 for row in J.tolist()]
            along = [sum((a * v for a, v in zip(row, unit)), ZERO) / n for row in J]
            A = [a - k * v + (1 if i == 0 and j == m else 0)
                 for j, (row, k) in enumerate(zip(J, along))
                 for m, (a, v) in enumerate(zip(row, unit))]
            error = error + length(A) * b.radius
        x = [a + v for a, v in zip(of[0].x, f.x)]
        return Ball(x, error + self.rounded(1, length(x) + error))

    def attention(self, balls, at):
        """x + attention(norm(x)) of the first of `balls` over all, and, in place of None, over the
        learned start. Of one it is the value itself, as with a window of 1."""
        c, d, name, r = self.c, self.head, at + ".attn_norm.weight", len(balls)
        there = [b for b in balls if b is not None]
        reach, scale = length([b.radius for b in there]), 1 / arb(d).sqrt()
        inner = [self.begin(b, name, reach) if b is not None else
                 Ball(self.t[at + ".attn.start"][0], ZERO, ZERO, ZERO, reach) for b in balls]
        qkv, keys_at, values_at = (at + ".attn.qkv.weight", c["n_heads"] * d,
                                   (c["n_heads"] + c["n_kv_heads"]) * d)
        q = self.linear(inner[0], qkv, 0, keys_at)
        k = [self.linear(b, qkv, keys_at, values_at) for b in inner]
        v = [self.linear(b, qkv, values_at, None) for b in inner]
        # angles are rounded, and their functions
        k_off = [b.error + self.rounded(4, length(b.x) + b.radius, 4 + r) for b in k]
        x, off, slope, bend, J = [], [], [], [], [[] for _ in balls]
        for h in range(c["n_heads"]):
            m = h // self.groups * d
            Wq, Wk, Wv = (arb_mat(self.t[qkv][begin:begin + d])
                          for begin in (h * d, keys_at + m, values_at + m))
            qh, vh = q.x[h * d:h * d + d], [b.x[m:m + d] for b in v]
            kh = [self.turn(b.x[m:m + d], j) for j, b in enumerate(k)]
            big_q, big_k = length(qh) + q.radius, [length(b.x[m:m + d]) + b.radius for b in k]
            z_slope = length([scale * (big_q * b.slope + y * q.slope) for b, y in zip(k, big_k)])
            z_bend = length([scale * (2 * q.slope * b.slope + big_q * b.bend + y * q.bend)
                             for b, y in zip(k, big_k)])
            z_off = length([scale * (big_q * e + y * q.error) + self.rounded(d, scale * big_q * y)
                            for e, y in zip(k_off, big_k)])
            p, p_off = self.softmax([scale * sum((a * w for a, w in zip(qh, y)), ZERO)
                                     for y in kh], z_off, z_slope * reach)
            mean = [sum((a * y[i] for a, y in zip(p, vh)), ZERO) for i in range(d)]
            big_v = length([length(y) + b.radius for y, b in zip(vh, v)])
            x += mean
            off.append(p_off * big_v + self.rounded(r, big_v))
            varies = z_slope if r > 1 else ZERO          # of one the weight is 1
            slope.append(varies / 2 * big_v)
            bend.append((varies * z_slope + (z_bend / 2 if r > 1 else 0)) * big_v
                        + varies * most(b.slope for b in v))
            query = arb_mat(d, c["dim"])
            for j, y in enumerate(vh):                   # of the mixed value by each slot's input
                pull = arb_mat([[scale * p[j] * (a - b)] for a, b in zip(y, mean)])
                J[j] += (Wv * p[j] + pull * (arb_mat([self.turn(qh, -j)]) * Wk)).tolist()
                query += pull * (arb_mat([kh[j]]) * Wq)
            J[0][-d:] = (arb_mat(J[0][-d:]) + query).tolist()
        wide, out = arb(self.groups).sqrt(), at + ".attn.out.weight"
        mixed = Ball(x, length(off) + wide * length([b.error for b in v]),
                     length(slope) + wide * most(b.slope for b in v),
                     length(bend) + wide * most(b.bend for b in v), reach)
        slopes = [self.matrix(out)[4] * arb_mat(of) for of, b in zip(J, balls) if b is not None]
        return self.residual(self.linear(mixed, out), slopes, there, name)

    def turn(self, x, j):
        """RoPE: the pairs of x by the angles of slot j."""
        out = []
        for i in range(0, len(x), 2):
            angle = j / arb(self.c["rope_theta"]) ** (arb(i) / len(x))
            out += [x[i] * angle.cos() - x[i + 1] * angle.sin(),
                    x[i] * angle.sin() + x[i + 1] * angle.cos()]
        return out

    def swiglu(self, b, up, down):
        h, J = self.glu(b, (up,))
        return self.linear(h, down), self.matrix(down)[4] * J

    def feed(self, b, at):
        """x + SwiGLU(norm(x))."""
        f, J = self.swiglu(self.begin(b, at + ".ffn_norm.weight"), at + ".ffn.gate_up.weight",
                           at + ".ffn.down.weight")
        return self.residual(f, [J], [b], at + ".ffn_norm.weight")

    def mixtures(self, b, at="recurrent.block"):
        """x + experts(norm(x)), for each set of experts that may have the highest scores."""
        c, ffn, name = self.c, at + ".ffn.", at + ".ffn_norm.weight"
        n, k, wide = c["n_experts"], c["n_experts_per_tok"], c["expert_dim"]
        y, W = self.begin(b, name), self.t[ffn + "router.weight"]
        bias, steep = self.t[ffn + "router_bias"][0], self.matrix(ffn + "router.weight")[2]
        z, offs = self.scores(y, W)
        offs_b = [a + 4 * self.u * (abs(b) + abs(v)) for a, b, v in zip(offs, bias, z)]
        clear = [[z[i] + bias[i] - z[j] - bias[j] > self.apart(W, i, j) * y.radius
                  + offs_b[i] + offs_b[j] for j in range(n)] for i in range(n)]
        for chosen in combinations(range(n), k):
            if any(clear[j][i] for i in chosen for j in set(range(n)) - set(chosen)):
                continue
            few = steep * (k > 1)
            g, off = self.softmax([z[i] for i in chosen], few * y.error + length(offs),
                                  few * y.slope * y.reach)
            at_z = dict(zip(chosen, g))
            gates = [at_z.get(e, ZERO) for e in range(n) for _ in range(wide)]
            h, J = self.glu(y, (ffn + "gate_up",), (gates, off, few * y.slope / 2,
                                                    few ** 2 * y.slope ** 2 + few * y.bend / 2))
            down = (ffn + "down", None, None, True)
            f, D = self.linear(h, *down), self.matrix(*down)[4] * J
            mean = [sum((at_z[e] * W[e][m] for e in chosen), ZERO) for m in range(c["dim"])]
            for e in chosen if k > 1 else ():            # and by the gates
                part = [a if i // wide == e else ZERO for i, a in enumerate(h.x)]
                D += arb_mat([[a] for a in times(part, self.matrix(*down)[0])]) * arb_mat(
                    [[a - v for a, v in zip(W[e], mean)]])
            for i in range(c["n_shared_experts"]):
                more, by = self.swiglu(y, f"{ffn}shared.{i}.gate_up.weight",
                                       f"{ffn}shared.{i}.down.weight")
                size = length(f.x) + f.radius + length(more.x) + more.radius
                f, D = Ball([a + v for a, v in zip(f.x, more.x)], f.error + more.error
                            + self.rounded(1, size), f.slope + more.slope, f.bend + more.bend,
                            f.reach), D + by
            yield self.residual(f, [D], [b], name)

    def scores(self, b, W):
        """W x, and the rounding of each."""
        return ([sum((a * v for a, v in zip(row, b.x)), ZERO) for row in W],
                [self.rounded(len(row), sum((abs(a * v) for a, v in zip(row, b.x)), ZERO)
                              + length(row) * b.radius) for row in W])

    def apart(self, W, i, j):
        return length([a - b for a, b in zip(W[i], W[j])])

    def lead(self, b, W, offsets, chosen):
        """By how many times its bound the chosen score leads each other, at least."""
        z, off = self.scores(b, W)
        off = [a + self.rounded(len(W[0]), abs(o)) + 4 * self.u * abs(s)
               for a, o, s in zip(off, offsets, z)]
        return min((float(((z[chosen] + offsets[chosen] - a - o) / (self.apart(W, chosen, i)
                    * b.radius + e + off[chosen])).lower())
                    for i, (a, o, e) in enumerate(zip(z, offsets, off)) if i != chosen),
                   default=float("inf"))

    def _token(self, token):
        """e, what the prelude makes of a token."""
        b = Ball(self.t["embed.weight"][token])
        for i in range(self.c["prelude_layers"]):
            b = self.feed(self.attention([b], f"prelude.{i}"), f"prelude.{i}")
        return b

    def state(self, z, code):
        """How clearly the loop goes from z, with what is in its other slots, to a code."""
        codes = self.t["recurrent.codes"]
        halves = [-sum((a * a for a in row), ZERO) / 2 for row in codes]
        out = [self.norm(h, "recurrent.loop_norm.weight") if self.c["loop_norm"] else h
               for h in self.mixtures(self.attention(z, "recurrent.block"))]
        return min(self.lead(h, codes, halves, code) for h in out)

    def follows(self, before, letter, code):
        """Of a strict model: the code before, or None, and a letter."""
        e, zero = self.tokens(letter + 1), [ZERO] * self.c["dim"]
        before = zero if before is None else self.t["recurrent.codes"][before]
        x = [a + v for a, v in zip(before, e.x)]
        h = Ball(x, e.error + self.rounded(1, length(x) + e.radius))
        return self.state([self.norm(h, "recurrent.norm.weight")], code)

    def multiplies(self, row, code, letters):
        """Of a dilated one: letters or codes, the earliest first."""
        z = [self.norm(self.tokens(a + 1), "recurrent.norm.weight") if letters else self.read(a)
             for a in reversed(row)]
        return self.state(z + [None] * (self.c["dilation"] - len(z)), code)

    def answers(self, code, token):
        b = Ball(self.t["recurrent.codes"][code])
        for i in range(self.c["coda_layers"]):
            b = self.feed(self.attention([b], f"coda.{i}"), f"coda.{i}")
        W = self.t["embed.weight"]
        return self.lead(self.norm(b, "norm.weight"), W, [ZERO] * len(W), token)


def read(folder):
    """The model, with the bytes of its weights compared, and the certificate."""
    config, certificate = (json.loads((folder / name).read_text(encoding="utf-8"))
                           for name in ("config.json", "certificate.json"))
    require(certificate["proved"] is True, f"it says: {certificate['reason']}")
    require(certificate["arithmetic"] in ARITHMETIC, f"arithmetic {certificate['arithmetic']!r}: "
            f"must be one of {sorted(ARITHMETIC)}")
    for name, value in MUST_BE.items():
        require(config[name] == value, f"config.json: {name} = {config[name]!r}: must be {value}")
    require(config["strict"] != (config["dilation"] > 1), "config.json: strict or dilated")
    found, tensors = hashlib.sha256(), {}
    for name, t in sorted(safetensors.deserialize((folder / "model.safetensors").read_bytes())):
        name = "embed.weight" if name == "head.weight" else name
        tensors[name] = t
    for name, t in sorted(tensors.items()):
        found.update(f"{name} {t['dtype']} {list(t['shape'])}\n".encode() + bytes(t["data"]))
    require(found.hexdigest() == certificate["weights"], "the certificate is of other weights")
    dtype, rows = ARITHMETIC[certificate["arithmetic"]][0], {}
    for name, t in tensors.items():          # the bias of a router is float32 in any model
        require(t["dtype"] == ("F32" if name.endswith("router_bias") else dtype),
                f"{name} is {t['dtype']}: must be {dtype} for {certificate['arithmetic']}")
        width = t["shape"][-1] if t["shape"] else 1
        numbers = memoryview(t["data"]).cast("d" if t["dtype"] == "F64" else "f").tolist()
        rows[name] = [[arb(a) for a in numbers[i:i + width]] for i in range(0, len(numbers), width)]
    return Model(config, rows, certificate["arithmetic"]), certificate


def check(folder, progress=lambda done, of: None):
    """What is proved, in a line. Raises Refused, with the reason."""
    model, certificate = read(Path(folder))
    asked, table = certificate["asked"], certificate["table"]
    jobs = (strict if model.c["strict"] else dilated)(model.c, asked, table)
    least = float("inf")
    for done, (what, lead) in enumerate(jobs, 1):
        clear = lead(model)
        require(clear > 1, f"{what}: leads by {clear:.3g} times its bound, must be above 1")
        least = min(least, clear)
        progress(done, len(jobs))
    return (f"proved: every string of every length is answered as {asked['name']} does; "
            f"{len(jobs)} choices, each at least {least:.3g} times its bound")


def strict(config, asked, table):
    """The choices to be looked at, if the rows are closed and their answers right."""
    after = {(code, state): codes for code, state, codes in table["rows"]}
    answer = dict(table["answers"])
    require((None, asked["start"]) in after, "the start of a string is missing")
    for (code, state), codes in after.items():
        for letter, right in enumerate(asked["answer"][state]):
            if right == -1:
                continue
            new, where = codes[letter], f"letter {letter} behind code {code}, state {state}"
            require(new in answer and answer[new] == right, f"{where}: is not answered {right}")
            require((new, asked["next_state"][state][letter]) in after, f"{where}: goes nowhere")
    goes = {(code, letter): new for (code, _), codes in after.items()
            for letter, new in enumerate(codes) if new is not None}
    require(all(goes[code, letter] == new for (code, _), codes in after.items()
                for letter, new in enumerate(codes) if new is not None), "a code goes two ways")
    return [*((f"letter {letter} behind code {code}", lambda m, a=code, b=letter, to=new:
               m.follows(a, b, to)) for (code, letter), new in goes.items()), *_answers(answer)]


def dilated(config, asked, table):
    """The choices to be looked at, if the products are closed and each means what it should."""
    acts = [[list(move) for move in zip(*columns)] for columns in zip(
        zip(*asked["next_state"]), zip(*asked["answer"]))]       # by letter and state
    meaning, r = dict(table["meaning"]), config["dilation"]
    letters, products = ({tuple(row): code for row, code in table[name]}
                         for name in ("letters", "products"))
    require(all(move[1] != -1 for act in acts for move in act), "something is not asked")

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
        for code in begun:
            require(products.get((code,)) == code, f"code {code} does not rest")
        longer = go(list(product(full, repeat=r)), products, meaning)
        begun |= set().union(*(go([(c, *row) for c in begun for row in product(full, repeat=m - 1)],
                                  products, meaning) for m in range(2, r + 1)))
        full = longer
    answer = dict(table["answers"])
    for code in begun:
        require(answer.get(code) == meaning[code][asked["start"]][1],
                f"code {code} is not answered {meaning[code][asked['start']][1]}")
    return [*((f"the product of {name[:-1]}s {row}", lambda m, a=row, to=code, of=name:
               m.multiplies(a, to, of == "letters")) for name, known in
              (("letters", letters), ("products", products)) for row, code in known.items()),
            *_answers({code: answer[code] for code in begun})]


def _answers(answer):
    return [(f"the answer behind code {code}", lambda m, a=code, to=token: m.answers(a, to))
            for code, token in answer.items()]


def main(argv):
    def show(done, of):
        if sys.stderr.isatty():
            print(f"\r{done} of {of} choices", end="" if done < of else "\n", file=sys.stderr)

    try:
        if len(argv) != 1:
            raise Refused("usage: python -m mythos_core.proof.check DIR")
        print(check(argv[0], show))
    except (Refused, OSError, ValueError, KeyError, TypeError, IndexError, AttributeError,
            ZeroDivisionError, safetensors.SafetensorError) as error:
        print(f"not proved: {error if isinstance(error, Refused) else repr(error)}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
