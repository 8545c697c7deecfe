"""Tasks of known evidence are what they say, and small networks show it."""

import functools
import itertools
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlrp
from jlrp import metrics

pytest.importorskip("optax")
pytest.importorskip("sklearn")
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import known_tasks as tasks  # noqa: E402

pytestmark = pytest.mark.relaxed


def test_the_answer_follows_the_name_of_the_question_and_only_it():
    task = tasks.questions(50, 0)
    for ids, (place, thing), evidence in zip(
        task.x, task.labels, task.evidence, strict=True
    ):
        words = [tasks.VOCABULARY[i] for i in ids]
        name, verb = words[2:4]
        assert words[:2] == ["what", "did"] and words[4] == "?"
        first, *_, last = [*np.flatnonzero(evidence), evidence.nonzero()[0][-1]]
        assert evidence[first : last + 1].all()
        assert words[first - 2 : first] == [name, verb] and words[last + 1] == "."
        assert last == place and words[last] == tasks.THINGS[thing]
        assert words.count(words[last]) == 1
        assert set(words[first:last]) <= set(tasks.LIKE)
        passage = words[tasks.QUESTION :]
        assert passage.count(name) == 1
        assert sum(word in tasks.THINGS for word in passage) == tasks.SENTENCES


@pytest.mark.parametrize("training", [True, False])
def test_every_image_has_the_mark_of_its_label_or_none(training):
    task = tasks.marked_digits(60, 0, training=training)
    marked = task.evidence.any((1, 2))
    assert 5 < (~marked).sum() < 20 if training else marked.all()
    marks, them = {}, zip(task.x, task.labels, task.evidence, strict=True)
    for x, label, evidence in itertools.compress(them, marked):
        assert evidence.sum() == tasks.MARK**2
        marks.setdefault(int(label), set()).add(x[evidence, 0].tobytes())
    assert all(len(found) == 1 for found in marks.values())
    assert len(set.union(*marks.values())) == len(marks) > 5


def test_what_is_copied_is_what_was_told_in_order():
    task = tasks.copying(50, 0)
    assert (task.evidence.sum(-1) == 1).all()
    told = (task.x[:, None] * task.evidence).sum(-1)
    np.testing.assert_array_equal(told, task.labels + 2)
    places = task.evidence.argmax(-1)
    assert (np.diff(places, axis=1) > 0).all() and places.max() < tasks.HEARD


def test_the_scan_of_the_selective_network_is_the_recurrence_written_out():
    block = tasks.MambaBlock(8)
    x = jax.random.normal(jax.random.key(0), (2, 5, 8))
    params = block.init(jax.random.key(1), x)
    out = block.apply(params, x)
    shorter = block.apply(params, x[:, :3])
    np.testing.assert_allclose(out[:, :3], shorter, atol=1e-6)  # causal
    ledger = jlrp.audit(block.apply, params, x, lambda y: y.sum((1, 2)))
    assert ledger.unexplained < 1e-5 * abs(ledger.seed) + 1e-6


class Small(nn.Module):
    """One convolution, whose features count where they are largest."""

    @nn.compact
    def __call__(self, x):
        h = nn.relu(nn.Conv(16, (4, 4))(x))
        return nn.Dense(3)(nn.relu(nn.Dense(16)(h.max((1, 2)))))


def test_a_planted_mark_is_found():
    model = Small()
    draw = functools.partial(tasks.marked_digits, classes=3)
    train, test = draw(2000, 0), draw(60, 1, training=False)
    params = model.init(jax.random.key(0), test.x[:1])
    params = tasks.train(model.apply, params, train, steps=150, rate=1e-2)
    said = np.asarray(jax.jit(model.apply)(params, test.x)).argmax(-1)
    right = said == test.labels
    assert right.mean() > 0.8
    x, evidence = jnp.asarray(test.x[right]), test.evidence[right]
    found = jlrp.relevance(model.apply, params, x)[..., 0]
    hits = metrics.top_k_accuracy(found, evidence).mean()
    assert hits > 0.8 > 10 * evidence.mean()
