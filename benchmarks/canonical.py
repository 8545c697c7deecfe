"""A program as a hash of what it computes, and how many equations it takes.

The text of a jaxpr will not do to compare two versions of a library: it holds the names
of its own functions, hides constants, and changes with the order of independent lines.
So outputs are hashed as a graph:

- inputs by position, constants and literals by dtype, shape and bytes;
- calls that change nothing but names or derivatives (``jit``, ``custom_jvp``, ...) are
  inlined; the operands of commutative primitives are sorted;
- dropped: names, addresses, source lines, shardings, devices (not the kind of memory,
  which is what ``residuals="offload"`` is about), functions among parameters, weak
  types, equations that no output needs;
- a loop is hashed by the values that enter it, not by their order: constants and
  stacked inputs as what they are outside, carries by refinement (their first values,
  then what the body makes of those, until no more carries are told apart). Carries that
  are equal, or that nothing reads, make no difference;
- a primitive of jlrp goes by what it does, not by its name: see ``_role``.

What a hash cannot see, since equal subgraphs have one hash, is a computation that is
done twice: that is what the counts are for.
"""

import functools
import hashlib
import re
import sys
from collections import Counter
from dataclasses import dataclass
from enum import Enum

import jax
import numpy as np
from jax.extend import core

INLINED = set(
    "jit pjit closed_call core_call custom_jvp_call custom_vjp_call "
    "custom_vjp_call_jaxpr".split()
)
COMMUTATIVE = set("add add_any mul max min and or xor eq ne after".split())
DROPPED = set(
    "sharding out_sharding out_shardings in_shardings sharding_ctx mesh ctx_mesh name "
    "devices srcs copy_semantics debug_info linear layout donated_invars".split()
)


@dataclass(frozen=True)
class Canonical:
    """What is compared of a program.

    Attributes:
      hash: of its outputs.
      counts: equations that an output needs, by primitive, those of bodies included.
      stacked: bytes that its scans stack.
    """

    hash: str
    counts: dict
    stacked: int


def canonical(closed):
    """Of a closed jaxpr."""
    flat = _Flat(closed)
    inputs = [_hash("input", i, _type(aval)) for i, aval in enumerate(closed.in_avals)]
    counts = Counter(_named(flat))
    return Canonical(
        _hash("program", *_outputs(flat, inputs)),
        dict(sorted(counts.items())),
        _stacked(flat),
    )


def _named(flat):
    for equation in flat.equations:
        yield equation.name
        for body in equation.all_bodies:
            yield from _named(body)


def _stacked(flat):
    total = 0
    for equation in flat.equations:
        times = equation.params["length"] if equation.name == "scan" else 1
        total += times * sum(map(_stacked, equation.all_bodies))
        if equation.name == "scan":
            _, carries = _scan_counts(equation.params)
            stacked = equation.avals[carries:]
            total += sum(aval.size * aval.dtype.itemsize for aval in stacked)
    return total


# Flat programs.


class _Equation:
    def __init__(self, equation, role, inputs, outputs):
        self.name, self.role = role or equation.primitive.name, role
        self.params, self.effects = equation.params, bool(equation.effects)
        self.avals = [v.aval for v in equation.outvars]
        self.types = list(map(_type, self.avals))
        self.inputs, self.outputs = inputs, outputs
        self.bodies = {
            key: list(map(_Flat, bodies))
            for key, value in equation.params.items()
            if (bodies := _jaxprs(value))
        }
        self.all_bodies = [body for bodies in self.bodies.values() for body in bodies]


class _Flat:
    """A jaxpr with calls inlined, and of its equations those that an output needs.

    Atoms are objects, or the hashes of constants.
    """

    def __init__(self, jaxpr):
        self.everything = []
        self.inputs, known = _entered(jaxpr)
        self.outputs = self._inlined(jaxpr, known)
        needed, found = set(map(id, self.outputs)), []
        for equation in reversed(self.everything):
            if equation.effects or not needed.isdisjoint(map(id, equation.outputs)):
                needed.update(map(id, equation.inputs))
                found.append(equation)
        self.equations = found[::-1]

    def _inlined(self, jaxpr, known):
        """Add the equations of a jaxpr; its outputs."""

        def read(atom):
            if isinstance(atom, core.Literal):
                return _constant(atom.val, atom.aval)
            return known[atom]

        jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
        for equation in jaxpr.eqns:
            inputs, role = list(map(read, equation.invars)), _role(equation)
            if equation.primitive.name in INLINED:
                called = _called(equation)
                _, inside = _entered(called, inputs)
                outputs = self._inlined(called, inside)
            elif role == "same":
                outputs = inputs
            else:
                outputs = [object() for _ in equation.outvars]
                self.everything.append(_Equation(equation, role, inputs, outputs))
            known.update(zip(equation.outvars, outputs, strict=True))
        return list(map(read, jaxpr.outvars))


