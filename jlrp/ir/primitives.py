"""The primitives, in families: how each carries relevance, or why it carries none.

A family is a kind (what composites select) and a nature (how relevance is derived):

``linear``       relevance goes through the transpose; constants take their share
``movement``     linear, and relevance follows each number to where it came from
``selection``    like movement, along the winners at the actual values
``product``      homogeneous in each of several active operands
``homogeneous``  of a known degree: Euler's identity, ``x df/dx = k f``
``function``     differentiable, of no degree: first-order Taylor

``embedding``    integers turn into floats
``rounding``     a quantiser: passes where it does not clip
Elementwise functions of one active value are those of ``ELEMENTWISE``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.extend.core import primitives as p

from jlrp.ir import jax_compat
from jlrp.ir.own_primitives import straight_through_p
from jlrp.ir.program import Equation


class Family(NamedTuple):
    """How a primitive carries relevance.

    Attributes:
      kind: what composites select.
      nature: how relevance is derived.
      how: the same in words, for the table of primitives.
      exact: whether this counts as covered; if not, as a fallback.
    """

    kind: str
    nature: str
    how: str = ""
    exact: bool = True


class Group(NamedTuple):
    """Operands in which an operation is homogeneous together.

    Attributes:
      operands: their positions.
      degree: the degree of every output, one for each in a tuple, one for each element
        in an array, or COUNTED: as many as the active factors of each element. 0:
        first-order Taylor.
      linear: whether the operation is linear in them, not only of degree 1.
    """

    operands: tuple[int, ...]
    degree: Any
    linear: bool = False


COUNTED = "counted"


def present(*names: str) -> tuple[Any, ...]:
    """The primitives among these names that the installed JAX has."""
    found = (getattr(p, f"{name}_p", None) for name in names)
    return tuple(primitive for primitive in found if primitive is not None)


LINEAR_UNARY = {
    p.convert_element_type_p,
    p.copy_p,
    p.neg_p,
    p.reduce_precision_p,
    p.real_p,
}
NONLINEAR_UNARY = {
    p.abs_p,
    p.acos_p,
    p.acosh_p,
    p.asin_p,
    p.asinh_p,
    p.atan_p,
    p.atanh_p,
    p.bessel_i0e_p,
    p.bessel_i1e_p,
    p.cbrt_p,
    p.cos_p,
    p.cosh_p,
    p.digamma_p,
    p.erf_inv_p,
    p.erf_p,
    p.erfc_p,
    p.exp2_p,
    p.exp_p,
    p.expm1_p,
    p.integer_pow_p,
    p.lgamma_p,
    p.log1p_p,
    p.log_p,
    p.logistic_p,
    p.rsqrt_p,
    p.sin_p,
    p.sinh_p,
    p.sqrt_p,
    p.square_p,
    p.tan_p,
    p.tanh_p,
}
# Newer than the oldest JAX supported.
NONLINEAR_UNARY |= set(present("log2", "one_minus_square"))
NARY = {  # elementwise in several operands
    p.add_jaxvals_p,
    p.add_p,
    p.atan2_p,
    p.clamp_p,
    p.div_p,
    p.igamma_p,
    p.igammac_p,
    p.max_p,
    p.min_p,
    p.mul_p,
    p.polygamma_p,
    p.pow_p,
    p.regularized_incomplete_beta_p,
    p.rem_p,
    p.select_n_p,
    p.sub_p,
    *present("polynomial"),
}
ELEMENTWISE = LINEAR_UNARY | NONLINEAR_UNARY | NARY

# Movement of integers.
MOVES = {
    p.broadcast_in_dim_p,
    p.concatenate_p,
    p.copy_p,
    p.convert_element_type_p,
    p.device_put_p,
    p.dynamic_slice_p,
    p.dynamic_update_slice_p,
    p.gather_p,
    p.pad_p,
    p.reshape_p,
    p.rev_p,
    p.scatter_p,
    p.slice_p,
    p.squeeze_p,
    p.stop_gradient_p,
    p.transpose_p,
}


MOVEMENT = (
    p.broadcast_in_dim_p,
    p.concatenate_p,
    p.conj_p,
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
    "bcoo_extract",
    "bcoo_transpose",
    "broadcast_to",
    "layout_constraint",
    "optimization_barrier",
    "reshard",
    "split",
    "stack",
    "tile",
    "unstack",
    "wait",  # jlrp.tactics
    "with_memory_space_constraint",
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
SUMS_BY_NAME = ("bcoo_todense", "scatter-sub")
LINEAR = (p.complex_p, p.fft_p, p.imag_p)
SELECTION = (
    p.approx_top_k_p,
    p.clamp_p,
    p.cummax_p,
    p.cummin_p,
    p.max_p,
    p.min_p,
    p.reduce_max_p,
    p.reduce_min_p,
    p.scatter_max_p,
    p.scatter_min_p,
    p.select_and_gather_add_p,
    p.sort_p,
    p.top_k_p,
)
POOLED_SELECTION = (p.reduce_window_max_p, p.reduce_window_min_p)
PRODUCTS = (p.conv_general_dilated_p, p.div_p, p.dot_general_p, p.mul_p)
PRODUCTS_BY_NAME = ("ragged_dot_general",)

# First-order Taylor in all active operands, and why there is nothing better.
FUNCTIONS: dict[Any, str] = {
    p.atan2_p: "of degree 0: its shares sum to nothing, all is remainder",
    p.cumlogsumexp_p: "of no degree; the Taylor form of softmax, as for logsumexp",
    p.pow_p: "of no degree in base and exponent together",
    p.random_gamma_p: "of no degree; the derivative of the reparametrised sample",
    **dict.fromkeys(
        (
            p.igamma_p,
            p.igammac_p,
            p.polygamma_p,
            p.regularized_incomplete_beta_p,
            *present("polynomial"),
        ),
        "of no degree in several active operands",
    ),
}
# The same for complex numbers. Of real ones, unary regions are made.
COMPLEX_FUNCTIONS = tuple(
    primitive
    for primitive in (
        *(p.acos_p, p.acosh_p, p.asin_p, p.asinh_p, p.atan_p, p.atanh_p),
        *(p.cos_p, p.cosh_p, p.exp2_p, p.exp_p, p.expm1_p, p.log1p_p, p.log_p),
        *(p.logistic_p, p.sin_p, p.sinh_p, p.tan_p, p.tanh_p),
        *present("log2", "one_minus_square"),
    )
)

# Euler's identity. The groups of operands, with their degrees.


def _all(degree: Any, linear: bool = False) -> Callable[[Equation], tuple[Group, ...]]:
    """One group of all operands."""

    def groups(equation: Equation) -> tuple[Group, ...]:
        return (Group(tuple(range(len(equation.inputs))), degree, linear),)

    return groups


def _each(*groups: Group) -> Callable[[Equation], tuple[Group, ...]]:
    return lambda equation: groups


def _reduced(equation: Equation) -> tuple[Group, ...]:
    shape = equation.inputs[0].shape
    return (Group((0,), math.prod(shape[a] for a in equation.params["axes"])),)


def _cumulated(equation: Equation) -> tuple[Group, ...]:
    axis, shape = equation.params["axis"], equation.inputs[0].shape
    count = np.arange(1, shape[axis] + 1)
    if equation.params["reverse"]:
        count = count[::-1]
    others = [1] * len(shape)
    others[axis] = -1
    return (Group((0,), count.reshape(others)),)


def _powered(equation: Equation) -> tuple[Group, ...]:
    return (Group((0,), equation.params["y"]),)


def _solved_triangular(equation: Equation) -> tuple[Group, ...]:
    if equation.params["unit_diagonal"]:  # the ones are no part of a
        return (Group((0, 1), 0),)
    return (Group((0,), -1), Group((1,), 1, linear=True))


def _solved(equation: Equation) -> tuple[Group, ...]:
    lengths = equation.params["const_lengths"]
    first = sum(lengths)
    b = tuple(range(first, len(equation.inputs)))
    return (Group(tuple(range(lengths.matvec)), -1), Group(b, 1, linear=True))


def _multiplied(equation: Equation) -> tuple[Group, ...]:
    return (Group((0,), 1, linear=True), Group((2,), COUNTED))


def _reduced_by(equation: Equation) -> tuple[Group, ...]:
    """A reduction with a body of its own; its degree is found in the body."""
    n = len(equation.inputs) // 2
    found = body_degree(equation)
    everything = tuple(range(2 * n))
    if found == "product":
        return (Group(everything, COUNTED),)
    return (Group(everything, 0 if found is None else 1),)


Groups = Callable[[Equation], tuple[Group, ...]]
LINALG: dict[Any, tuple[Groups, str]] = {
    p.cholesky_p: (_all(0.5), "of degree 1/2: 2 A dL/dA"),
    p.eig_p: (_all((1, 0, 0)), "eigenvalues of degree 1, vectors of degree 0"),
    p.eigh_p: (_all((0, 1)), "eigenvalues of degree 1, vectors of degree 0"),
    p.hessenberg_p: (_all(1), "H = Q* A Q with Q held constant"),
    p.householder_product_p: (_all(0), "of no degree: first-order Taylor"),
    p.lu_p: (_all(1), "U of degree 1, L of degree 0"),
    p.qr_p: (_all((0, 1, 0)), "R of degree 1, Q of degree 0"),
    p.schur_p: (_all((1, 0)), "T = Q* A Q with Q held constant"),
    p.svd_p: (_all((1, 0, 0)), "singular values of degree 1, vectors of degree 0"),
    p.triangular_solve_p: (
        _solved_triangular,
        "a product of 1/A and b: each gets half if both are active; with a unit "
        "diagonal first-order Taylor in A",
    ),
    p.tridiagonal_p: (_all(1), "T = Q* A Q with Q held constant"),
    p.tridiagonal_solve_p: (
        _each(Group((0, 1, 2), -1), Group((3,), 1, linear=True)),
        "a product of 1/A and b: each gets half if both are active",
    ),
    p.linear_solve_p: (
        _solved,
        "a product of 1/A and b: each gets half if both are active",
    ),
}
HOMOGENEOUS: dict[Any, tuple[Groups, str]] = {
    p.cumprod_p: (_cumulated, "each of the n factors before an element gets 1/n"),
    p.reduce_prod_p: (_reduced, "each of n factors gets 1/n"),
    p.reduce_p: (
        _reduced_by,
        "by its body: sums and selections are of degree 1, each of n factors gets 1/n; "
        "other bodies by first-order Taylor, a fallback",
    ),
    p.reduce_window_p: (
        _reduced_by,
        "by its body: sums and selections are of degree 1, each of n factors gets 1/n; "
        "other bodies by first-order Taylor, a fallback",
    ),
    p.rem_p: (_all(1), "of degree 1 in both"),
    p.scatter_mul_p: (_multiplied, "each of the n factors of an element gets 1/n"),
    p.select_and_scatter_add_p: (
        _each(Group((0,), 1)),
        "a sum of the source; the operand only selects",
    ),
}
HOMOGENEOUS_BY_NAME: dict[str, tuple[Groups, str]] = {
    "bcoo_dot_general": (
        _each(Group((0,), 1, linear=True), Group((2,), 1, linear=True)),
        "a product of the matrix's entries and the other operand",
    ),
}
# Of complex numbers; of real ones, unary regions are made.
COMPLEX_POWERS: dict[Any, Groups] = {
    p.abs_p: _all(1),
    p.cbrt_p: _all(1 / 3),
    p.integer_pow_p: _powered,
    p.rsqrt_p: _all(-0.5),
    p.sqrt_p: _all(0.5),
    p.square_p: _all(2),
}
_QUOTIENT = _each(Group((0,), 1, linear=True), Group((1,), -1))


def groups_of(equation: Equation) -> tuple[Group, ...]:
    """The groups of operands in which a homogeneous equation has a degree."""
    prim = equation.primitive
    if prim is p.div_p:
        return _QUOTIENT(equation)
    if prim in COMPLEX_POWERS:
        return COMPLEX_POWERS[prim](equation)
    found = LINALG.get(prim) or HOMOGENEOUS.get(prim) or HOMOGENEOUS_BY_NAME[prim.name]
    return found[0](equation)


# Operands that say which numbers move, not which numbers they are.
STEERING: dict[Any, range] = {
    p.dynamic_slice_p: range(1, 99),
    p.dynamic_update_slice_p: range(2, 99),
    p.gather_p: range(1, 2),
    p.scatter_add_p: range(1, 2),
    p.scatter_max_p: range(1, 2),
    p.scatter_min_p: range(1, 2),
    p.scatter_mul_p: range(1, 2),
    p.scatter_p: range(1, 2),
    p.select_n_p: range(0, 1),
}

# What carries no relevance.

RANDOM = (p.random_bits_p, p.rng_uniform_p, p.rng_bit_generator_p, p.threefry2x32_p)
NO_RELEVANCE: dict[Any, str] = {
    **dict.fromkeys(
        (p.argmax_p, p.argmin_p, p.eq_p, p.ge_p, p.gt_p, p.le_p, p.lt_p, p.ne_p),
        "integers and booleans carry no relevance",
    ),
    **dict.fromkeys(
        (
            *(p.and_p, p.not_p, p.or_p, p.xor_p, p.clz_p, p.population_count_p),
            *(p.reduce_and_p, p.reduce_or_p, p.reduce_xor_p, p.axis_index_p),
            *(p.shift_left_p, p.shift_right_arithmetic_p, p.shift_right_logical_p),
            *(p.eq_to_p, p.le_to_p, p.lt_to_p),
        ),
        "integers and booleans carry no relevance",
    ),
    p.bitcast_convert_type_p: "reads the bits of a number, which have no derivative",
    **dict.fromkeys(
        (p.ceil_p, p.floor_p, p.round_p, p.sign_p, p.is_finite_p, p.nextafter_p),
        "piecewise constant: its derivative is zero",
    ),
    p.stop_gradient_p: "the user declared it a constant",
    p.iota_p: "depends on nothing",
    p.empty2_p: "depends on nothing",
    **dict.fromkeys((p.after_all_p, p.create_token_p), "a token orders effects"),
    **dict.fromkeys(RANDOM, "random bits are constants"),
    **dict.fromkeys(
        (p.random_fold_in_p, p.random_seed_p, p.random_split_p),
        "random keys are constants",
    ),
}
NO_RELEVANCE_BY_NAME: dict[str, str] = {
    **dict.fromkeys(
        ("random_clone", "random_unwrap", "random_wrap"), "random keys are constants"
    ),
    "anywhere": "integers and booleans carry no relevance",  # jlrp.tactics
    "iota_2x32_shape": "depends on nothing",
    "lu_pivots_to_permutation": "integers and booleans carry no relevance",
    **dict.fromkeys(("debug_callback", "debug_print"), "has no output"),
}

# What is explained elsewhere.

CONTROL_FLOW = (p.scan_p, p.while_p, p.cond_p)
COLLECTIVES = (
    p.all_gather_p,
    p.all_to_all_p,
    p.pmax_p,
    p.pmin_p,
    p.ppermute_p,
    p.psum_p,
    p.ragged_all_to_all_p,
)
COLLECTIVES_BY_NAME = (
    "all_gather_invariant",
    "pbroadcast",
    "psum_invariant",
    "pvary",
    "reduce_scatter",
    "shard_map",
)
CALLS = present(
    *("call", "closed_call", "custom_jvp_call", "custom_vjp_call", "jit", "remat")
)
NAMES = (p.name_p,)

# What no rule can be derived for.

_OPAQUE = "opaque: what it computes is not in the program"
_REFERENCES = "reads or writes a mutable reference, which is no value"
_NO_DERIVATIVE = "JAX has no derivative of it"
NEEDS_RULE: dict[Any, str] = {
    p.igamma_grad_a_p: f"{_NO_DERIVATIVE}; it appears in derivatives of igamma by a",
    p.select_and_scatter_p: f"{_NO_DERIVATIVE}; no public function makes it",
    p.custom_lin_p: "internal: no traced program holds it",
    **dict.fromkeys((p.get_p, p.swap_p), _REFERENCES),
}
KERNELS = (
    *("custom_partitioning", "ffi_call", "io_callback", "pallas_call"),
    "pure_callback",
)
NEEDS_RULE_BY_NAME: dict[str, str] = {
    **dict.fromkeys(KERNELS, _OPAQUE),
    **dict.fromkeys(("addupdate", "freeze", "free_ref", "new_ref"), _REFERENCES),
    **dict.fromkeys(
        ("cholesky_update", "geqp3", "geqrf", "ormqr", "symmetric_product"),
        _NO_DERIVATIVE,
    ),
}


# Of an equation, the positions of its active operands and of its active outputs.
Lacks = Callable[[Equation, Collection[int], Collection[int]], str | None]


def _betainc(equation: Equation, active: Collection[int], _: Any) -> str | None:
    return _NO_DERIVATIVE + " by a and b" if {0, 1} & set(active) else None


def _first(equation: Equation, active: Collection[int], _: Any) -> str | None:
    return _NO_DERIVATIVE + " by its first operand" if 0 in active else None


def _svd(equation: Equation, active: Any, outputs: Collection[int]) -> str | None:
    *_, m, n = equation.inputs[0].shape
    full = equation.params["full_matrices"] and equation.params["compute_uv"]
    return f"{_NO_DERIVATIVE}: use full_matrices=False" if full and m != n else None


def _eig(equation: Equation, active: Any, outputs: Collection[int]) -> str | None:
    allowed = equation.params.get("enable_eigvec_derivs", False)
    if allowed or not set(outputs) - {0}:
        return None
    return f"{_NO_DERIVATIVE}'s vectors: use enable_eigvec_derivs=True"


def _scatter(equation: Equation, active: Any, outputs: Any) -> str | None:
    if equation.params.get("update_jaxpr") is None:
        return None
    return f"{_NO_DERIVATIVE} with a function: write x.at[i].set(f(x[i]))"


def _solve(equation: Equation, active: Any, outputs: Any) -> str | None:
    if equation.params["jaxprs"].transpose_solve is not None:
        return None
    return f"{_NO_DERIVATIVE}: give it transpose_solve, or symmetric=True"


_LACKS: dict[Any, Lacks] = {
    p.eig_p: _eig,
    p.linear_solve_p: _solve,
    p.polygamma_p: _first,
    p.regularized_incomplete_beta_p: _betainc,
    p.scatter_p: _scatter,
    p.svd_p: _svd,
    p.zeta_p: _first,
}


def rounds(equation: Equation) -> bool:
    """Whether a cast keeps so few digits (float8) that the number is another one."""
    out = equation.outputs[0].dtype
    if equation.primitive is p.reduce_precision_p:
        return equation.params["mantissa_bits"] < _DIGITS
    if equation.primitive is not p.convert_element_type_p:
        return False
    if not jnp.issubdtype(out, jnp.floating):
        return False
    given = equation.inputs[0].dtype
    return jnp.finfo(out).nmant < _DIGITS and out != given


_DIGITS = jnp.finfo(jnp.bfloat16).nmant  # casts to it are taken as exact


def positions(atoms: Sequence[Any], among: Collection[Any]) -> list[int]:
    """Where in a sequence some values are."""
    return [i for i, atom in enumerate(atoms) if atom in among]


def why_missing(equation: Equation, active: Collection[Any]) -> str | None:
    """Why no rule can be derived, with some operands and outputs active."""
    prim = equation.primitive
    why = NEEDS_RULE.get(prim) or NEEDS_RULE_BY_NAME.get(prim.name)
    if why is None and prim in _LACKS:
        operands = positions(equation.inputs, active)
        why = _LACKS[prim](equation, operands, positions(equation.outputs, active))
    return why


# The families.

_THROUGH = "linear: through the transpose"
_FOLLOWS = "follows each number to where it came from"
_WINNERS = "goes where the value came from; ties as in JAX's gradient"
_SHARED = "shared among active factors (Uniform, Gate); linear in a single one"
_TAYLOR = "first-order Taylor: "
FAMILIES: dict[Any, Family] = {
    **dict.fromkeys(MOVEMENT, Family("movement", "movement", _FOLLOWS)),
    **dict.fromkeys(SUMS, Family("sum", "linear", _THROUGH)),
    **dict.fromkeys(
        (p.add_p, p.sub_p, p.add_jaxvals_p), Family("add", "linear", _THROUGH)
    ),
    **dict.fromkeys(LINEAR, Family("linear", "linear", _THROUGH)),
    **dict.fromkeys(SELECTION, Family("selection", "selection", _WINNERS)),
    **dict.fromkeys(POOLED_SELECTION, Family("max_pool", "selection", _WINNERS)),
    **dict.fromkeys(PRODUCTS, Family("product", "product", _SHARED)),
    **{
        prim: Family("function", "function", _TAYLOR + why)
        for prim, why in FUNCTIONS.items()
    },
    straight_through_p: Family(
        "rounding", "rounding", "a quantiser: passes where it does not clip"
    ),
    p.zeta_p: Family(
        "function", "homogeneous", _TAYLOR + "of no degree; by its second operand only"
    ),
    **{prim: Family("linalg", "homogeneous", how) for prim, (_, how) in LINALG.items()},
    **{
        prim: Family("function", "homogeneous", how)
        for prim, (_, how) in HOMOGENEOUS.items()
    },
}
_BY_NAME: dict[str, Family] = {
    **dict.fromkeys(MOVEMENT_BY_NAME, Family("movement", "movement", _FOLLOWS)),
    **dict.fromkeys(SUMS_BY_NAME, Family("sum", "linear", _THROUGH)),
    **dict.fromkeys(PRODUCTS_BY_NAME, Family("product", "product", _SHARED)),
    **{
        name: Family("function", "homogeneous", how)
        for name, (_, how) in HOMOGENEOUS_BY_NAME.items()
    },
}
_OF_COMPLEX: dict[Any, Family] = {
    **dict.fromkeys(
        COMPLEX_FUNCTIONS, Family("function", "function", _TAYLOR + "of no degree")
    ),
    **dict.fromkeys(COMPLEX_POWERS, Family("function", "homogeneous", "of degree n")),
}
# Calls that are not looked into, since they hold an opaque kernel.
_WITH_KERNEL = dict.fromkeys(
    (p.custom_jvp_call_p, p.custom_vjp_call_p),
    Family("function", "function", _TAYLOR + "by the user's derivative", exact=False),
)
HOMOGENEOUS[p.zeta_p] = (_each(Group((1,), 0)), FAMILIES[p.zeta_p].how)

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
    "linalg",
    "linear",
    "max_pool",
    "mean",
    "movement",
    "norm",
    "product",
    "rounding",
    "scale",
    "selection",
    "softmax",
    "sum",
    "unsupported",
)
_MAPS = {p.dot_general_p: "dense", p.conv_general_dilated_p: "conv"}


def family_of(primitive: Any) -> Family | None:
    """The family of a primitive, whatever its operands."""
    return (
        FAMILIES.get(primitive)
        or _BY_NAME.get(primitive.name)
        or _OF_COMPLEX.get(primitive)
        or _WITH_KERNEL.get(primitive)
    )


def family_at(equation: Equation, active: Collection[Any]) -> Family | None:
    """The family of an equation of which some operands and outputs are active.

    With a single active operand, products and solvers are linear.
    """
    prim = equation.primitive
    family = family_of(prim)
    if family is None or why_missing(equation, active) is not None:
        return None
    operands = positions(equation.inputs, active)
    if family.nature == "product" and len(operands) == 1:
        if prim is p.div_p and operands[0] == 1:
            return family._replace(kind="function", nature="homogeneous")
        kind = _MAPS.get(prim, "dense" if prim.name in PRODUCTS_BY_NAME else "linear")
        return family._replace(kind=kind, nature="linear")
    if family.nature == "homogeneous":
        groups = [g for g in groups_of(equation) if set(g.operands) & set(operands)]
        # What only steers a solver (its tolerance, made from b) is in no group.
        alone = len(groups) == 1 and set(operands) <= set(groups[0].operands)
        if alone and groups[0].linear:
            kind = "linear" if family.kind == "function" else family.kind
            return family._replace(kind=kind, nature="linear")
    return family


# What only chooses.


def taken_from(equation: Equation) -> list[set[int]] | None:
    """For each output, the operands whose numbers it may be; None: all of them.

    The key of a sort, or of a reduction that finds a winner, chooses among others'.
    """
    if equation.primitive is p.sort_p:
        return [{i} for i in range(len(equation.inputs))]
    if equation.primitive not in (p.reduce_p, p.reduce_window_p):
        return None
    n = len(equation.inputs) // 2
    found: list[set[int]] = [{j} for j in range(n)]
    jaxpr, _ = body_of(equation)
    while True:  # what is left over is an operand of the next call of the body
        outs = _sources(jaxpr, [*found, *found])
        grown = [a | b for a, b in zip(found, outs, strict=True)]
        if grown == found:
            return [{i for j in part for i in (j, n + j)} for part in found]
        found = grown


def _sources(jaxpr: Any, x: Sequence[set[int]]) -> list[set[int]]:
    """The operands that a body's outputs depend on through real or complex numbers."""
    known: dict[Any, set[int]] = dict(zip(jaxpr.invars, x, strict=True))

    def of(atom: Any) -> set[int]:
        known_here = not jax_compat.is_literal(atom) and is_inexact(atom)
        return known.get(atom, set()) if known_here else set()

    for eqn in jaxpr.eqns:
        call = jax_compat.call_body(eqn)
        operands = [of(a) for a in eqn.invars]
        if call is not None:
            outs = _sources(call[0], operands)
        else:
            outs = [set[int]().union(*operands)] * len(eqn.outvars)
        known.update(zip(eqn.outvars, outs, strict=True))
    return [of(a) for a in jaxpr.outvars]


