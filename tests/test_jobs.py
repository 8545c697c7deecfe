"""Jobs: every kind of source, target, reduction and failure; what the store holds."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore as ts
import xarray
import zarr

import jlrp
from jlrp import jobs

WIDTH, CLASSES, EXAMPLES = 6, 4, 21


def model(params, x):
    return jax.nn.relu(x @ params["w"]) @ params["v"]


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    shapes = {"w": (WIDTH, 8), "v": (8, CLASSES)}
    return {n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}


@pytest.fixture(scope="module")
def x():
    rng = np.random.default_rng(1)
    return rng.normal(size=(EXAMPLES, WIDTH)).astype(np.float32)


def run(explain, params, source, path, **options):
    options = {"batch": 8, "progress": False} | options
    return jobs.run(explain, params, source, path, **options)


def read(path, name):
    return zarr.open_group(path, mode="r")[name][...]


EXPLAIN = jlrp.explain(model, composite="epsilon")


def as_memmap(x, folder):
    np.save(folder / "x.npy", x)
    return np.load(folder / "x.npy", mmap_mode="r")


def as_zarr(x, folder):
    array = zarr.create_array(
        folder / "x.zarr", shape=x.shape, chunks=(4, 6), dtype="f4"
    )
    array[:] = x
    return array


def as_tensorstore(x, folder):
    as_zarr(x, folder)
    file = {"driver": "file", "path": f"{folder}/x.zarr/"}
    return ts.open({"driver": "zarr3", "kvstore": file}).result()


def as_grain_map(x, folder):
    import grain

    return grain.MapDataset.source(x).map(lambda example: example)


def as_grain_iter(x, folder):
    return as_grain_map(x, folder).to_iter_dataset()


def as_grain_loader(x, folder):
    import grain

    sampler = grain.samplers.IndexSampler(len(x), num_epochs=1, shuffle=False, seed=0)
    return grain.DataLoader(data_source=x, sampler=sampler)


SOURCES = {
    "numpy": lambda x, folder: x,
    "memmap": as_memmap,
    "zarr": as_zarr,
    "tensorstore": as_tensorstore,
    "list": lambda x, folder: list(x),
    "iterator": lambda x, folder: iter(x),
    "grain map": as_grain_map,
    "grain iterable": as_grain_iter,
    "grain loader": as_grain_loader,
}


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_sources(kind, params, x, tmp_path):
    source = SOURCES[kind](x, tmp_path)
    done = run(EXPLAIN, params, source, tmp_path / "r")
    assert done.examples == done.total == done.explained_now == EXAMPLES
    assert not done.failures and done.conservation["max"] < 1e-4
    expected = EXPLAIN(params, x)
    np.testing.assert_allclose(
        read(tmp_path / "r", "relevance"), expected.relevance, rtol=1e-5, atol=1e-6
    )
    output = read(tmp_path / "r", "output")
    np.testing.assert_allclose(output, expected.output, rtol=1e-5, atol=1e-6)
    assert (read(tmp_path / "r", "target") == output.argmax(1)).all()
    np.testing.assert_allclose(read(tmp_path / "r", "score"), output.max(1), rtol=1e-6)


@pytest.mark.parametrize("length", [8, 16, 17])
def test_streams_end_anywhere(length, params, x, tmp_path):
    done = run(EXPLAIN, params, (row for row in x[:length]), tmp_path / "r")
    assert done.total == length
    assert read(tmp_path / "r", "relevance").shape == (length, WIDTH)


def test_the_store_is_xarray_s_too(params, x, tmp_path):
    explain = jlrp.explain(model, composite="epsilon_plus")
    run(explain, params, x, tmp_path / "r")
    found = xarray.open_zarr(tmp_path / "r")  # a warning would be an error
    assert found.relevance.dims == ("example", "relevance_1")
    assert found.relevance.shape == (EXAMPLES, WIDTH)
    names = {"relevance", "output", "target", "score", "absorbed", "failure"}
    assert set(found.data_vars) == names
    assert found.failure.attrs["flag_meanings"].split()[0] == "none"
    made_by = found.attrs["job"]
    assert "ZPlus" in made_by["composite"]
    assert made_by["jax"] == jax.__version__ and made_by["jlrp"] == jlrp.__version__
    assert made_by["target"] is None and len(made_by["params"]) == 32
    group = zarr.open_group(tmp_path / "r", mode="r")
    assert set(group.array_keys()) == names
    for name in names:
        metadata = json.loads((tmp_path / "r" / name / "zarr.json").read_text())
        assert metadata["dimension_names"][0] == "example"
        assert metadata["chunk_grid"]["configuration"]["chunk_shape"][0] == 8


def test_labels(params, x, tmp_path):
    labels = np.arange(EXAMPLES) % CLASSES
    run(EXPLAIN, params, x, tmp_path / "r", target=labels)
    expected = EXPLAIN(params, x, jnp.asarray(labels, jnp.int32)).relevance
    np.testing.assert_allclose(
        read(tmp_path / "r", "relevance"), expected, rtol=1e-5, atol=1e-6
    )
    assert (read(tmp_path / "r", "target") == labels).all()
    pairs = [{"x": row, "y": y} for row, y in zip(x, labels, strict=True)]
    split = lambda e: (e["x"], e["y"])  # noqa: E731
    run(EXPLAIN, params, iter(pairs), tmp_path / "s", split=split)
    for name in ("relevance", "target", "score"):
        assert (read(tmp_path / "s", name) == read(tmp_path / "r", name)).all()


@pytest.mark.parametrize(
    "target", [2, lambda y: y[:, 0] - y[:, 1]], ids=["class", "fn"]
)
def test_targets(target, params, x, tmp_path):
    explain = jlrp.explain(model, composite="epsilon", target=target)
    run(explain, params, x, tmp_path / "r")
    expected = explain(params, x)
    relevance, score = read(tmp_path / "r", "relevance"), read(tmp_path / "r", "score")
    np.testing.assert_allclose(relevance, expected.relevance, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(relevance.sum(1), score, rtol=1e-4, atol=1e-4)
    if target == 2:
        run(EXPLAIN, params, x, tmp_path / "s", target=2)
        assert (read(tmp_path / "s", "relevance") == relevance).all()


def test_captured_and_pytrees(params, x, tmp_path):
    def two(params, x):
        hidden = jlrp.tag(jax.nn.relu(x["a"] @ params["w"]) * x["b"], "block/hidden")
        return {"scores": hidden @ params["v"], "hidden": hidden}

    explain = jlrp.explain(
        two, capture="block/hidden", target=lambda out: out["scores"].max(-1)
    )
    rows = [{"a": row, "b": np.ones(8, np.float32)} for row in x]
    run(explain, params, rows, tmp_path / "r")
    expected = explain(params, {"a": x, "b": jnp.ones((EXAMPLES, 8), jnp.float32)})
    for name, array in {
        "relevance.a": expected.relevance["a"],
        "relevance.b": expected.relevance["b"],
        "captured.block.hidden": expected.captured["block/hidden"],
        "output.scores": expected.output["scores"],
    }.items():
        np.testing.assert_allclose(
            read(tmp_path / "r", name), array, rtol=1e-5, atol=1e-6
        )


def test_captured_in_loops_has_the_example_first(params, x, tmp_path):
    """As many layers as examples: the order of the axes is not told by their sizes."""

    def fn(params, x):
        def layer(h, w):
            return jlrp.tag(h + jax.nn.relu(h @ w), "layer"), None

        ws = jnp.stack([params["w"][:, :WIDTH]] * 8)
        h, _ = jax.lax.scan(layer, x, ws / 4)
        return h @ params["v"][:WIDTH]

    explain = jlrp.explain(fn, capture="layer", composite="epsilon")
    run(explain, params, x[:8], tmp_path / "r")
    expected = explain(params, x[:8]).captured["layer"].swapaxes(0, 1)
    found = read(tmp_path / "r", "captured.layer")
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_reductions_and_dtype(params, x, tmp_path):
    expected = np.asarray(EXPLAIN(params, x).relevance)
    run(EXPLAIN, params, x, tmp_path / "t", reduce=jobs.Top(2), dtype="float16")
    positions = read(tmp_path / "t", "relevance.positions")
    order = np.argsort(-np.abs(expected), axis=1)[:, :2]
    assert (positions == order).all()
    values = read(tmp_path / "t", "relevance.values")
    assert values.dtype == np.float16
    kept = np.take_along_axis(expected, order, 1)
    np.testing.assert_allclose(values, kept, rtol=1e-2)

    images = x.reshape(EXAMPLES, 3, 2)
    flat = jlrp.explain(
        lambda p, x: model(p, x.reshape(len(x), -1)), composite="epsilon"
    )
    run(flat, params, images, tmp_path / "c", reduce=jobs.sum_channels)
    summed = expected.reshape(images.shape).sum(-1)
    np.testing.assert_allclose(
        read(tmp_path / "c", "relevance"), summed, rtol=1e-5, atol=1e-5
    )


def ids_model(params, ids):
    h = jnp.where((ids > 0)[..., None], params["e"][ids], 0)
    return jax.nn.relu(h.sum(1)) @ params["v"]


def test_buckets(params, tmp_path):
    table = {"e": np.random.default_rng(2).normal(size=(20, 8)).astype(np.float32)}
    params = table | params
    rng = np.random.default_rng(3)
    rows = [rng.integers(1, 20, n % 11 + 1, dtype=np.int32) for n in range(50)]
    explain = jlrp.explain(ids_model, composite="epsilon")
    buckets = jobs.Buckets((4, 8), window=3)
    done = run(
        explain, params, rows, tmp_path / "r", buckets=buckets, on_failure="skip"
    )
    too_long = [i for i, row in enumerate(rows) if len(row) > 8]
    assert done.failures == {"unreadable": len(too_long)}
    assert done.reasons[too_long[0]].startswith("its length is 9; the buckets")
    relevance, length = (
        read(tmp_path / "r", "relevance"),
        read(tmp_path / "r", "length"),
    )
    assert relevance.shape == (50, 8)
    for i, row in enumerate(rows):
        if i in too_long:
            assert np.isnan(relevance[i]).all()
            continue
        assert length[i] == len(row) and np.isnan(relevance[i, len(row) :]).all()
        alone = explain(params, row[None]).relevance[0]
        np.testing.assert_allclose(
            relevance[i, : len(row)], alone, rtol=1e-4, atol=1e-5
        )


class Poisoned:
    """An exception, a wrong shape and a NaN among good examples."""

    def __init__(self, x):
        self.x = x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        if index == 3:
            raise OSError("sector 17\nis lost")
        row = self.x[index].copy()
        if index == 9:
            row[2] = np.nan
        return row[:4] if index == 0 else row


def test_poisoned_examples_are_skipped(params, x, tmp_path):
    done = run(EXPLAIN, params, Poisoned(x), tmp_path / "r", on_failure="skip")
    assert done.failures == {"unreadable": 2, "nan_in_x": 1}
    assert done.not_finite == 1
    assert done.reasons == {
        0: "its shape is (4,), not (6,)",
        3: "OSError: sector 17 is lost",
        9: "x has NaN",
    }
    assert "example 3: OSError: sector 17 is lost" in str(done)
    relevance = read(tmp_path / "r", "relevance")
    failed = np.isin(np.arange(EXAMPLES), [0, 3, 9])
    assert np.isnan(relevance[failed]).all()
    np.testing.assert_allclose(
        relevance[~failed], EXPLAIN(params, x).relevance[~failed], rtol=1e-5, atol=1e-6
    )
    assert (read(tmp_path / "r", "failure")[[0, 3, 9, 10]] == [1, 1, 2, 0]).all()


def test_poisoned_examples_stop_the_job(params, x, tmp_path):
    with pytest.raises(jobs.JobError, match=r"Example 0 .*shape is \(4,\)"):
        run(EXPLAIN, params, Poisoned(x), tmp_path / "r")
    assert jobs.summary(tmp_path / "r").failures == {}
    done = run(
        EXPLAIN, params, Poisoned(x), tmp_path / "r", resume=True, on_failure="skip"
    )
    assert done.examples == EXAMPLES and sum(done.failures.values()) == 3


@pytest.mark.relaxed
def test_missing_numbers_are_explained_when_told_to(params, x, tmp_path):
    missing = x.copy()
    missing[9, 2] = np.nan
    fn = lambda p, x: EXPLAIN.fn(p, jnp.nan_to_num(x))  # noqa: E731
    explain = jlrp.explain(fn, composite="epsilon")
    done = run(explain, params, missing, tmp_path / "r", allow_nan=True)
    assert done.failures == {} and done.examples == EXAMPLES
    relevance = read(tmp_path / "r", "relevance")
    assert relevance[9, 2] == 0 and np.isfinite(relevance).all()
    with pytest.raises(jobs.JobError, match="Example 9 .*NaN"):
        run(explain, params, missing, tmp_path / "refused")


def test_relevance_that_stops_is_logged(tmp_path, caplog):
    explain = jlrp.explain(lambda w, x: (x * w + jnp.round(x)).sum(-1))
    x, w = np.ones((6, 3), np.float32), np.ones((1, 3), np.float32)
    jobs.run(explain, w, x, tmp_path / "store", batch=2, progress=False)
    (record,) = (r for r in caplog.records if r.name == "jlrp.jobs")
    assert "Relevance stops" in record.message and "round at" in record.message


def test_too_large_for_float16(params, x, tmp_path):
    large = x.copy()
    large[4] = 1e6
    done = run(
        EXPLAIN, params, large, tmp_path / "r", dtype="float16", on_failure="skip"
    )
    assert done.failures == {"not_finite": 1}
    assert np.isnan(read(tmp_path / "r", "relevance")[4]).all()


def test_a_generator_that_raises_stops_the_job(params, x, tmp_path):
    def rows():
        yield from x[:18]
        raise ValueError("end of tape")

    with pytest.raises(jobs.JobError, match="end of tape.*cannot skip"):
        run(EXPLAIN, params, rows(), tmp_path / "r", on_failure="skip")
    done = run(EXPLAIN, params, iter(x), tmp_path / "r", resume=True, on_failure="skip")
    assert done.examples == done.total == EXAMPLES


def test_an_unreadable_chunk_loses_its_own_examples(params, x, tmp_path):
    array = as_zarr(x, tmp_path)
    (chunk,) = (tmp_path / "x.zarr" / "c" / "1").iterdir()
    chunk.write_bytes(b"nonsense")
    done = run(EXPLAIN, params, array, tmp_path / "r", on_failure="skip")
    assert done.failures == {"unreadable": 4}
    assert set(done.reasons) == {4, 5, 6, 7}


def test_resuming_a_finished_job_does_nothing(params, x, tmp_path):
    first = run(EXPLAIN, params, x, tmp_path / "r")
    again = run(EXPLAIN, params, x, tmp_path / "r", resume=True)
    assert again.explained_now == 0 and again.examples == first.examples == EXAMPLES


@pytest.mark.parametrize("labels", [False, True])
def test_artifacts(labels, params, x, tmp_path):
    given = {"target": np.arange(EXAMPLES) % CLASSES} if labels else {}
    made = jobs.export_artifact(
        EXPLAIN, params, x[0], tmp_path / "explain.jlrp", labels=labels
    )
    loaded = jobs.load_artifact(tmp_path / "explain.jlrp")
    assert loaded.made_by == made.made_by
    run(EXPLAIN, params, x, tmp_path / "r", **given)
    run(loaded, params, x, tmp_path / "s", **given)
    for name in ("relevance", "output", "score", "target"):
        np.testing.assert_allclose(
            read(tmp_path / "s", name), read(tmp_path / "r", name), rtol=1e-6, atol=1e-6
        )


def test_parameters_from_files(params, tmp_path):
    import orbax.checkpoint as ocp
    from flax import serialization
    from safetensors.numpy import save_file

    tree = {"params": {"dense": params}}
    flat = {f"params/dense/{name}": array for name, array in params.items()}
    np.savez(tmp_path / "p.npz", **flat)
    save_file(
        {n.replace("/", "."): a for n, a in flat.items()}, tmp_path / "p.safetensors"
    )
    (tmp_path / "p.msgpack").write_bytes(serialization.msgpack_serialize(tree))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "orbax", tree)
    for name in ("p.npz", "p.safetensors", "p.msgpack", "orbax"):
        loaded = jobs.load_params(tmp_path / name)
        assert jax.tree.structure(loaded) == jax.tree.structure(tree), name
        for found, array in zip(
            jax.tree.leaves(loaded), jax.tree.leaves(tree), strict=True
        ):
            assert (np.asarray(found) == array).all() and found.dtype == array.dtype
