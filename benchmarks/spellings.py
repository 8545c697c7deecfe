"""Every program of the zoo, and random ones, in every spelling, under every composite.

    python benchmarks/spellings.py                              # the zoo
    python benchmarks/spellings.py --generated 1000 --seed 0    # random programs
    python benchmarks/spellings.py --residues 1-6               # a quarter of the zoo's
    python benchmarks/spellings.py --report                     # what was found

A line of JSON for each program goes to --out. A run that was stopped goes on where it
was; delete the file to begin again. Several may run at once, each with its own --share,
such as 0/4. With --residues each pair of program and rewriting is checked under one
composite only, and of the pairs those whose hash modulo 24 is one of these. Random
programs are the same for the same number: to see one again, `--generated 1 --seed N`.
"""

import argparse
import functools
import json
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jlrp
from jlrp import testing

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import zoo  # noqa: E402

COMPOSITES = {**zoo.COMPOSITES, "gradient_input": "gradient_input"}


# Random programs: layers on (batch, places, features), then a head.


class Generator:
    """A program of so many layers; the same for the same seed."""

    def __init__(self, seed):
        self.wide, self.wider = seed >= WIDE, seed >= WIDER
        self.random = np.random.default_rng(seed)
        self.params = []

    def pick(self, choices):
        return choices[self.random.integers(len(choices))]

    def weights(self, *shape, positive=False):
        """The number of a parameter, which the layer reads at run time."""
        drawn = self.random.normal(size=shape) * 0.7
        drawn = np.abs(drawn) + 0.3 if positive else drawn
        self.params.append(jnp.asarray(drawn))
        return len(self.params) - 1

    def activation(self):
        return self.pick(ACTIVATIONS)

    def dense(self, width, out=None):
        w, b = self.weights(width, out or width), self.weights(out or width)
        form = self.pick(["plain", "einsum", "no bias", "literal", "subtracted"])

        def layer(p, h):
            if form == "einsum":
                return jnp.einsum("bni,io->bno", h, p[w]) + p[b]
            if form == "no bias":
                return h @ p[w]
            if form == "literal":
                return h @ p[w] + 0.25
            if form == "subtracted":
                return h @ p[w] - p[b]
            return h @ p[w] + p[b]

        return layer

    def norm(self, width):
        gain, form = self.weights(width, positive=True), self.pick([0, 1, 2])

        def layer(p, h):
            if form == 0:
                return h * lax.rsqrt((h * h).mean(-1, keepdims=True) + 1e-2) * p[gain]
            d = h - h.mean(-1, keepdims=True)
            if form == 1:
                return d / jnp.sqrt((d**2).mean(-1, keepdims=True) + 1e-2) * p[gain]
            return d * (p[gain] / jnp.sqrt(h.var(-1, keepdims=True) + 1e-2))

        return layer

    def softmax(self, width):
        sharp = self.pick([1.0, 0.5])

        def layer(p, h):
            e = jnp.exp(h * sharp)
            return e / e.sum(-1, keepdims=True) * width

        return self.pick([layer, lambda p, h: jax.nn.softmax(h * sharp) * width])

    def attention(self, width):
        q, k, v = (self.weights(width, width) for _ in "qkv")
        masked, late = self.pick([True, False]), self.pick([True, False])

        def layer(p, h):
            s = (h @ p[q]) @ (h @ p[k]).swapaxes(-1, -2) / width**0.5
            if masked:
                rows, columns = (lax.broadcasted_iota(int, s.shape, a) for a in (1, 2))
                s = jnp.where(columns <= rows, s, -jnp.inf)
            if late:
                e = jnp.exp(s)
                return (e @ (h @ p[v])) / e.sum(-1, keepdims=True)
            return jax.nn.softmax(s) @ (h @ p[v])

        return layer

    def gate(self, width):
        main, gate = self.dense(width), self.dense(width)
        f = self.pick([jax.nn.sigmoid, jax.nn.silu, jnp.tanh, lambda v: v])
        return lambda p, h: main(p, h) * f(gate(p, h))

    def concatenation(self, width):
        half = width // 2
        parts = self.dense(width, half), self.dense(width, width - half)
        return lambda p, h: jnp.concatenate([part(p, h) for part in parts], -1)

    def residual(self, width):
        inner = self.layer(width)
        return lambda p, h: h + inner(p, h)

    def scan(self, width):
        w, b, f = self.weights(2, width, width), self.weights(2, width), jnp.tanh

        def layer(p, h):
            step = lambda h, wb: (f(h @ wb[0] + wb[1]), None)  # noqa: E731
            return lax.scan(step, h, (p[w], p[b]))[0]

        return layer

    def mixing(self, width):
        """Along the places."""
        w = self.weights(PLACES, PLACES)
        return lambda p, h: (h.swapaxes(1, 2) @ p[w]).swapaxes(1, 2)

    def heads(self, width):
        """Attention in two heads, by einsum or by reshapes."""
        q, k, v, o = (self.weights(width, width) for _ in "qkvo")
        by_einsum = self.pick([True, False])

        def split(h):
            return h.reshape(*h.shape[:2], 2, width // 2)

        def layer(p, h):
            a, b, c = (split(h @ p[w]) for w in (q, k, v))
            if by_einsum:
                s = jnp.einsum("bnhd,bmhd->bhnm", a, b) / (width / 2) ** 0.5
                out = jnp.einsum("bhnm,bmhd->bnhd", jax.nn.softmax(s), c)
            else:
                a, b, c = (t.transpose(0, 2, 1, 3) for t in (a, b, c))
                s = a @ b.transpose(0, 1, 3, 2) * (2 / width) ** 0.5
                out = (jax.nn.softmax(s) @ c).transpose(0, 2, 1, 3)
            return out.reshape(h.shape) @ p[o]

        return layer

    def conv(self, width):
        """Along the places: plain, or of each feature by itself."""
        groups = self.pick([1, width])
        w, b = self.weights(3, width // groups, width), self.weights(width)

        def layer(p, h):
            numbers = ("NHC", "HIO", "NHC")
            y = lax.conv_general_dilated(
                *(h, p[w], (1,), "SAME"),
                dimension_numbers=numbers,
                feature_group_count=groups,
            )
            return y + p[b]

        return layer

    def batch_norm(self, width):
        gain, var = (self.weights(width, positive=True) for _ in "gv")
        bias, mean = self.weights(width), self.weights(width)
        dense, form = self.dense(width), self.pick([0, 1, 2])

        def layer(p, h):
            h = dense(p, h)
            if form == 0:
                return (h - p[mean]) / jnp.sqrt(p[var] + 1e-3) * p[gain] + p[bias]
            scale = p[gain] * lax.rsqrt(p[var] + 1e-3)
            if form == 1:
                return h * scale + (p[bias] - p[mean] * scale)
            return (h - p[mean]) * scale + p[bias]

        return layer

    def pool(self, width):
        """Over a place and its neighbours."""
        window, pads = (1, 3, 1), ((0, 0), (1, 1), (0, 0))

        def mean(p, h):
            return lax.reduce_window(h, 0.0, lax.add, window, (1, 1, 1), pads) / 3

        def largest(p, h):
            return lax.reduce_window(h, -jnp.inf, lax.max, window, (1, 1, 1), pads)

        return self.pick([mean, largest])

    def swiglu(self, width):
        main, gate = (self.dense(width, 2 * width) for _ in "mg")
        down = self.weights(2 * width, width)
        return lambda p, h: (jax.nn.silu(gate(p, h)) * main(p, h)) @ p[down]

    def excitation(self, width):
        inner, outer = self.dense(width, 3), self.dense(3, width)

        def layer(p, h):
            pooled = h.mean(1, keepdims=True)
            return h * jax.nn.sigmoid(outer(p, jax.nn.relu(inner(p, pooled))))

        return layer

    def recurrence(self, width):
        """Along the places, by a scan or unrolled."""
        gate, value = self.dense(width), self.dense(width)
        unrolled = self.pick([True, False])

        def layer(p, h):
            z, v = jax.nn.sigmoid(gate(p, h)), jnp.tanh(value(p, h))

            def step(c, zv):
                c = zv[0] * c + (1 - zv[0]) * zv[1]
                return c, c

            rows = z.swapaxes(0, 1), v.swapaxes(0, 1)
            start = jnp.zeros_like(h[:, 0])
            if not unrolled:
                return lax.scan(step, start, rows)[1].swapaxes(0, 1)
            found = []
            for i in range(PLACES):
                start, _ = step(start, (rows[0][i], rows[1][i]))
                found.append(start)
            return jnp.stack(found, 1)

        return layer

    # From seed WIDER on.

    def low_rank(self, width):
        down, up = self.weights(width, 2), self.weights(2, width)
        first = self.pick([True, False])
        return lambda p, h: (h @ p[down]) @ p[up] if first else h @ (p[down] @ p[up])

    def weight_norm(self, width):
        w, gain = self.weights(width, width), self.weights(width, positive=True)

        def layer(p, h):
            return h @ (p[w] / jnp.sqrt((p[w] ** 2).sum(0, keepdims=True)) * p[gain])

        return layer

    def clipped(self, width):
        dense = self.dense(width)
        f = self.pick(
            [jax.nn.relu6, lambda v: jnp.clip(v, -0.8, 1.3), jax.nn.hard_tanh]
        )
        return lambda p, h: f(dense(p, h))

    def group_norm(self, width):
        gain, bias = self.weights(width, positive=True), self.weights(width)

        def layer(p, h):
            g = h.reshape(*h.shape[:2], 2, width // 2)
            d = g - g.mean((1, 3), keepdims=True)
            d = d * lax.rsqrt(g.var((1, 3), keepdims=True) + 1e-2)
            return d.reshape(h.shape) * p[gain] + p[bias]

        return layer

    def unit_length(self, width):
        eps = self.pick([1e-2, 1e-1])
        form = self.pick([True, False])

        def layer(p, h):
            if form:
                return h / jnp.sqrt((h * h).sum(-1, keepdims=True) + eps)
            return h / (jnp.linalg.norm(h, axis=-1, keepdims=True) + eps)

        return layer

    def running_mean(self, width):
        counts = jnp.arange(1.0, PLACES + 1)[None, :, None]
        dense = self.dense(width)
        return lambda p, h: jnp.cumsum(dense(p, h), 1) / counts

    def rotary(self, width):
        q, k = self.dense(width), self.dense(width)
        angle = jnp.arange(PLACES)[:, None] * 0.3 ** jnp.arange(width // 2)
        cos, sin = jnp.cos(angle), jnp.sin(angle)

        def turned(v):
            a, b = jnp.split(v, 2, -1)
            return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

        def layer(p, h):
            s = turned(q(p, h)) @ turned(k(p, h)).swapaxes(1, 2) / width**0.5
            return jax.nn.softmax(s) @ h

        return layer

    def token_shift(self, width):
        mix, dense = self.weights(width), self.dense(width)
        rolled = self.pick([True, False])

        def layer(p, h):
            before = jnp.pad(h, ((0, 0), (1, 0), (0, 0)))[:, :-1]
            before = jnp.roll(h, 1, 1) if rolled else before
            return dense(p, h * p[mix] + before * (1 - p[mix]))

        return layer

    def experts(self, width):
        router, w = self.weights(width, 3), self.weights(3, width, width)
        f = self.pick([jnp.tanh, jax.nn.gelu])

        def layer(p, h):
            gates = jax.nn.softmax(h @ p[router])
            return jnp.einsum(
                "bne,bneo->bno", gates, f(jnp.einsum("bni,eio->bneo", h, p[w]))
            )

        return layer

    def maxout(self, width):
        dense = self.dense(width, 2 * width)
        return lambda p, h: dense(p, h).reshape(*h.shape, 2).max(-1)

    def less_the_largest(self, width):
        axis = self.pick([1, 2])
        return lambda p, h: h - h.max(axis, keepdims=True)

    def up_and_down(self, width):
        dense = self.dense(width)

        def layer(p, h):
            up = dense(p, jnp.repeat(h, 2, axis=1))
            return up.reshape(h.shape[0], PLACES, 2, width).mean(2)

        return layer

    def biased_attention(self, width):
        """With a bias by distance, and one key and value for all."""
        q, k, v = (self.weights(width, width) for _ in "qkv")
        bias = self.weights(2 * PLACES - 1)
        learned = self.pick([True, False])
        i = jnp.arange(PLACES)
        apart = i[:, None] - i

        def layer(p, h):
            s = jnp.einsum("bni,bmi->bnm", h @ p[q], h @ p[k]) / width**0.5
            s = s + (p[bias][apart + PLACES - 1] if learned else -0.5 * jnp.abs(apart))
            return jnp.einsum("bnm,bmi->bni", jax.nn.softmax(s), h @ p[v])

        return layer

    def linear_attention(self, width):
        q, k, v = (self.weights(width, width) for _ in "qkv")
        f = self.pick([lambda a: jax.nn.elu(a) + 1, jnp.exp, jax.nn.softplus])

        def layer(p, h):
            a, b = f(h @ p[q]), f(h @ p[k])
            state = jnp.einsum("bmi,bmo->bio", b, h @ p[v])
            total = jnp.einsum("bni,bi->bn", a, b.sum(1))
            return jnp.einsum("bni,bio->bno", a, state) / total[..., None]

        return layer

    def glu(self, width):
        dense, f = (
            self.dense(width, 2 * width),
            self.pick([jax.nn.sigmoid, jax.nn.gelu]),
        )

        def layer(p, h):
            a, b = jnp.split(dense(p, h), 2, -1)
            return a * f(b)

        return layer

    def lstm(self, width):
        w, u = (self.weights(width, 4 * width) for _ in "wu")
        b = self.weights(4 * width)

        def layer(p, h):
            def step(carry, x):
                c, y = carry
                i, f, g, o = jnp.split(x @ p[w] + y @ p[u] + p[b], 4, -1)
                c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
                y = jax.nn.sigmoid(o) * jnp.tanh(c)
                return (c, y), y

            start = jnp.zeros_like(h[:, 0])
            return lax.scan(step, (start, start), h.swapaxes(0, 1))[1].swapaxes(0, 1)

        return layer

    def polynomial(self, width):
        dense = self.dense(width)
        f = self.pick(
            [lambda v: v**3 - 0.5 * v**2, lambda v: v * v, lambda v: v + v**2]
        )
        return lambda p, h: f(dense(p, h))

    def masked(self, width):
        dense = self.dense(width)
        kept = jnp.asarray(self.random.random((PLACES, width)) < 0.7)
        return lambda p, h: jnp.where(kept, dense(p, h), 0.0)

    def block(self, width):
        """Attention and a layer beside it, each on a norm, scaled, and the sum."""
        parts = self.pick(["attention", "heads"]), self.pick(["swiglu", "glu", "gate"])
        first, second = (getattr(self, part)(width) for part in parts)
        norm, scale = self.norm(width), self.weights(width)
        beside = self.pick([True, False])

        def layer(p, h):
            if beside:
                return h + p[scale] * (first(p, norm(p, h)) + second(p, norm(p, h)))
            h = h + first(p, norm(p, h))
            return h + second(p, norm(p, h))

        return layer

    def bilinear(self, width):
        w = self.weights(width, width, width)
        return lambda p, h: jnp.einsum("bni,ijo,bnj->bno", h, p[w], h) * 0.3

    def changes(self, width):
        """From place to place."""
        dense = self.dense(width)

        def layer(p, h):
            h = dense(p, h)
            return jnp.concatenate([h[:, :1], h[:, 1:] - h[:, :-1]], 1)

        return layer

    def log_sum(self, width):
        return self.pick(
            [
                lambda p, h: h - jax.nn.logsumexp(h, -1, keepdims=True),
                lambda p, h: jax.nn.log_softmax(h, 1),
                lambda p, h: h + jnp.log(1 + jnp.exp(-h)),
            ]
        )

    def layer(self, width):
        kinds = ["dense", "activation", "norm", "softmax", "attention", "gate"]
        kinds += ["dense", "activation", "concatenation", "residual", "scan", "mixing"]
        if self.wide:
            kinds += ["heads", "conv", "batch_norm", "pool", "swiglu", "excitation"]
            kinds += ["recurrence"]
        kinds += WIDER_KINDS if self.wider else []
        kind = self.pick(kinds)
        if kind == "activation":
            f, dense = self.activation(), self.dense(width)
            return lambda p, h: f(dense(p, h))
        return getattr(self, kind)(width)


ACTIVATIONS = [
    jax.nn.relu,
    jax.nn.gelu,
    functools.partial(jax.nn.gelu, approximate=False),
    jax.nn.silu,
    jax.nn.softplus,
    jax.nn.elu,
    jax.nn.leaky_relu,
    jnp.tanh,
    lambda h: h / (1 + jnp.exp(-h)),
    lambda h: jnp.where(h > 0, h, 0.1 * h),
    lambda h: 0.5 * h * (1 + jnp.tanh(0.8 * (h + 0.04 * h**3))),
    lambda h: jnp.maximum(h, 0.0) ** 2,
    lambda h: h / (1 + jnp.abs(h)),
    lambda h: (h + jnp.sqrt(h * h + 1)) / 2,
]
PLACES = 3
WIDE, WIDER = 5000, 100_000  # from these seeds on, programs have more kinds of layers
WIDER_KINDS = [
    *("low_rank", "weight_norm", "clipped", "group_norm", "unit_length", "rotary"),
    *("running_mean", "token_shift", "experts", "maxout", "less_the_largest", "lstm"),
    *("up_and_down", "biased_attention", "linear_attention", "glu", "polynomial"),
    *("masked", "block", "bilinear", "changes", "log_sum"),
]
RESIDUES = 24


def generated(seed):
    """A random program, at the first random point that is away from kinks."""
    generator = Generator(seed)
    width = generator.pick([4, 6])
    layers = [generator.layer(width) for _ in range(generator.pick([1, 2, 3, 4]))]
    head = generator.weights(width, 3)
    pool = generator.pick([lambda h: h.mean(1), lambda h: h[:, -1], lambda h: h.sum(1)])

    def fn(p, x):
        for layer in layers:
            x = layer(p, x)
        return pool(x) @ p[head]

    for _ in range(20):
        x = jnp.asarray(generator.random.normal(size=(2, PLACES, width)))
        if not testing.kinks(fn, generator.params, x):
            return fn, generator.params, x
    return None


def programs(args):
    if args.generated:
        for seed in range(args.seed, args.seed + args.generated):
            yield f"generated {seed}", functools.partial(generated, seed)
        return
    for name, build in zoo.PROGRAMS.items():
        if not args.programs or name in args.programs:
            yield name, build


def check(name, build, residue, args):
    """A line about one program, under all composites or some cases of it."""
    program = build()
    if program is None:
        return {"skipped": "no point away from kinks"}
    names = args.composites or COMPOSITES
    cases = {"all": args.kinds}
    if residue is not None:
        names = zoo.COMPOSITES
        cases = zoo.cases(name, testing.kinds(), residue, RESIDUES)
    checked, rows = 0, []
    for case, kinds in cases.items():
        table = testing.check_spellings(
            *program,
            composites={n: COMPOSITES[n] for n in names if case in ("all", n)},
            kinds=kinds,
            locate=not args.quick,
        )
        checked += len(table.rows)
        rows += [vars(row) for row in table.rows if row.status != "equal"]
    return {"checked": checked, "rows": rows}


def run(args):
    path = Path(args.out)
    lines = path.read_text().splitlines() if path.exists() else []
    done = {(line["program"], line.get("residue")) for line in map(json.loads, lines)}
    share, of = map(int, args.share.split("/"))
    with path.open("a") as out:
        for residue in args.residues or [None]:
            for number, (name, build) in enumerate(programs(args)):
                if (name, residue) in done or number % of != share:
                    continue
                start = time.perf_counter()
                try:
                    found = check(name, build, residue, args)
                except Exception as error:  # said, and the next one tried
                    found = {"error": f"{type(error).__name__}: {error}"[:500]}
                seconds = round(time.perf_counter() - start)
                found = {"program": name, "residue": residue, **found, "s": seconds}
                print(json.dumps(found), file=out, flush=True)
                show(found)
                jax.clear_caches()


def show(found):
    counts = Counter(row["status"] for row in found.get("rows", ()))
    print(found["program"], found.get("checked", found), dict(counts), flush=True)
    for row in found.get("rows", ()):
        if row["status"] != "documented":
            print("  ", row["twin"], row["composite"], row["why"] or row["error"])


def residues(text):
    first, _, last = text.partition("-")
    return range(int(first), int(last or first) + 1)


def report(path):
    """The differences in groups: by what is read differently, smallest names first."""
    groups, checked, total = defaultdict(list), 0, 0
    for line in Path(path).read_text().splitlines():
        found = json.loads(line)
        if "error" in found:
            print(found["program"], found["error"])
        total, checked = total + 1, checked + found.get("checked", 0)
        for row in found.get("rows", ()):
            if row["status"] != "documented":
                key = row["operation"] or row["why"] or "(no operation named)"
                groups[key].append((found["program"], row))
    print(f"{total} programs, {checked} explanations of twins compared")
    for key, rows in sorted(groups.items(), key=lambda item: -len(item[1])):
        worst = max(rows, key=lambda found: found[1]["error"] or 0)
        print(f"\n{key}: {len(rows)}, at most {worst[1]['error']:.1e} in {worst[0]}")
        print("  e.g.", rows[0][0], rows[0][1]["twin"], "at", rows[0][1]["where"])
        for what in ("twin", "composite"):
            counts = Counter(row[what] for _, row in rows).most_common(12)
            print(f"  {what}s:", ", ".join(f"{name} {n}" for name, n in counts))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="spellings.jsonl")
    parser.add_argument("--programs", nargs="*")
    parser.add_argument("--kinds", nargs="*", help="names or families of rewritings")
    parser.add_argument("--composites", nargs="*", choices=COMPOSITES)
    parser.add_argument("--generated", type=int, default=0, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", default="0/1", help="which part of the programs")
    parser.add_argument("--residues", type=residues, metavar="FIRST-LAST")
    parser.add_argument("--quick", action="store_true", help="without places")
    parser.add_argument("--report", action="store_true")
    args = parser.parse_args()
    if args.report:
        report(args.out)
        return
    print(f"jax {jax.__version__}, jlrp {jlrp.__version__}")
    run(args)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_x64", True)
    main()