def choosing(equation: Equation, active: Collection[Any]) -> frozenset[Any]:
    """The operands of which no active output takes its numbers."""
    sources = taken_from(equation)
    if sources is None:
        return frozenset()
    wanted = positions(equation.outputs, active)
    taken = {i for j in wanted for i in sources[j]}
    kept = [equation.inputs[i] for i in taken]
    return frozenset(a for a in equation.inputs if a not in kept)


# The degree of a reduction's body.


def body_degree(equation: Equation) -> str | None:
    """What the body of a ``reduce`` or ``reduce_window`` is.

    ``"sum"``, ``"product"``, ``"homogeneous"`` (of degree 1: selections), or None.
    """
    jaxpr, _ = body_of(equation)
    if [eqn.primitive for eqn in jaxpr.eqns] in ([p.mul_p], [p.add_p]):
        (eqn,) = jaxpr.eqns
        if not any(map(jax_compat.is_literal, eqn.invars)) and len(jaxpr.outvars) == 1:
            return "product" if eqn.primitive is p.mul_p else "sum"
    degrees = [1 if is_inexact(v) else 0 for v in jaxpr.invars]
    found = _degrees(jaxpr, degrees)
    outs = [
        degree
        for atom, degree in zip(jaxpr.outvars, found, strict=True)
        if jax_compat.is_literal(atom) or is_inexact(atom)
    ]
    return "homogeneous" if all(degree == 1 for degree in outs) else None


