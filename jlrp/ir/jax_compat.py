"""Everything that depends on JAX's internals or on its version.

Supported: jax 0.10 (distinct ``Jaxpr`` and ``ClosedJaxpr``) to 0.12 (one class).
No other module of jlrp may import from ``jax._src``; a test reads the imports.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeGuard, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core, source_info_util
from jax.extend.core import primitives as p
from jax.interpreters import ad, batching
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jlrp.typing import Array, ArrayLike, DTypeLike, PyTree

try:
    from jax._src import source_info_util as _source_info
except ImportError:  # private: without it names and source lines are lost, no more
    _source_info = None
try:
    from jax._src.config import _check_vma
except ImportError:  # private: without it, shard_map(check_vma=False) around jlrp
    _check_vma = None

# Source lines in messages are the user's, not those of jlrp's own primitives.
source_info_util.register_exclusion(str(Path(__file__).with_name("own_primitives.py")))

Jaxpr = core.Jaxpr
JaxprEqn = core.JaxprEqn
SourceInfo = source_info_util.SourceInfo
JaxAtom = core.Var | core.Literal
Params = dict[str, Any]  # of an equation: whatever its primitive has
Operand = jax.Array | np.ndarray  # an array, or of a literal what NumPy has of it
Mesh = jax.sharding.Mesh | jax.sharding.AbstractMesh


class Aval(Protocol):
    """The shape and the dtype of an array; JAX's type of an atom has no such parts."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...


# Primitives whose body is part of the program: the parameter that holds it.
_BODY_PARAMETER = {
    p.jit_p: "jaxpr",
    p.closed_call_p: "call_jaxpr",
    p.custom_jvp_call_p: "call_jaxpr",
    p.custom_vjp_call_p: "call_jaxpr",
    p.remat_p: "jaxpr",
}

LOW_PRECISION = (
    *("bfloat16", "float16", "float4_e2m1fn", "float8_e3m4", "float8_e4m3"),
    *("float8_e4m3b11fnuz", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2"),
    *("float8_e5m2fnuz", "float8_e8m0fnu"),
)
_DTYPE_PARAMETERS = ("new_dtype", "preferred_element_type", "dtype", "out_dtype")


Result = TypeVar("Result")


def aval_of(atom: JaxAtom) -> Aval:
    """The abstract value of an atom of a jaxpr, which is an array."""
    aval: Any = atom.aval
    return aval


def with_shape(aval: Aval, shape: tuple[int, ...]) -> Aval:
    """The abstract value of an array of another shape."""
    of_jax: Any = aval
    return of_jax.update(shape=shape)


def shape_of(atom: JaxAtom) -> jax.ShapeDtypeStruct:
    """The shape and dtype of an atom of a jaxpr."""
    aval = aval_of(atom)
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)


def open_jaxpr(
    jaxpr: Jaxpr | core.ClosedJaxpr,
) -> tuple[Jaxpr, Sequence[Array]]:
    """The jaxpr with its ``constvars``, and the values of these."""
    inner: Any = getattr(jaxpr, "jaxpr", jaxpr)
    return inner, getattr(jaxpr, "consts", ())


def call_body(eqn: core.JaxprEqn) -> tuple[Jaxpr, Sequence[Array]] | None:
    """The body of a call-like equation, or None if it is no call."""
    parameter = _BODY_PARAMETER.get(eqn.primitive)
    if parameter is None:
        return None
    return open_jaxpr(eqn.params[parameter])


def holds(jaxpr: Jaxpr, names: Collection[str]) -> bool:
    """Whether a primitive of these names occurs in a jaxpr, or in a body in it."""
    return any(
        eqn.primitive.name in names
        or any(holds(inner, names) for inner in core.jaxprs_in_params(eqn.params))
        for eqn in open_jaxpr(jaxpr)[0].eqns
    )


def derives(eqn: core.JaxprEqn, names: Collection[str]) -> bool:
    """Whether it is a ``custom_vjp`` or ``custom_jvp`` around primitives so named."""
    if eqn.primitive not in (p.custom_vjp_call_p, p.custom_jvp_call_p):
        return False
    return holds(eqn.params["call_jaxpr"], names)


