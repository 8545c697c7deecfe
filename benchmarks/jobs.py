"""What a job costs beside the bare loop, and its memory over many examples.

    python benchmarks/jobs.py rate      # a CNN of digits, a small transformer
    python benchmarks/jobs.py memory    # 100,000 small examples; draws a figure

The bare loop calls the compiled explanation on batches that are in memory already, and
throws the results away. Each is timed in turn, several times; the shares are medians of
neighbours. CPU time counts all threads: it stays true on a machine that is busy.
"""

import argparse
import shutil
import statistics
import tempfile
import threading
import time
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import jlrp
from jlrp import jobs


class CNN(nn.Module):
    """That of examples/digits.py."""

    @nn.compact
    def __call__(self, images):  # (batch, 8, 8, 1) -> (batch, 10)
        h = nn.relu(nn.Conv(16, (3, 3))(images))
        h = nn.relu(nn.Conv(32, (3, 3))(h))
        h = nn.max_pool(h, (2, 2), strides=(2, 2))
        h = nn.relu(nn.Dense(64)(h.reshape(h.shape[0], -1)))
        return nn.Dense(10)(h)


class Transformer(nn.Module):
    """Two layers of width 64 over 32 tokens."""

    @nn.compact
    def __call__(self, ids):  # (batch, 32) -> (batch, 4)
        h = nn.Embed(1000, 64)(ids) + self.param(
            "p", nn.initializers.normal(), (32, 64)
        )
        for _ in range(2):
            h = h + nn.SelfAttention(4)(nn.LayerNorm()(h))
            h = h + nn.Dense(64)(nn.gelu(nn.Dense(128)(nn.LayerNorm()(h))))
        return nn.Dense(4)(nn.LayerNorm()(h).mean(1))


def digits(examples):
    rng = np.random.default_rng(0)
    return CNN(), rng.random((examples, 8, 8, 1), np.float32), "epsilon_plus"


def tokens(examples):
    rng = np.random.default_rng(0)
    ids = rng.integers(1, 1000, (examples, 32), dtype=np.int32)
    return Transformer(), ids, "attnlrp"


def bare_loop(explain, params, x, batch):
    program = jax.jit(explain).lower(params, x[:batch]).compile()
    jax.block_until_ready(program(params, x[:batch]))
    started, busy = time.perf_counter(), time.process_time()
    for start in range(0, len(x), batch):
        found = program(params, x[start : start + batch])
        jax.block_until_ready(found)
    seconds = time.perf_counter() - started
    return len(x) / seconds, time.process_time() - busy


def job(explain, params, x, batch, folder):
    """The rate from the first block to the end: a bare loop compiles before, too."""
    stamps = []
    source = Stamped(x, stamps)
    jobs.run(explain, params, source, folder, batch=batch, progress=False)
    began, busy = stamps[1]  # stamps[0] is the look at the source
    return len(x) / (time.perf_counter() - began), time.process_time() - busy


class Stamped:
    """An array that notes when it is read."""

    def __init__(self, array, stamps):
        self.array, self.stamps = array, stamps
        self.shape, self.dtype = array.shape, array.dtype

    def __len__(self):
        return len(self.array)

    def __getitem__(self, rows):
        self.stamps.append((time.perf_counter(), time.process_time()))
        return self.array[rows]


def rate(repeats):
    print(
        "| model | batch | bare loop /s | job /s | job / bare | CPU time job / bare |"
    )
    print("|---|---|---|---|---|---|")
    for make, examples, batch in ((digits, 65536, 1024), (tokens, 16384, 256)):
        model, x, composite = make(examples)
        params = model.init(jax.random.key(0), x[:1])
        explain = jlrp.explain(model.apply, composite=composite)
        bare, jobbed = [], []
        for _ in range(repeats):
            bare.append(bare_loop(explain, params, x, batch))
            folder = tempfile.mkdtemp()
            jobbed.append(job(explain, params, x, batch, f"{folder}/r.zarr"))
            shutil.rmtree(folder)
        b, j = (statistics.median(r for r, _ in runs) for runs in (bare, jobbed))
        pairs = list(zip(jobbed, bare, strict=True))
        share = statistics.median(
            of_job / of_bare for (of_job, _), (of_bare, _) in pairs
        )
        busy = statistics.median(
            of_job / of_bare for (_, of_job), (_, of_bare) in pairs
        )
        numbers = f"{batch} | {b:.0f} | {j:.0f} | {share:.1%} | {busy:.1%}"
        print(f"| {make.__name__} | {numbers} |", flush=True)


def memory(output):
    import matplotlib.pyplot as plt

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20

    w = {"w": jnp.ones((16, 8)), "v": jnp.ones((8, 4))}
    explain = jlrp.explain(lambda p, x: jax.nn.relu(x @ p["w"]) @ p["v"])
    x = np.random.default_rng(0).normal(size=(100_000, 16)).astype(np.float32)
    seconds, sizes, ended = [], [], threading.Event()
    started = time.perf_counter()

    def watch():
        while not ended.wait(0.05):
            seconds.append(time.perf_counter() - started)
            sizes.append(resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    folder = tempfile.mkdtemp()
    print(jobs.run(explain, w, x, f"{folder}/r.zarr", batch=64, progress=False))
    ended.set()
    watcher.join()
    shutil.rmtree(folder)
    tenth = len(sizes) // 10
    at = [statistics.mean(sizes[i * tenth : (i + 1) * tenth]) for i in (2, 5, 9)]
    print("resident MiB after 20 %, 50 %, 90 %:", *(f"{m:.1f}" for m in at))
    figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
    axes.plot(seconds, sizes)
    axes.set(xlabel="seconds", ylabel="resident MiB", ylim=(0, None))
    axes.set_title("a job over 100,000 small examples, 64 at a time")
    figure.savefig(output, dpi=120)
    print(f"wrote {output}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["rate", "memory"])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", default="jobs_memory.png")
    args = parser.parse_args()
    rate(args.repeats) if args.what == "rate" else memory(args.output)
