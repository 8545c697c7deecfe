"""The primitives, in families: how each carries relevance, or why it carries none.

A family is a kind (what composites select) and a nature (how relevance is derived):

``linear``      relevance goes through the transpose; constants take their share
``movement``    linear, and relevance follows each number to where it came from
``selection``   like movement, along the winners at the actual values
``product``     homogeneous in each of several active operands
``function``    differentiable, no more is known: first-order Taylor

``embedding``   integers turn into floats
Elementwise functions of one active value are in ``facts/unary.py``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from jax.extend.core import primitives as p


class Family(NamedTuple):
    kind: str
    nature: str


MOVEMENT = (
    p.broadcast_in_dim_p,
    p.concatenate_p,
    p.convert_element_type_p,
    p.copy_p,
    p.device_put_p,
    p.dynamic_slice_p,
    p.dynamic_update_slice_p,
    p.gather_p,
    p.neg_p,
    p.pad_p,
    p.real_p,
    p.reduce_precision_p,
    p.reshape_p,
    p.rev_p,
    p.scatter_p,
    p.select_n_p,
    p.sharding_constraint_p,
    p.slice_p,
    p.squeeze_p,
    p.transpose_p,
)
# Not in jax.extend.core.primitives; matched by name because there is no public object.
MOVEMENT_BY_NAME = (
    "split",
    "stack",
    "unstack",
    "tile",
    "optimization_barrier",
    "reshard",
)

SUMS = (
    p.add_jaxvals_p,
    p.add_p,
    p.cumsum_p,
    p.reduce_sum_p,
    p.reduce_window_sum_p,
    p.scatter_add_p,
    p.sub_p,
)
SELECTION = (
    p.clamp_p,
    p.cummax_p,
    p.cummin_p,
    p.max_p,
    p.min_p,
    p.reduce_max_p,
    p.reduce_min_p,
    p.scatter_max_p,
    p.scatter_min_p,
    p.sort_p,
    p.top_k_p,
)
POOLED_SELECTION = (p.reduce_window_max_p, p.reduce_window_min_p)
PRODUCTS = (p.conv_general_dilated_p, p.div_p, p.dot_general_p, p.mul_p)
FUNCTIONS = (p.atan2_p, p.cumlogsumexp_p, p.cumprod_p, p.pow_p, p.reduce_prod_p)

NO_RELEVANCE: dict[Any, str] = {
    **dict.fromkeys(
        (p.argmax_p, p.argmin_p, p.eq_p, p.ge_p, p.gt_p, p.le_p, p.lt_p, p.ne_p),
        "integers and booleans carry no relevance",
    ),
    **dict.fromkeys(
        (p.ceil_p, p.floor_p, p.round_p, p.sign_p, p.is_finite_p, p.nextafter_p),
        "piecewise constant: its derivative is zero",
    ),
    p.stop_gradient_p: "the user declared it a constant",
    p.iota_p: "depends on nothing",
    **dict.fromkeys(
        (p.random_bits_p, p.rng_uniform_p, p.rng_bit_generator_p, p.threefry2x32_p),
        "random bits are constants",
    ),
}
CONTROL_FLOW = (p.scan_p, p.while_p, p.cond_p)

FAMILIES: dict[Any, Family] = {
    **dict.fromkeys(MOVEMENT, Family("movement", "movement")),
    **dict.fromkeys(SUMS, Family("sum", "linear")),
    **dict.fromkeys((p.add_p, p.sub_p, p.add_jaxvals_p), Family("add", "linear")),
    **dict.fromkeys(SELECTION, Family("selection", "selection")),
    **dict.fromkeys(POOLED_SELECTION, Family("max_pool", "selection")),
    **dict.fromkeys(PRODUCTS, Family("product", "product")),
    **dict.fromkeys((*FUNCTIONS, p.rem_p), Family("function", "function")),
}

KINDS = (
    "activation",
    "add",
    "attention",
    "avg_pool",
    "batch_norm",
    "conv",
    "custom",
    "dense",
    "embedding",
    "function",
    "gate",
    "linear",
    "max_pool",
    "mean",
    "movement",
    "norm",
    "product",
    "scale",
    "selection",
    "softmax",
    "sum",
    "unsupported",
)


def family_of(primitive: Any) -> Family | None:
    if primitive.name in MOVEMENT_BY_NAME:
        return Family("movement", "movement")
    return FAMILIES.get(primitive)