def _degrees(jaxpr: Any, x: Sequence[int | None]) -> list[int | None]:
    """The degrees of a body's outputs in all its operands together."""
    known: dict[Any, int | None] = dict(zip(jaxpr.invars, x, strict=True))

    def of(atom: Any) -> int | None:
        return None if jax_compat.is_literal(atom) else known.get(atom)

    for eqn in jaxpr.eqns:
        operands = [of(a) for a in eqn.invars]
        call = jax_compat.call_body(eqn)
        if call is None:
            outs = [_degree_of(eqn.primitive, operands)] * len(eqn.outvars)
        else:
            outs = _degrees(call[0], operands)
        known.update(zip(eqn.outvars, outs, strict=True))
    return [of(a) for a in jaxpr.outvars]


def body_of(equation: Equation) -> tuple[Any, Sequence[Any]]:
    """The jaxpr of a reduction's body and its constants."""
    jaxpr, consts = jax_compat.open_jaxpr(equation.params["jaxpr"])
    return jaxpr, equation.params.get("consts", consts)


def is_inexact(atom: Any) -> bool:
    """Whether a value of the program or of a jaxpr holds real or complex numbers."""
    dtype = atom.dtype if hasattr(atom, "dtype") else atom.aval.dtype
    return jnp.issubdtype(dtype, jnp.inexact)


