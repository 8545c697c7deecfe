"""Explain thousands of digits in a job that is killed on purpose, then resumed.

Trains the CNN of examples/digits.py and shifts the digits of the test set until there
are thousands. The command `jlrp explain` explains them; half way it is killed. The same
command goes on where it was, and `jlrp show` draws one digit of the results.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from digits import CNN, load, train
from flax import serialization

from jlrp import jobs

apply = CNN().apply  # for the command, which finds it as batch_job:apply


def shifted(images, examples):
    """Digits moved by up to a pixel each way, as many as are wanted."""
    moves = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    moved = [np.roll(images, move, axis=(1, 2)) for move in moves]
    repeats = -(-examples // (len(images) * len(moves)))
    return np.concatenate(moved * repeats)[:examples]


def start(*command):
    """Start `jlrp` in this folder, where it finds this file."""
    print("\n$ jlrp", *command, flush=True)
    return subprocess.Popen(
        [sys.executable, "-m", "jlrp", *map(str, command)], cwd=Path(__file__).parent
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=300, help="steps of training")
    parser.add_argument("--examples", type=int, default=5000)
    parser.add_argument("--show", type=int, default=17, help="which digit to draw")
    parser.add_argument("--output", default="batch_job.png", help="the picture")
    args = parser.parse_args()

    images, test_images, labels, _ = load()
    params = train(CNN(), images, labels, args.steps)

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "cnn.msgpack").write_bytes(serialization.to_bytes(params))
        np.save(folder / "digits.npy", shifted(test_images, args.examples))
        results = folder / "relevance.zarr"
        explain = [
            "explain", "batch_job:apply", "--params", folder / "cnn.msgpack",
            "--data", folder / "digits.npy", "--out", results,
            "--composite", "epsilon_plus", "--batch", 64, "--resume",
        ]  # fmt: skip

        job = start(*explain)
        while jobs.done(results) < args.examples // 2 and job.poll() is None:
            time.sleep(0.005)
        job.kill()
        job.wait()
        print(f"\nkilled after {jobs.done(results)} examples", flush=True)

        if start(*explain).wait():
            sys.exit("the job did not go on")
        output = Path(args.output).absolute()
        for options in ([], ["--output", output]):
            start("show", results, args.show, *options).wait()


if __name__ == "__main__":
    main()
