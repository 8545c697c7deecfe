"""Jobs of every composite and target, by one process: ``killed_jobs.py HOW FOLDER``.

``killed``: all jobs at once, until each has written a block; then the process kills
itself. ``resumed``: all again, with ``resume``. ``part 0``, ``part 1``: halves of them
in other stores. ``whole``: undisturbed.
"""

import functools
import os
import signal
import sys
import threading
from pathlib import Path

import jax
import numpy as np

import jlrp
from jlrp import jobs
from jlrp.jobs import store

BATCH, EXAMPLES = 4, 14
RULES = jlrp.rules


def model(params, x):
    with jax.named_scope("encoder"):
        h = jax.lax.conv(x, params["kernel"], (1, 1), "VALID")
    h = jax.nn.relu(h + params["bias"])
    return jax.numpy.tanh(h.reshape(len(h), -1) @ params["w"]) @ params["v"]


def data():
    rng = np.random.default_rng(0)
    shapes = {"kernel": (2, 1, 2, 2), "bias": (2, 1, 1), "w": (8, 4), "v": (4, 3)}
    params = {n: np.float32(rng.normal(size=s)) for n, s in shapes.items()}
    return params, np.float32(rng.normal(size=(EXAMPLES, 1, 3, 3)))


def is_last(operation):
    return "last" in operation.facts


def is_of(kind, operation):
    return operation.kind == kind


def margin(out):
    return out[:, 0] - out[:, 1]


def of_class(index, out):
    return out[:, index]


class OfClass:
    def __init__(self, index):
        self.index = index

    def __call__(self, out):
        return out[:, self.index]


def composites():
    """Every preset by its name, and what a user may write."""
    names = [n for n in jlrp.composites.PRESETS if n != "epsilon_gamma_box"]
    pair = {
        "kind": ("dense", RULES.Gamma(0.3)),
        "scope": ("encoder", RULES.ZPlus()),
        "depth": (("conv", jlrp.composites.Depth(0.0, 0.5)), RULES.Flat()),
        "function": (is_last, RULES.Epsilon(0.1)),
        "lambda": (lambda op: op.kind == "dense", RULES.Zero()),
        "partial": (functools.partial(is_of, "dense"), RULES.Zero()),
        "primitive": (jax.extend.core.primitives.tanh_p, RULES.Gradient()),
        "bounds": ("first", RULES.ZBox(np.full((3, 3), -4.0), np.linspace(3, 4, 9)[0])),
    }
    optional = {name: jlrp.composites.Pair(*p, True) for name, p in pair.items()}
    return {
        **{name: name for name in names},
        "epsilon_gamma_box": jlrp.composites.epsilon_gamma_box(-4.0, 4.0),
        **{name: jlrp.Composite([p]) for name, p in optional.items()},
    }


TARGETS = {
    "int": 1,
    "numpy": np.int64(2),
    "function": margin,
    "lambda": lambda out: out[:, 2],
    "partial": functools.partial(of_class, 1),
    "object": OfClass(1),
    "multiplier": np.float32(np.arange(3 * BATCH).reshape(BATCH, 3)),
}
LABELS = np.arange(EXAMPLES) % 3


def jobs_to_do():
    """By name: an explainer, and the options of ``jobs.run``."""
    of, made = jlrp.explain, composites()
    return {
        **{f"{n} composite": (of(model, composite=c), {}) for n, c in made.items()},
        **{f"{n} target": (of(model, target=t), {}) for n, t in TARGETS.items()},
        "labels": (of(model), {"target": LABELS}),
        "one label": (of(model), {"target": 2}),
        "top": (of(model), {"reduce": jobs.Top(3)}),
        "reduce": (of(model), {"reduce": lambda r: r.sum((1, 2))}),
        "condition": (
            of(model, condition={"encoder": np.ones((1, 2, 1, 1), np.float32)}),
            {},
        ),
    }


class Stopping:
    """A source that lets its job come to the second block, and no farther.

    The first examples are looked at before any is explained.
    """

    def __init__(self, x, there):
        self.x, self.there, self.seen = x, there, set()

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        if index >= BATCH and index in self.seen:
            self.there.wait()
            threading.Event().wait()
        self.seen.add(index)
        return self.x[index]


def run(name, folder, source, **options):
    explain, more = jobs_to_do()[name]
    params, _ = data()
    path = Path(folder) / name.replace(" ", "_")
    options = {"batch": BATCH, "progress": False, **more, **options}
    return jobs.run(explain, params, source, path, **options)


def kill_all(folder):
    _, x = data()
    names = list(jobs_to_do())
    there = threading.Barrier(len(names) + 1)
    for name in names:
        source = Stopping(x, there)
        threading.Thread(target=run, args=(name, folder, source), daemon=True).start()
    there.wait()
    while any(not written(Path(folder) / name.replace(" ", "_")) for name in names):
        threading.Event().wait(0.01)
    os.kill(os.getpid(), signal.SIGKILL)


def written(path):
    return any(store.done(path))


def main(how, folder, part=None):
    if how == "killed":
        kill_all(folder)
    _, x = data()
    options = {"resume": how != "whole"}
    if part is not None:
        options["part"] = (int(part), 2)
    for name in jobs_to_do():
        source = [*x] if how == "resumed" else x
        done = run(name, folder, source, **options)
        print(name, done.explained_now, sep=": ")


if __name__ == "__main__":
    main(*sys.argv[1:])