_COMPARED = {p.eq_p, p.ge_p, p.gt_p, p.le_p, p.lt_p, p.ne_p}
_KEPT = {
    *(p.add_p, p.sub_p, p.neg_p, p.max_p, p.min_p, p.copy_p),
    p.convert_element_type_p,
}


def _degree_of(primitive: Any, x: list[int | None]) -> int | None:
    """The degree of what is computed from operands of known degrees."""
    if primitive is p.select_n_p:
        which, *x = x
        return x[0] if which == 0 and len(set(x)) == 1 else None
    if None in x or len(set(x)) > 1:
        return None
    if primitive in _COMPARED:
        return 0
    if x[0] == 0 or primitive in _KEPT:
        return x[0]
    return None


# The table, for the documentation.

STATES = {  # beside the kinds
    "call": "looked into: its body is part of the program",
    "collective": "of a shard_map: all devices together compute one program, in which "
    "it is a sum, a maximum or a movement",
    "control flow": "explained by the operations in its bodies",
    "name": "names a value, and is none of its own",
    "needs a rule": "an error, unless a rule is registered",
    "no relevance": "its output is a constant to relevance",
}


class Row(NamedTuple):
    """One primitive of the table: its kind or state, and how relevance passes."""

    primitive: str
    kind: str
    how: str


