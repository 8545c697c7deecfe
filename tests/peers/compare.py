"""jlrp's side of a comparison."""

import jax.numpy as jnp
import numpy as np

import jlrp
from peers import jax_networks


def explain(network, values, x, composite, layout="NHWC", batch_norm="flax", **options):
    """jlrp's relevance of a plain function, in torch's order like x."""
    result = jlrp.relevance(
        jax_networks.function(network, layout, batch_norm),
        jax_networks.params(network, values, layout),
        jnp.asarray(jax_networks.to_layout(x, layout)),
        composite=composite,
        **options,
    )
    return jax_networks.from_layout(result, layout)


def assert_equal(ours, theirs, tolerance):
    """|ours - theirs| is at most `tolerance` times the largest |theirs|, everywhere."""
    assert ours.shape == theirs.shape
    assert np.isfinite(theirs).all()
    largest = np.abs(theirs).max()
    assert largest > 0
    error = np.abs(ours - theirs).max() / largest
    assert error <= tolerance, (
        f"largest difference {error:.1e} of the largest relevance"
    )
