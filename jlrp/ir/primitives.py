"""The table of primitives: one row holds all that is known of one, and is called here.

``traits(equation)`` is the row of an equation's primitive; every set of primitives that
jlrp asks for is a query of its columns (``traits.py``). A row is given by name where
JAX has no public object, or an older version lacks the primitive.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from jax.extend.core import Primitive
from jax.extend.core import primitives as p

from jlrp.ir import derivatives, homogeneity
from jlrp.ir.homogeneity import in_groups, of_degree
from jlrp.ir.jax_compat import Params
from jlrp.ir.own_primitives import straight_through_p
from jlrp.ir.traits import (
    REALS,
    TABLE,
    Family,
    Group,
    Groups,
    Known,
    Scalar,
    Traits,
)
from jlrp.ir.traits import traits as traits

inf, pi = math.inf, math.pi

# How relevance passes, for the documentation.

_PASSES = "passes if f(0) = 0 or f is a power, else first-order Taylor"
_THROUGH = "linear: through the transpose"
_FOLLOWS = "follows each number to where it came from"
_WINNERS = "goes where the value came from; ties as in JAX's gradient"
_SHARED = "shared among active factors (Uniform, Gate); linear in a single one"
_TAYLOR = "first-order Taylor: "
_HALVES = "a product of 1/A and b: each gets half if both are active"
_BY_BODY = (
    "by its body: sums and selections are of degree 1, each of n factors gets 1/n; "
    "other bodies by first-order Taylor, a fallback"
)
_NARY = "of no degree in several active operands"

# And why it does not.

_INTEGERS = "integers and booleans carry no relevance"
_STEPS = "piecewise constant: its derivative is zero"
_INDEPENDENT = "depends on nothing"
_KEYS = "random keys are constants"
_TOKEN = "a token orders effects"
_OPAQUE = "opaque: what it computes is not in the program"
_REFERENCE = "reads or writes a mutable reference, which is no value"

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
STATES = {  # beside the kinds
    "call": "looked into: its body is part of the program",
    "collective": "of a shard_map: all devices together compute one program, in which "
    "it is a sum, a maximum or a movement",
    "control flow": "explained by the operations in its bodies",
    "name": "names a value, and is none of its own",
    "needs a rule": "an error, unless a rule is registered",
    "no relevance": "its output is a constant to relevance",
}

# The ways to write a row: a primitive, or its name, its NumPy function, its traits.

Which = Primitive | str
NumPyFunction = Callable[..., Scalar] | None
Column: TypeAlias = (
    bool
    | float
    | str
    | tuple[float, float]
    | range
    | Family
    | Callable[..., object]
    | None
)
"""What a column holds; ``Traits`` says which holds what."""


def row(which: Which, function: NumPyFunction = None, **columns: Column) -> Traits:
    """A row of any columns; ``function`` is evaluated without the parameters."""
    if isinstance(which, str):
        found = getattr(p, f"{which}_p", None)
        name = which if found is None else found.name
    else:
        found, name = which, which.name
    if function is not None:
        columns["evaluate"] = lambda *x, **params: function(*x)
    held: dict[str, Any] = columns
    return Traits(name=name, primitive=found, **held)


def of_family(
    which: Which, function: NumPyFunction, family: Family, **columns: Column
) -> Traits:
    """What carries relevance, whatever its operands."""
    columns = {"kind": family.kind, "how": family.how, "family": family} | columns
    return row(which, function, **columns)


def elementwise(
    which: Which,
    function: NumPyFunction = None,
    *,
    degree: float | Callable[[Params], float] | None = None,
    complex: bool = True,
    **columns: Column,
) -> Traits:
    """A function of one value that is not linear: an activation, or a part of one.

    Of a ``complex`` number it is no activation: a power has its degree, any other
    function is explained by first-order Taylor.
    """
    family = None
    if complex and degree is None:
        family = Family("function", "function", f"{_TAYLOR}of no degree")
    elif complex:
        columns["groups"] = homogeneity.power
        family = Family("function", "homogeneous", "of degree n")
    shown = {"kind": "activation", "how": _PASSES, "family": family}
    known = {"elementwise": True, "cheap": True, "degree": degree}
    return row(which, function, **shown, **known, **columns)


def movement(which: Which, function: NumPyFunction = None, **columns: Column) -> Traits:
    family = Family("movement", "movement", _FOLLOWS)
    columns = {"cheap": True, "arithmetic": True} | columns
    return of_family(which, function, family, **columns)


def layout(which: Which) -> Traits:
    """The same numbers in another shape or order."""
    return movement(which, _same, layout=True, codes="moves")


def cast(which: Which, **columns: Column) -> Traits:
    """The same number, but for its dtype."""
    known = {"elementwise": True, "monotone": +1, "degree": 1, "ratio": "same"}
    return movement(which, None, **known, **columns)


def sums(which: Which, **columns: Column) -> Traits:
    columns = {"arithmetic": True} | columns
    return of_family(which, None, Family("sum", "linear", _THROUGH), **columns)


def addition(which: Which, function: NumPyFunction) -> Traits:
    """The sum or difference of two operands."""
    family = Family("add", "linear", _THROUGH)
    known = {"elementwise": True, "cheap": True, "arithmetic": True, "adds": True}
    return of_family(which, function, family, codes="computes", ratio="sum", **known)


def linear(which: Which) -> Traits:
    return of_family(which, None, Family("linear", "linear", _THROUGH))


def selection(
    which: Which, function: NumPyFunction = None, **columns: Column
) -> Traits:
    columns = {"arithmetic": True} | columns
    family = Family("selection", "selection", _WINNERS)
    return of_family(which, function, family, **columns)


def clipping(which: Which, function: NumPyFunction, **columns: Column) -> Traits:
    """The larger or smaller operand, element by element."""
    known = {"elementwise": True, "cheap": True, "codes": "computes"}
    return selection(which, function, **known, **columns)


def pooling(which: Which) -> Traits:
    return of_family(which, None, Family("max_pool", "selection", _WINNERS))


def product(which: Which, function: NumPyFunction = None, **columns: Column) -> Traits:
    family = Family("product", "product", _SHARED)
    return of_family(which, function, family, **columns)


def scaling(which: Which, function: NumPyFunction, **columns: Column) -> Traits:
    """The product or quotient of two operands, element by element."""
    known = {"elementwise": True, "cheap": True, "codes": "computes"}
    return product(which, function, partial=True, **known, **columns)


def homogeneous(
    which: Which, groups: Groups, how: str, kind: str = "function", **columns: Column
) -> Traits:
    family = Family(kind, "homogeneous", how)
    return of_family(which, None, family, groups=groups, **columns)


def linalg(which: Which, groups: Groups, how: str, **columns: Column) -> Traits:
    return homogeneous(which, groups, how, "linalg", **columns)


def taylor(which: Which, why: str, **columns: Column) -> Traits:
    """First-order Taylor in all active operands, and why there is nothing better."""
    return of_family(
        which, None, Family("function", "function", _TAYLOR + why), **columns
    )


def taylor_elementwise(which: Which, why: str, **columns: Column) -> Traits:
    return taylor(which, why, elementwise=True, cheap=True, **columns)


def constant(
    which: Which, why: str, function: NumPyFunction = None, **columns: Column
) -> Traits:
    """What carries no relevance."""
    return row(which, function, kind="no relevance", how=why, **columns)


def steps(which: Which, function: NumPyFunction = None, **columns: Column) -> Traits:
    """A piecewise constant function of one value."""
    return constant(which, _STEPS, function, elementwise=True, **columns)


def comparison(which: Which, function: NumPyFunction) -> Traits:
    known = {"elementwise": True, "comparison": True, "cheap": True, "range": (0, 1)}
    return constant(which, _INTEGERS, function, **known)


def logic(which: Which, function: NumPyFunction, **columns: Column) -> Traits:
    columns = {"cheap": True, "codes": "computes"} | columns
    return constant(which, _INTEGERS, function, elementwise=True, logic=True, **columns)


def needs_rule(which: Which, why: str, **columns: Column) -> Traits:
    return row(which, None, kind="needs a rule", how=why, **columns)


def opaque(which: Which) -> Traits:
    return needs_rule(which, _OPAQUE, kernel=True)


def no_derivative(which: Which, more: str = "") -> Traits:
    return needs_rule(which, derivatives.NO_DERIVATIVE + more)


def state(which: Which, kind: str, **columns: Column) -> Traits:
    """What is explained elsewhere."""
    return row(which, None, kind=kind, how=STATES[kind], **columns)


def call(which: Which, **columns: Column) -> Traits:
    return state(which, "call", **columns)


def declared(which: Which) -> Traits:
    """A call with a derivative of its own: taken if it holds an opaque kernel."""
    how = f"{_TAYLOR}by the user's derivative"
    return call(which, family=Family("function", "function", how, exact=False))


# Functions of scalars that NumPy does not have; where it is not known, None.


def _same(x: Scalar, **params: object) -> Scalar:
    return x


def _only_at_zero(value: float) -> Callable[[Known], Scalar]:
    return lambda x: value if x == 0 else None


def _last_at_zero(value: float) -> Callable[..., Scalar]:
    """Whatever the operands before the last are."""
    return lambda *x: None if x[-1] is None or x[-1] != 0 else value


def _times(a: Scalar, b: Scalar) -> Scalar:
    if a is not None and b is not None:
        return np.multiply(a, b)
    known = b if a is None else a
    return 0.0 if known is not None and known == 0 else None


def _divided(a: Scalar, b: Scalar) -> Scalar:
    if a is None:
        return None
    if b is None:
        return 0.0 if a == 0 else None
    return np.divide(a, b)


def _chosen(which: Scalar, *cases: Scalar) -> Scalar:
    if which is not None:
        return cases[int(np.asarray(which))]
    first = cases[0]
    return first if all(v is not None and v == first for v in cases) else None


def _clamped(low: Known, x: Known, high: Known) -> Scalar:
    return np.minimum(np.maximum(x, low), high)


def _polynomial(x: Scalar, *coefficients: Scalar) -> Scalar:
    if x is not None and x == 0:
        return coefficients[0]
    known = [c for c in coefficients if c is not None]
    if x is None or len(known) < len(coefficients):
        return None
    total, power = np.float64(0), np.float64(1)
    for coefficient in known:
        total, power = total + coefficient * power, power * x
    return total


def _converted(x: Known, *, new_dtype: np.dtype, **_: object) -> Scalar:
    return np.asarray(x).astype(new_dtype)


def _sigmoid(x: Known) -> Scalar:
    return 1 / (1 + np.exp(-x))


def _inverse_root(x: Known) -> Scalar:
    return 1 / np.sqrt(x)


def _log_gamma(x: Known) -> Scalar:
    x = float(x)
    return inf if x <= 0 and x.is_integer() else math.lgamma(x) if x > -inf else None


# The rows.

_OPERANDS = range(1, 99)  # all but the first
_INDICES = range(1, 2)
_MANY = range(2, 99)

ROWS = (
    # Functions of one value.
    elementwise(
        p.abs_p, np.abs, range=(0, inf), degree=1, arithmetic=True, codes="computes"
    ),
    elementwise(p.acos_p, np.arccos, monotone=-1, range=(0, pi)),
    elementwise(p.acosh_p, np.arccosh, monotone=+1, range=(0, inf)),
    elementwise(p.asin_p, np.arcsin, monotone=+1, range=(-pi / 2, pi / 2), ratio="own"),
    elementwise(p.asinh_p, np.arcsinh, monotone=+1, ratio="own"),
    elementwise(p.atan_p, np.arctan, monotone=+1, range=(-pi / 2, pi / 2), ratio="own"),
    elementwise(p.atanh_p, np.arctanh, monotone=+1, ratio="own"),
    elementwise(p.bessel_i0e_p, _only_at_zero(1.0), range=(0, 1), complex=False),
    elementwise(p.bessel_i1e_p, _only_at_zero(0.0), range=(-1, 1), complex=False),
    elementwise(p.cbrt_p, np.cbrt, monotone=+1, degree=1 / 3),
    elementwise(p.cos_p, np.cos, range=(-1, 1)),
    elementwise(p.cosh_p, np.cosh, range=(1, inf)),
    elementwise(p.digamma_p, complex=False),
    elementwise(p.erf_inv_p, _only_at_zero(0.0), monotone=+1, complex=False),
    elementwise(p.erf_p, math.erf, monotone=+1, range=(-1, 1), complex=False),
    elementwise(p.erfc_p, math.erfc, monotone=-1, range=(0, 2), complex=False),
    elementwise(p.exp2_p, np.exp2, monotone=+1, range=(0, inf), base=2),
    elementwise(p.exp_p, np.exp, monotone=+1, range=(0, inf), base=math.e),
    elementwise(p.expm1_p, np.expm1, monotone=+1, range=(-1, inf), ratio="own"),
    elementwise(
        p.integer_pow_p,
        evaluate=lambda x, y: np.float64(x) ** y,
        monotone=lambda params: +1 if params["y"] > 0 and params["y"] % 2 else 0,
        range=lambda params: REALS if params["y"] % 2 else (0, inf),
        degree=lambda params: params["y"],
        ratio="power",
        arithmetic=True,
    ),
    elementwise(p.lgamma_p, _log_gamma, complex=False),
    elementwise(p.log1p_p, np.log1p, monotone=+1, ratio="own"),
    elementwise("log2", np.log2, monotone=+1),
    elementwise(p.log_p, np.log, monotone=+1),
    elementwise(p.logistic_p, _sigmoid, monotone=+1, range=(0, 1)),
    elementwise("one_minus_square", lambda x: 1 - x * x, range=(-inf, 1)),
    elementwise(p.rsqrt_p, _inverse_root, monotone=-1, range=(0, inf), degree=-0.5),
    elementwise(p.sin_p, np.sin, range=(-1, 1), ratio="own"),
    elementwise(p.sinh_p, np.sinh, monotone=+1, ratio="own"),
    elementwise(p.sqrt_p, np.sqrt, monotone=+1, range=(0, inf), degree=0.5),
    elementwise(
        p.square_p, np.square, range=(0, inf), degree=2, ratio="power", arithmetic=True
    ),
    elementwise(p.tan_p, np.tan, ratio="own"),
    elementwise(p.tanh_p, np.tanh, monotone=+1, range=(-1, 1), ratio="own"),
    # The same number, or its negative.
    cast(p.convert_element_type_p, evaluate=_converted, codes="moves"),
    cast(p.copy_p, evaluate=_same, codes="moves"),
    cast(p.reduce_precision_p),
    movement(p.conj_p),
    movement(
        p.neg_p,
        np.negative,
        elementwise=True,
        monotone=-1,
        degree=1,
        ratio="negated",
        codes="computes",
    ),
    movement(p.real_p, elementwise=True),
    # The same numbers elsewhere.
    layout(p.broadcast_in_dim_p),
    layout(p.reshape_p),
    layout(p.squeeze_p),
    layout(p.transpose_p),
    movement(p.concatenate_p, codes="moves", adds=True),
    movement(p.device_put_p, codes="moves"),
    movement(p.dynamic_slice_p, codes="moves", fetches=True, steering=_OPERANDS),
    movement(p.dynamic_update_slice_p, codes="moves", adds=True, steering=_MANY),
    movement(p.gather_p, codes="moves", fetches=True, adds=True, steering=_INDICES),
    movement(p.pad_p, codes="moves", adds=True),
    movement(p.rev_p, codes="moves"),
    movement(
        p.scatter_p,
        codes="moves",
        adds=True,
        transposes=False,  # JAX does it only if indices are unique
        steering=_INDICES,
        lacks=derivatives.scatter,
    ),
    movement(
        p.select_n_p,
        _chosen,
        partial=True,
        elementwise=True,
        ratio="chosen",
        codes="computes",
        adds=True,
        steering=range(1),
    ),
    movement(p.sharding_constraint_p),
    movement(p.slice_p, codes="moves"),
    movement("bcoo_extract"),
    movement("bcoo_transpose"),
    movement("broadcast_to"),
    movement("layout_constraint"),
    movement("optimization_barrier"),
    movement("reshard"),
    movement("split"),
    movement("stack"),
    movement("tile"),
    movement("unstack"),
    movement("depend", internal=True),  # jlrp.tactics
    movement("with_memory_space_constraint"),
    # Sums.
    addition(p.add_jaxvals_p, np.add),
    addition(p.add_p, np.add),
    addition(p.sub_p, np.subtract),
    sums(p.cumsum_p),
    sums(p.reduce_sum_p, reduction="sum", mean="mean", cheap=True),
    sums(p.reduce_window_sum_p, mean="avg_pool"),
    sums(p.scatter_add_p, adds=True, steering=_INDICES),
    sums("bcoo_todense", adds=True, arithmetic=False),
    sums("scatter-sub", adds=True, arithmetic=False),
    linear(p.complex_p),
    linear(p.fft_p),
    linear(p.imag_p),
    # Selections.
    clipping(p.clamp_p, _clamped),
    clipping(p.max_p, np.maximum, ratio="extreme"),
    clipping(p.min_p, np.minimum, ratio="extreme"),
    selection(p.approx_top_k_p, arithmetic=False),
    selection(p.cummax_p),
    selection(p.cummin_p),
    selection(p.reduce_max_p, reduction="max", cheap=True),
    selection(p.reduce_min_p, reduction="min", cheap=True),
    selection(p.scatter_max_p, steering=_INDICES),
    selection(p.scatter_min_p, steering=_INDICES),
    selection(p.select_and_gather_add_p),
    selection(p.sort_p, arithmetic=False),
    selection(p.top_k_p, arithmetic=False),
    pooling(p.reduce_window_max_p),
    pooling(p.reduce_window_min_p),
    # Products.
    product(
        p.conv_general_dilated_p, linear_kind="conv", contraction=True, arithmetic=True
    ),
    product(p.dot_general_p, linear_kind="dense", contraction=True, arithmetic=True),
    product("ragged_dot_general", linear_kind="dense"),  # a kernel for each group
    scaling(
        p.div_p,
        _divided,
        groups=in_groups(Group((0,), 1, linear=True), Group((1,), -1)),
        ratio="quotient",
    ),
    scaling(p.mul_p, _times, ratio="product", arithmetic=True),
    # Homogeneous functions.
    homogeneous(
        p.cumprod_p,
        homogeneity.running_product,
        "each of the n factors before an element gets 1/n",
    ),
    homogeneous(
        p.reduce_prod_p,
        homogeneity.product_over_axes,
        "each of n factors gets 1/n",
        reduction="product",
        arithmetic=True,
    ),
    homogeneous(p.reduce_p, homogeneity.by_body, _BY_BODY),
    homogeneous(p.reduce_window_p, homogeneity.by_body, _BY_BODY),
    homogeneous(
        p.rem_p,
        of_degree(1),
        "of degree 1 in both",
        elementwise=True,
        cheap=True,
        codes="computes",
        evaluate=lambda a, b: np.fmod(a, b),
    ),
    homogeneous(
        p.scatter_mul_p,
        homogeneity.scattered_product,
        "each of the n factors of an element gets 1/n",
        steering=_INDICES,
    ),
    homogeneous(
        p.select_and_scatter_add_p,
        in_groups(Group((0,), 1)),
        "a sum of the source; the operand only selects",
    ),
    homogeneous(
        "bcoo_dot_general",
        in_groups(Group((0,), 1, linear=True), Group((2,), 1, linear=True)),
        "a product of the matrix's entries and the other operand",
    ),
    homogeneous(
        p.zeta_p,
        in_groups(Group((1,), 0)),
        f"{_TAYLOR}of no degree; by its second operand only",
        lacks=derivatives.first_operand,
    ),
    linalg(p.cholesky_p, of_degree(0.5), "of degree 1/2: 2 A dL/dA"),
    linalg(
        p.eig_p,
        of_degree((1, 0, 0)),
        "eigenvalues of degree 1, vectors of degree 0",
        lacks=derivatives.eig,
    ),
    linalg(p.eigh_p, of_degree((0, 1)), "eigenvalues of degree 1, vectors of degree 0"),
    linalg(p.hessenberg_p, of_degree(1), "H = Q* A Q with Q held constant"),
    linalg(p.householder_product_p, of_degree(0), "of no degree: first-order Taylor"),
    linalg(p.lu_p, of_degree(1), "U of degree 1, L of degree 0"),
    linalg(p.qr_p, of_degree((0, 1, 0)), "R of degree 1, Q of degree 0"),
    linalg(p.schur_p, of_degree((1, 0)), "T = Q* A Q with Q held constant"),
    linalg(
        p.svd_p,
        of_degree((1, 0, 0)),
        "singular values of degree 1, vectors of degree 0",
        lacks=derivatives.svd,
    ),
    linalg(
        p.triangular_solve_p,
        homogeneity.triangular_solver,
        f"{_HALVES}; with a unit diagonal first-order Taylor in A",
    ),
    linalg(p.tridiagonal_p, of_degree(1), "T = Q* A Q with Q held constant"),
    linalg(
        p.tridiagonal_solve_p,
        in_groups(Group((0, 1, 2), -1), Group((3,), 1, linear=True)),
        _HALVES,
    ),
    linalg(p.linear_solve_p, homogeneity.solver, _HALVES, lacks=derivatives.solve),
    # First-order Taylor.
    taylor_elementwise(
        p.atan2_p,
        "of degree 0: its shares sum to nothing, all is remainder",
        evaluate=lambda y, x: np.arctan2(y, x),
        range=(-np.pi, np.pi),
    ),
    taylor_elementwise(
        p.pow_p,
        "of no degree in base and exponent together",
        evaluate=lambda x, y: np.power(x, y),
    ),
    taylor_elementwise(
        p.igamma_p, _NARY, evaluate=_last_at_zero(0.0), partial=True, range=(0, 1)
    ),
    taylor_elementwise(
        p.igammac_p, _NARY, evaluate=_last_at_zero(1.0), partial=True, range=(0, 1)
    ),
    taylor_elementwise(p.polygamma_p, _NARY, lacks=derivatives.first_operand),
    taylor_elementwise("polynomial", _NARY, evaluate=_polynomial, partial=True),
    taylor_elementwise(
        p.regularized_incomplete_beta_p,
        _NARY,
        evaluate=_last_at_zero(0.0),
        partial=True,
        range=(0, 1),
        lacks=derivatives.betainc,
    ),
    taylor(
        p.cumlogsumexp_p, "of no degree; the Taylor form of softmax, as for logsumexp"
    ),
    taylor(
        p.random_gamma_p, "of no degree; the derivative of the reparametrised sample"
    ),
    of_family(
        straight_through_p,
        None,
        Family("rounding", "rounding", "a quantiser: passes where it does not clip"),
    ),
    # What carries no relevance.
    steps(p.ceil_p, np.ceil, monotone=+1, rounding=True),
    steps(p.floor_p, np.floor, monotone=+1, rounding=True),
    steps(p.is_finite_p, np.isfinite, range=(0, 1)),
    steps(p.nextafter_p),
    steps(p.round_p, monotone=+1, rounding=True),
    steps(p.sign_p, np.sign, monotone=+1, range=(-1, 1)),
    constant(
        p.stop_gradient_p,
        "the user declared it a constant",
        _same,
        elementwise=True,
        monotone=+1,
        cheap=True,
        codes="moves",
    ),
    comparison(p.eq_p, np.equal),
    comparison(p.ge_p, np.greater_equal),
    comparison(p.gt_p, np.greater),
    comparison(p.le_p, np.less_equal),
    comparison(p.lt_p, np.less),
    comparison(p.ne_p, np.not_equal),
    logic(p.and_p, np.logical_and),
    logic(p.not_p, np.logical_not, codes=None),
    logic(p.or_p, np.logical_or),
    logic(p.xor_p, None, cheap=False),
    constant(p.argmax_p, _INTEGERS),
    constant(p.argmin_p, _INTEGERS),
    constant(p.axis_index_p, _INTEGERS),
    constant(p.clz_p, _INTEGERS),
    constant(p.eq_to_p, _INTEGERS),
    constant(p.le_to_p, _INTEGERS),
    constant(p.lt_to_p, _INTEGERS),
    constant(p.population_count_p, _INTEGERS),
    constant(p.reduce_and_p, _INTEGERS),
    constant(p.reduce_or_p, _INTEGERS),
    constant(p.reduce_xor_p, _INTEGERS),
    constant(p.shift_left_p, _INTEGERS, codes="computes"),
    constant(p.shift_right_arithmetic_p, _INTEGERS, codes="computes"),
    constant(p.shift_right_logical_p, _INTEGERS, codes="computes"),
    constant("any_unbatched", _INTEGERS, internal=True),  # jlrp.tactics
    constant("lu_pivots_to_permutation", _INTEGERS),
    constant(
        p.bitcast_convert_type_p,
        "reads the bits of a number, which have no derivative",
    ),
    constant(p.empty2_p, _INDEPENDENT),
    constant(p.iota_p, _INDEPENDENT, cheap=True),
    constant("iota_2x32_shape", _INDEPENDENT),
    constant(p.after_all_p, _TOKEN),
    constant(p.create_token_p, _TOKEN),
    constant(p.random_bits_p, "random bits are constants", random=True),
    constant(p.rng_bit_generator_p, "random bits are constants", random=True),
    constant(p.rng_uniform_p, "random bits are constants", random=True),
    constant(p.threefry2x32_p, "random bits are constants", random=True),
    constant(p.random_fold_in_p, _KEYS),
    constant(p.random_seed_p, _KEYS),
    constant(p.random_split_p, _KEYS),
    constant("random_clone", _KEYS),
    constant("random_unwrap", _KEYS),
    constant("random_wrap", _KEYS),
    constant("debug_callback", "has no output"),
    constant("debug_print", "has no output"),
    # What is explained elsewhere.
    state(p.cond_p, "control flow"),
    state(p.scan_p, "control flow"),
    state(p.while_p, "control flow"),
    state(p.all_gather_p, "collective"),
    state(p.all_to_all_p, "collective"),
    state(p.pmax_p, "collective"),
    state(p.pmin_p, "collective"),
    state(p.ppermute_p, "collective"),
    state(p.psum_p, "collective"),
    state(p.ragged_all_to_all_p, "collective"),
    state("all_gather_invariant", "collective"),
    state("pbroadcast", "collective"),
    state("psum_invariant", "collective"),
    state("pvary", "collective"),
    state("reduce_scatter", "collective"),
    state("shard_map", "collective"),
    state(p.name_p, "name"),
    call(p.call_p),
    call(p.closed_call_p),
    call(p.jit_p),
    call(p.remat_p),
    declared(p.custom_jvp_call_p),
    declared(p.custom_vjp_call_p),
    # What no rule can be derived for.
    opaque("custom_partitioning"),
    opaque("ffi_call"),
    opaque("io_callback"),
    opaque("pallas_call"),
    opaque("pure_callback"),
    needs_rule(p.custom_lin_p, "internal: no traced program holds it"),
    needs_rule(p.get_p, _REFERENCE),
    needs_rule(p.swap_p, _REFERENCE),
    needs_rule("addupdate", _REFERENCE),
    needs_rule("freeze", _REFERENCE),
    needs_rule("free_ref", _REFERENCE),
    needs_rule("new_ref", _REFERENCE),
    no_derivative(p.igamma_grad_a_p, "; it appears in derivatives of igamma by a"),
    no_derivative(p.select_and_scatter_p, "; no public function makes it"),
    no_derivative("cholesky_update"),
    no_derivative("geqp3"),
    no_derivative("geqrf"),
    no_derivative("ormqr"),
    no_derivative("symmetric_product"),
)
TABLE.update((each.name, each) for each in ROWS)


# Queries.


def primitives_where(has: Callable[[Traits], object]) -> frozenset[Primitive]:
    """The primitives of the installed JAX whose row has a property."""
    found = (each.primitive for each in TABLE.values() if has(each))
    return frozenset(primitive for primitive in found if primitive is not None)


def names_where(has: Callable[[Traits], object]) -> frozenset[str]:
    """The names of the primitives whose row has a property."""
    return frozenset(each.name for each in TABLE.values() if has(each))


class Row(NamedTuple):
    """One primitive of the documentation's table: its kind or state, and how."""

    primitive: str
    kind: str
    how: str


def documented() -> Iterator[Row]:
    """How every primitive carries relevance, or why it carries none."""
    for each in TABLE.values():
        if not each.internal:
            yield Row(each.name, each.kind, each.how)