def rows(unary: Collection[Any]) -> Iterator[Row]:
    """How every primitive carries relevance; ``unary`` are the functions of one value.

    Of complex numbers, these are powers, or explained by first-order Taylor.
    """
    passes = "passes if f(0) = 0 or f is a power, else first-order Taylor"
    by_kind: list[tuple[Collection[Any], str, str]] = [
        (unary, "activation", passes),
        *(([prim], family.kind, family.how) for prim, family in FAMILIES.items()),
        *(([name], family.kind, family.how) for name, family in _BY_NAME.items()),
        *(([prim], "no relevance", why) for prim, why in NO_RELEVANCE.items()),
        *(([name], "no relevance", why) for name, why in NO_RELEVANCE_BY_NAME.items()),
        *(([prim], "needs a rule", why) for prim, why in NEEDS_RULE.items()),
        *(([name], "needs a rule", why) for name, why in NEEDS_RULE_BY_NAME.items()),
        (CONTROL_FLOW, "control flow", STATES["control flow"]),
        (dict.fromkeys(CALLS), "call", STATES["call"]),
        (NAMES, "name", STATES["name"]),
        (COLLECTIVES + COLLECTIVES_BY_NAME, "collective", STATES["collective"]),
    ]
    for primitives, kind, how in by_kind:
        for prim in primitives:
            yield Row(prim if isinstance(prim, str) else prim.name, kind, how)