def jaxprs_in_params(params: Params) -> list[Jaxpr]:
    """The jaxprs among the parameters of an equation."""
    return [open_jaxpr(inner)[0] for inner in core.jaxprs_in_params(params)]


def uses_cotangent(eqn: core.JaxprEqn) -> list[bool]:
    """For each operand of a call, whether its derivative reads an output's cotangent.

    It does not for integers, nor where the derivative is declared zero or is missing.
    """
    operands = [shape_of(a) for a in eqn.invars]
    none = [False] * len(operands)

    def pulled(x: Sequence[Array], cotangents: Sequence[Array]) -> PyTree:
        _, pull = jax.vjp(lambda *x: bind(eqn.primitive, eqn.params, x), *x)
        return pull(list(cotangents))

    def cotangent(out: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        dtype = out.dtype if is_inexact(out) else jax.dtypes.float0
        return jax.ShapeDtypeStruct(out.shape, dtype)

    outs = [cotangent(shape_of(v)) for v in eqn.outvars]
    try:
        jaxpr, _ = open_jaxpr(jax.make_jaxpr(pulled)(operands, outs))
    except Exception:  # whatever a derivative raises that is not written to be traced
        return none
    depends = set(jaxpr.invars[len(operands) :])
    for inner in jaxpr.eqns:
        if any(not is_literal(a) and a in depends for a in inner.invars):
            depends.update(inner.outvars)
    return [not is_literal(a) and a in depends for a in jaxpr.outvars]


def bodies(eqn: core.JaxprEqn) -> list[tuple[Jaxpr, Sequence[Array]]]:
    """The bodies of a loop or branch; of other equations, none."""
    names = _BODIES.get(eqn.primitive, ())
    found = [eqn.params[name] for name in names]
    if eqn.primitive is p.cond_p:
        (found,) = found
    return [open_jaxpr(jaxpr) for jaxpr in found]


_BODIES = {
    p.scan_p: ("jaxpr",),
    p.while_p: ("cond_jaxpr", "body_jaxpr"),
    p.cond_p: ("branches",),
}


def scan_counts(params: Params) -> tuple[int, int]:
    """How many operands of a scan are constants, and how many carries."""
    if "num_carry" in params:
        return params["num_consts"], params["num_carry"]
    constants, carries, _ = (list(group) for group in params["ft_in"].unpack())
    return len(constants), len(carries)


class Sharded(NamedTuple):
    """The body of a ``shard_map`` over some axes of a mesh, in the mesh's order."""

    jaxpr: Jaxpr
    mesh: Mesh
    axes: tuple[str, ...]
    in_specs: tuple[PartitionSpec, ...]
    out_specs: tuple[PartitionSpec, ...]


def sharded_body(eqn: core.JaxprEqn) -> Sharded | None:
    """The body of a ``shard_map``; of other equations, None."""
    if eqn.primitive.name != "shard_map":  # there is no public object for it
        return None
    params = eqn.params
    manual, mesh = params["newly_manual_axes"], params["mesh"]
    axes = tuple(name for name in mesh.axis_names if name in manual)
    jaxpr, _ = open_jaxpr(params["jaxpr"])
    return Sharded(jaxpr, mesh, axes, params["in_specs"], params["out_specs"])


def define_layout(primitive: core.Primitive, rule: Callable[..., object]) -> None:
    """``rule(mapped, args, dims, **params)``: how ``vmap`` maps a primitive.

    ``mapped`` has the ``name`` and ``size`` of the mapped axis.
    """
    batching.fancy_primitive_batchers[primitive] = rule


def spread(x: Array, mesh: Mesh, axes: Sequence[str | None]) -> Array:
    """Ask for an array's axes to be spread over the devices of these mesh axes."""
    free = PartitionSpec.UNCONSTRAINED
    spec = PartitionSpec(*(free if name is None else name for name in axes))
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    if AxisType.Explicit in types.values():
        automatic = dict.fromkeys(types, AxisType.Auto)
        mesh = mesh.abstract_mesh.update_axis_types(automatic)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def unplaced(params: Params) -> Params:
    """Parameters without the sharding that an equation's output was to have."""
    asked = {name for name in _PLACEMENTS if params.get(name) is not None}
    return {**params, **dict.fromkeys(asked)} if asked else params


_PLACEMENTS = ("out_sharding", "sharding")


def constrained(x: Array, params: Params) -> Array:
    """An array under the sharding constraint of an equation with these parameters."""
    (out,) = bind(p.sharding_constraint_p, params, [x])
    return out


def constrained_again(x: Array, params: Params, mesh: Mesh) -> Array:
    """A sharding constraint of a ``shard_map``'s body, outside of it."""
    spec = params["sharding"].spec
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def untyped(function: Callable[..., Result], like: PyTree, *args: PyTree) -> Result:
    """``function(*args)`` on arrays whose types do not say how they are spread.

    They do in a mesh of Explicit axes, and inside of a ``shard_map`` whose replication
    is checked. A reverse pass makes many arrays, and there each would have to be told.
    ``like`` are arrays or values of the program, by which the results are spread: a
    prefix of their pytree.
    """
    types = [jax.typeof(x) for x in jax.tree.leaves(args) if isinstance(x, jax.Array)]
    varying = frozenset().union(*map(_varies, types))
    if varying and _check_vma is not None:
        with _check_vma(False):
            outs = function(*jax.tree.map(_retyped, args))
        return jax.tree.map(lambda x: _varying(x, varying), outs)
    meshes = [mesh for t in types if (mesh := _explicit_mesh(t.sharding.mesh))]
    context = _explicit_mesh(jax.sharding.get_abstract_mesh())
    mesh = next(iter(meshes), context)
    if mesh is None:
        return function(*args)
    places = jax.tree.map(partial(_place, mesh), like)
    leaves, tree = jax.tree.flatten(args)
    arrays = [i for i, x in enumerate(leaves) if isinstance(x, jax.Array)]

    def on_arrays(*found: Array) -> Result:
        inside = list(leaves)
        for i, x in zip(arrays, found, strict=True):
            inside[i] = x
        return function(*jax.tree.unflatten(tree, inside))

    automatic: Any = jax.sharding.auto_axes(
        on_arrays, axes=mesh.axis_names, out_sharding=places
    )
    return automatic(*(leaves[i] for i in arrays))


def _place(mesh: Mesh, x: object) -> NamedSharding:
    return NamedSharding(mesh, _spec(x))


def is_typed(args: PyTree) -> bool:
    """Whether types of arrays say how they are spread, so that ``untyped`` acts."""
    if _explicit_mesh(jax.sharding.get_abstract_mesh()) is not None:
        return True
    types = [jax.typeof(x) for x in jax.tree.leaves(args) if isinstance(x, jax.Array)]
    return any(_varies(t) or _explicit_mesh(t.sharding.mesh) for t in types)


def _varies(kind: object) -> frozenset[str]:
    """The mesh axes along which an array may differ, inside of a ``shard_map``."""
    return getattr(getattr(kind, "mat", None), "varying", frozenset())


def _retyped(x: ArrayLike) -> ArrayLike:
    """The same array, with the type that its context gives: lax would do nothing."""
    if not isinstance(x, jax.Array) or not _varies(jax.typeof(x)):
        return x
    return p.reshape_p.bind(x, new_sizes=x.shape, dimensions=None, sharding=None)


def _varying(x: Array, axes: frozenset[str]) -> Array:
    missing = tuple(sorted(axes - _varies(jax.typeof(x))))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def _explicit_mesh(mesh: Mesh) -> Mesh | None:
    return mesh if AxisType.Explicit in mesh.axis_types else None


def _spec(x: object) -> PartitionSpec:
    sharding = getattr(getattr(x, "aval", x), "sharding", None)
    return getattr(sharding, "spec", PartitionSpec())


def automatically() -> contextlib.AbstractContextManager[object]:
    """Trace with the axes of a mesh that are Explicit left to the compiler."""
    mesh = jax.sharding.get_abstract_mesh()
    explicit = [
        name
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind is AxisType.Explicit
    ]
    if not explicit:
        return contextlib.nullcontext()
    types = dict.fromkeys(explicit, AxisType.Auto)
    return jax.sharding.use_abstract_mesh(mesh.update_axis_types(types))


def is_literal(atom: object) -> TypeGuard[core.Literal]:
    return isinstance(atom, core.Literal)


def literal_value(atom: core.Literal) -> np.ndarray:
    return np.asarray(atom.val, dtype=shape_of(atom).dtype)


def bind(
    primitive: core.Primitive, params: Params, args: Sequence[ArrayLike]
) -> list[Array]:
    """Apply a primitive; always a list of outputs."""
    bind_params = primitive.get_bind_params(params)
    if isinstance(bind_params, tuple):  # before jax 0.9.2: (subfuns, params)
        subfuns, bind_params = bind_params
        args = [*subfuns, *args]
    out = primitive.bind(*args, **bind_params)
    return list(out) if primitive.multiple_results else [out]


def transpose(
    primitive: core.Primitive,
    params: Params,
    cotangents: Sequence[Array | jax.ShapeDtypeStruct],
    args: Sequence[ArrayLike | jax.ShapeDtypeStruct],
) -> list[Array | None] | None:
    """JAX's transpose of a primitive; None if there is none.

    Args:
      cotangents: of the outputs; shape and dtype of those that are zero.
      args: the operands; of those that it is linear in, shape and dtype.
    """
    try:
        rule = ad.get_primitive_transpose(primitive)
    except NotImplementedError:
        return None

    def aval(like: jax.ShapeDtypeStruct) -> Any:
        return jax.core.ShapedArray(like.shape, like.dtype)  # type: ignore[attr]

    linear = [isinstance(a, jax.ShapeDtypeStruct) for a in args]
    given = [
        ad.UndefinedPrimal(aval(a)) if isinstance(a, jax.ShapeDtypeStruct) else a
        for a in args
    ]
    filled = [
        ad.Zero(aval(m)) if isinstance(m, jax.ShapeDtypeStruct) else m
        for m in cotangents
    ]
    found = rule(filled if primitive.multiple_results else filled[0], *given, **params)
    return [
        None if not moves or isinstance(m, ad.Zero) else m
        for m, moves in zip(found, linear, strict=True)
    ]


def applied(eqn: core.JaxprEqn, args: Sequence[Operand]) -> Sequence[Array]:
    """The outputs of an equation, under its names and line."""
    with naming(eqn.source_info, scope_path(eqn.source_info)):
        return bind(eqn.primitive, eqn.params, args)


def evaluate(
    jaxpr: Jaxpr,
    consts: Sequence[Operand],
    args: Sequence[Operand],
    apply: Callable[..., Sequence[Operand]] = applied,
) -> list[Any]:
    """The outputs of a jaxpr without effects, equation by equation.

    ``apply(eqn, operands)`` gives the outputs of each equation.
    """
    env: dict[JaxAtom, Operand] = dict(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))

    def read(atom: JaxAtom) -> Any:
        return literal_value(atom) if is_literal(atom) else env[atom]

    for eqn in jaxpr.eqns:
        outs = apply(eqn, [read(a) for a in eqn.invars])
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(a) for a in jaxpr.outvars]