def _entered(jaxpr, inputs=None):
    """What enters a jaxpr, or new objects, and what its variables are then."""
    consts = [_constant(value) for value in getattr(jaxpr, "consts", ())]
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    if inputs is None:
        inputs = [object() for _ in jaxpr.invars]
    known = dict(zip(jaxpr.constvars, consts, strict=True))
    return inputs, known | dict(zip(jaxpr.invars, inputs, strict=True))


def _called(equation):
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if key in equation.params:
            return equation.params[key]
    raise TypeError(f"{equation.primitive} calls nothing: {list(equation.params)}")


def _is_jaxpr(value):
    return isinstance(value, core.Jaxpr | core.ClosedJaxpr)


def _jaxprs(value):
    if _is_jaxpr(value):
        return [value]
    if isinstance(value, tuple | list):
        return [jaxpr for item in value for jaxpr in _jaxprs(item)]
    return []


# Hashes.


def _hash(*parts):
    text = "\0".join(map(str, parts))
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def _type(aval):
    return f"{getattr(aval, 'dtype', '')}{list(getattr(aval, 'shape', ()))}"


def _constant(value, aval=None):
    if jax.dtypes.issubdtype(getattr(value, "dtype", None), jax.dtypes.prng_key):
        value = jax.random.key_data(value)
    array = np.asarray(value, None if aval is None else aval.dtype)
    if array.dtype == object or array.dtype == jax.dtypes.float0:
        return _hash("constant", type(value).__name__, array.shape)
    data = hashlib.blake2b(array.tobytes(), digest_size=12).hexdigest()
    return _hash("constant", array.dtype, list(array.shape), data)


def _outputs(flat, inputs):
    """The hashes of the outputs of a flat program, of those of its inputs."""
    known = {id(v): h for v, h in zip(flat.inputs, inputs, strict=True)}
    read = lambda a: a if isinstance(a, str) else known[id(a)]  # noqa: E731
    for equation in flat.equations:
        found = _of_equation(equation, [read(a) for a in equation.inputs])
        known |= {id(v): h for v, h in zip(equation.outputs, found, strict=True)}
    return [read(a) for a in flat.outputs]


def _of_equation(equation, inputs):
    if equation.name in _LOOPS:
        return _LOOPS[equation.name](equation, inputs)
    if equation.name in COMMUTATIVE:
        inputs = sorted(inputs)
    params = [
        f"{key}={_param(value)}"
        for key, value in sorted(equation.params.items())
        if key not in DROPPED and not (equation.role and isinstance(value, str))
    ]
    if equation.name == "device_put":
        params += _memories(equation.params)
    head = _hash(equation.name, *params, *equation.types, *inputs)
    if len(equation.outputs) == 1:
        return [head]
    return [_hash(head, i) for i in range(len(equation.outputs))]


@functools.lru_cache(maxsize=1000)
def _structure(jaxpr):
    """A body by itself: its inputs by position."""
    flat = _Flat(jaxpr)
    operands = [_hash("operand", i) for i in range(len(flat.inputs))]
    return _hash("body", *_outputs(flat, operands))


def _refined(carries, step):
    """Carries told apart by what ``step`` makes of them."""
    first, groups = carries, 0
    while True:
        carries = [
            _hash("carry", a, b) for a, b in zip(first, step(carries), strict=True)
        ]
        if len(set(carries)) <= groups:
            return carries
        groups = len(set(carries))


