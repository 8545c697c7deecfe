"""Many devices and processes give the result of one."""

import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from jlrp.jobs import store

EXAMPLES = 150

# Run as: program folder devices [process processes port]
PROGRAM = """
import sys, time
import jax, numpy as np
folder, devices, *cluster = sys.argv[1:]
if cluster:
    process, processes, port = map(int, cluster)
    jax.distributed.initialize(
        f"localhost:{port}", processes, process, heartbeat_timeout_seconds=10
    )
import jlrp
from jlrp import jobs

rng = np.random.default_rng(0)
params = {"w": rng.normal(size=(6, 8)), "v": rng.normal(size=(8, 4))}
params = {name: a.astype(np.float32) for name, a in params.items()}
x = rng.normal(size=(150, 6)).astype(np.float32)

def model(params, x):
    return jax.nn.relu(x @ params["w"]) @ params["v"]

class Slow:
    shape, dtype = x.shape, x.dtype
    def __len__(self):
        return len(x)
    def __getitem__(self, rows):
        time.sleep(0.15 if "slow" in folder else 0)
        return x[rows]

mesh = {"none": None, "data": "data"}.get(devices)
if devices in ("global", "sharded"):
    from jax.sharding import NamedSharding, PartitionSpec as P
    across = jax.make_mesh((4, 2), ("data", "model"))
    mesh = across
    if devices == "sharded":
        place = lambda a, *s: jax.device_put(a, NamedSharding(across, P(*s)))
        w, v = params["w"], params["v"]
        params = {"w": place(w, None, "model"), "v": place(v, "model")}
done = jobs.run(
    jlrp.explain(model, composite="epsilon"), params, Slow(), folder,
    batch=8, devices=mesh, resume=True, progress=False,
)
print("EXPLAINED", done.explained_now)
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    path = tmp_path_factory.mktemp("program") / "job.py"
    path.write_text(PROGRAM)
    return path


def start(program, folder, devices, *cluster, n_devices=8):
    count = f"--xla_force_host_platform_device_count={n_devices}"
    env = os.environ | {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {count}"}
    command = [sys.executable, program, folder, devices, *map(str, cluster)]
    return subprocess.Popen(
        command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def finished(process):
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return int(out.split("EXPLAINED")[1])


def free_port():
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


def arrays(path):
    return {n: store.array(path, n).read().result() for n in store.names(path)}


def assert_same(path, expected):
    found = arrays(path)
    assert found.keys() == expected.keys()
    # To 1e-6 of the largest score: "absorbed" is what rounding leaves of scores.
    largest = np.abs(expected["score"]).max()
    for name, array in found.items():
        np.testing.assert_allclose(array, expected[name], rtol=0, atol=1e-6 * largest)


@pytest.fixture(scope="module")
def one_device(program, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one") / "r.zarr"
    assert finished(start(program, folder, "none", n_devices=1)) == EXAMPLES
    return arrays(folder)


@pytest.mark.parametrize("devices", ["data", "global", "sharded"])
def test_eight_devices(devices, program, one_device, tmp_path):
    assert finished(start(program, tmp_path / "r.zarr", devices)) == EXAMPLES
    assert_same(tmp_path / "r.zarr", one_device)


@pytest.mark.parametrize("devices", ["none", "data", "sharded"])
def test_two_processes(devices, program, one_device, tmp_path):
    port, path = free_port(), tmp_path / "r.zarr"
    parts = [start(program, path, devices, i, 2, port, n_devices=4) for i in range(2)]
    assert sum(map(finished, parts)) == EXAMPLES
    assert_same(path, one_device)


def test_one_of_two_processes_killed(program, one_device, tmp_path):
    port, path = free_port(), tmp_path / "slow.zarr"
    parts = [start(program, path, "none", i, 2, port, n_devices=1) for i in range(2)]
    while len(list(store.done(path, 1))) < 3:
        time.sleep(0.02)
    parts[1].send_signal(signal.SIGKILL)
    for part in parts:  # JAX ends the survivor, or it is done before it notices
        part.communicate(timeout=120)
    before = [record["block"] for record in store.done(path)]
    counts = sum(record["count"] for record in store.done(path))
    assert 3 <= len(before) and counts < EXAMPLES

    port = free_port()
    parts = [start(program, path, "none", i, 2, port, n_devices=1) for i in range(2)]
    assert sum(map(finished, parts)) == EXAMPLES - counts
    after = [record["block"] for record in store.done(path)]
    assert sorted(after) == list(range(-(-EXAMPLES // 8)))  # none was done twice
    assert_same(path, one_device)


def test_one_part_alone(program, one_device, tmp_path):
    """A part needs no other process, and no jax.distributed."""
    import jlrp
    from jlrp import jobs

    x = np.ones((20, 3), np.float32)
    explain = jlrp.explain(lambda w, x: x @ w)
    w = np.ones((3, 2), np.float32)
    for part in [(1, 2), (0, 2)]:
        jobs.run(explain, w, x, tmp_path / "r", batch=4, part=part, progress=False)
    assert jobs.summary(tmp_path / "r").examples == 20