def is_inexact(aval: object) -> bool:
    """Whether an abstract value holds real or complex numbers."""
    return _is_inexact(getattr(aval, "dtype", bool))


@functools.cache
def _is_inexact(dtype: DTypeLike) -> bool:
    return jnp.issubdtype(dtype, jnp.inexact)


def is_key(dtype: DTypeLike) -> bool:
    """Whether a dtype is that of random keys."""
    return _is_key(dtype)


@functools.cache
def _is_key(dtype: DTypeLike) -> bool:
    return jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)  # type: ignore[attr]


def is_tracer(array: object) -> bool:
    return isinstance(array, jax.core.Tracer)  # type: ignore[attr]


def at_least_float32(array: Array) -> Array:
    """An array, low precision widened to float32."""
    low = str(array.dtype) in LOW_PRECISION
    return jnp.asarray(array, jnp.float32) if low else jnp.asarray(array)


def widened(params: Params) -> Params:
    """Parameters with every low-precision dtype replaced by float32."""
    low = {
        name: np.dtype(np.float32)
        for name in _DTYPE_PARAMETERS
        if params.get(name) is not None and str(params[name]) in LOW_PRECISION
    }
    return {**params, **low} if low else params


def with_dtype(params: Params, dtype: DTypeLike) -> Params:
    """Parameters with every dtype replaced by a floating one."""
    asked = [name for name in _DTYPE_PARAMETERS if params.get(name) is not None]
    return {**params, **dict.fromkeys(asked, np.dtype(dtype))}