def _of_scan(equation, inputs):
    params, (body,) = equation.params, equation.bodies["jaxpr"]
    n, m = _scan_counts(params)
    consts = [_hash("each time", h) for h in inputs[:n]]
    slices = [_hash("slice", h) for h in inputs[n + m :]]
    how = _hash("scan", params["length"], params["reverse"], params["unroll"])

    def step(carries):
        return _outputs(body, [*consts, *carries, *slices])

    carries = _refined(inputs[n : n + m], lambda c: step(c)[:m])
    found = step(carries)
    ends = [_hash(how, "carry", a, b) for a, b in zip(carries, found[:m], strict=True)]
    return ends + [_hash(how, "stacked", h) for h in found[m:]]


def _scan_counts(params):
    """How many constants and carries a scan has."""
    if "num_carry" in params:
        return params["num_consts"], params["num_carry"]
    consts, carries, _ = map(list, params["ft_in"].unpack())  # from jax 0.11 on
    return len(consts), len(carries)


def _of_while(equation, inputs):
    params = equation.params
    (body,), (predicate,) = equation.bodies["body_jaxpr"], equation.bodies["cond_jaxpr"]
    n, m = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    consts = [_hash("each time", h) for h in inputs[:m]]
    carries = _refined(inputs[m:], lambda c: _outputs(body, [*consts[n:], *c]))
    goes_on = _outputs(predicate, [*consts[:n], *carries])
    found = _outputs(body, [*consts[n:], *carries])
    return [_hash("while", *goes_on, a, b) for a, b in zip(carries, found, strict=True)]


def _of_cond(equation, inputs):
    index, *operands = inputs
    branches = [_outputs(body, operands) for body in equation.bodies["branches"]]
    return [_hash("cond", index, *cases) for cases in zip(*branches, strict=True)]


_LOOPS = {"scan": _of_scan, "while": _of_while, "cond": _of_cond}


def _param(value):
    """A parameter as text without addresses, functions, names of classes of ours."""
    if value is None or isinstance(value, bool | str | bytes | complex):
        return repr(value)
    if isinstance(value, int | float | np.integer | np.floating | np.bool_):
        return repr(value.item() if isinstance(value, np.generic) else value)
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, np.dtype) or (
        isinstance(value, type) and issubclass(value, np.generic)
    ):
        return str(np.dtype(value))
    if isinstance(value, tuple | list):
        return f"({','.join(map(_param, value))})"
    if isinstance(value, dict):
        return f"{{{','.join(sorted(f'{k}:{_param(v)}' for k, v in value.items()))}}}"
    if _is_jaxpr(value):
        return _structure(value)
    if isinstance(value, np.ndarray | jax.Array):
        return _constant(value)
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return _type(value)
    if callable(value):
        return "function"
    return re.sub(r" at 0x[0-9a-f]+|[^\s'\"]*/[^\s'\"]*", "", repr(value))


def _memories(params):
    """The kinds of memory that arrays are put into."""
    kinds = [getattr(d, "memory_kind", d) for d in params.get("devices", ())]
    return [str(getattr(kind, "name", kind)).lower() for kind in kinds]


# Primitives of jlrp.


def _role(equation):
    """What a primitive of jlrp does, by the types of its operands; None: it is JAX's.

    ``same``: the output is the only operand, which got a name. ``after``: the output is
    one of two operands, and waits for the other. ``any``: whether one of many flags is
    set. ``own``: all else, told apart by what it holds.
    """
    if _is_of_jax(equation.primitive):
        return None
    output, *others = (_type(v.aval) for v in equation.outvars)
    operands = [_type(a.aval) for a in equation.invars]
    if others or any(map(_jaxprs, equation.params.values())):
        return "own"
    if operands == [output]:
        return "same"
    if len(operands) == 2 and output in operands:
        return "after"
    if len(operands) == 1 and operands[0].startswith("bool") and output == "bool[]":
        return "any"
    return "own"


@functools.cache
def _is_of_jax(primitive):
    """Whether no module but those of jlrp has it."""
    own = any(_holds(module, primitive) for module in _modules("jlrp"))
    return not own or any(_holds(module, primitive) for module in _modules("jax"))


def _modules(package):
    return [m for name, m in list(sys.modules.items()) if name.split(".")[0] == package]


def _holds(module, thing):
    return any(value is thing for value in list(vars(module).values()))