def scope_path(source_info: object) -> str:
    """The name scopes that were open where the equation was made."""
    return str(getattr(source_info, "name_stack", ""))


def source_line(source_info: SourceInfo) -> str:
    """The user's source line that made the equation, or an empty string."""
    if _source_info is None:
        return ""
    return _source_info.summarize(source_info).strip()


def naming(
    source_info: SourceInfo, scope: str
) -> contextlib.AbstractContextManager[object]:
    """Give equations bound inside the names and the line of the original one."""
    if _source_info is None:
        return contextlib.nullcontext()
    stack = _source_info.NameStack()
    for name in filter(None, scope.split("/")):
        stack = stack.extend(name)
    return _source_info.user_context(source_info.traceback, name_stack=stack)


def has_host_memory() -> bool:
    """Whether devices can put arrays into the memory of their host."""
    kinds = {memory.kind for memory in jax.devices()[0].addressable_memories()}
    return "pinned_host" in kinds


def _moving(to: str, back: str) -> Callable[[jax.Array], jax.Array]:
    """A move whose cotangent moves back, which that of ``device_put`` does not."""

    def put(x: jax.Array, where: str) -> jax.Array:
        return jax.device_put(x, getattr(jax.memory.Space, where))

    moving = jax.custom_vjp(lambda x: put(x, to))
    moving.defvjp(lambda x: (put(x, to), None), lambda _, ct: (put(ct, back),))
    return moving


_to_host, _to_device = _moving("Host", "Device"), _moving("Device", "Host")


class OnHost:
    """An array in the memory of the host, until it comes back."""

    def __init__(self, array: jax.Array):
        self._array = _to_host(array)

    def back(self) -> jax.Array:
        return _to_device(self._array)


def on_device(array: Array | OnHost) -> Array:
    """An array, back from the memory of the host if it was there."""
    return array.back() if isinstance(array, OnHost) else array


def with_bodies(
    eqn: core.JaxprEqn,
    rewrite: Callable[[int, Jaxpr, Sequence[Array]], core.ClosedJaxpr],
) -> Params:
    """The parameters of an equation, each of its bodies written again.

    ``rewrite(index, jaxpr, consts)`` returns what ``jax.make_jaxpr`` does, of the same
    inputs and outputs; the indices are those of ``body_inputs``.
    """
    call = _BODY_PARAMETER.get(eqn.primitive)
    names = (call,) if call else _BODIES.get(eqn.primitive, ())
    params = dict(eqn.params)
    count = 0
    for name in names:
        old = params[name]
        group = old if isinstance(old, tuple) else (old,)
        new = []
        for body in group:
            closed = rewrite(count, *open_jaxpr(body))
            is_open = getattr(body, "jaxpr", body) is body
            new.append(open_jaxpr(closed)[0] if is_open else closed)
            count += 1
        params[name] = tuple(new) if isinstance(old, tuple) else new[0]
    return params


def body_inputs(eqn: core.JaxprEqn) -> list[list[int]]:
    """For each body of a call, loop or branch: which operand each input starts as."""
    count = len(eqn.invars)
    if eqn.primitive in _BODY_PARAMETER:
        return [list(range(count))]
    if eqn.primitive is p.scan_p:
        return [list(range(count))]
    if eqn.primitive is p.while_p:
        condition, body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        carries = list(range(condition + body, count))
        return [
            [*range(condition), *carries],
            [*range(condition, condition + body), *carries],
        ]
    if eqn.primitive is p.cond_p:
        return [list(range(1, count))] * len(eqn.params["branches"])
    return []


def double_precision() -> contextlib.AbstractContextManager[object]:
    """Floats of 64 bits, whatever the user's setting."""
    return jax.enable_x64(True)
