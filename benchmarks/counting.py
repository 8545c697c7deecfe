"""Multiplications of a program, and the contractions that XLA compiled of it.

What a rule costs is first of all how often it goes through the network's linear maps:
the derivative goes twice (forward, and back to the input), through a product of two
values three times. Elementwise work, memory traffic and what the compiler makes of it
come on top; a measured ratio below the counted one is one in which they are less.
"""

import math
import re
from collections import Counter
from dataclasses import dataclass

import jax
from jax.extend.core import jaxprs_in_params
from jax.extend.core import primitives as p


def contractions(fn, *args):
    """The dots and convolutions that a traced function runs: (equation, times)."""
    return list(_contractions(jax.make_jaxpr(fn)(*args), 1))


def multiplications(fn, *args):
    return sum(times * _size(equation) for equation, times in contractions(fn, *args))


def _contractions(jaxpr, times):
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if equation.primitive in _SIZES:
            yield equation, times
        inner = jaxprs_in_params(equation.params)
        if equation.primitive is p.cond_p:  # one branch runs: the dearest
            branches = [list(_contractions(branch, times)) for branch in inner]
            yield from max(branches, key=lambda found: sum(_size(e) for e, _ in found))
            continue
        length = equation.params["length"] if equation.primitive is p.scan_p else 1
        for body in inner:
            yield from _contractions(body, times * length)


def _size(equation):
    return _SIZES[equation.primitive](equation)


def _dot_size(equation):
    (contracted, _), _ = equation.params["dimension_numbers"]
    shape = equation.invars[0].aval.shape
    return equation.outvars[0].aval.size * math.prod(shape[i] for i in contracted)


def _convolution_size(equation):
    """Zeros that are put between the elements of the input are not multiplied."""
    params, kernel = equation.params, equation.invars[1].aval
    features = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
    seen = kernel.size // features
    dilation = math.prod(params["lhs_dilation"])
    return equation.outvars[0].aval.size * seen // dilation


_SIZES = {p.dot_general_p: _dot_size, p.conv_general_dilated_p: _convolution_size}


@dataclass(frozen=True)
class Arithmetic:
    """Multiplications of one forward pass, by what is multiplied.

    Attributes:
      convolutions: pairs of a convolution's equation and its multiplications.
      dense: of values with parameters.
      product: of values with values.
    """

    convolutions: tuple
    dense: int
    product: int

    def of(self, conv, dense):
        """With ``conv(equation)`` and ``dense`` maps for each of the forward pass."""
        through = sum(conv(equation) * size for equation, size in self.convolutions)
        return through + dense * self.dense + 3 * self.product

    @property
    def gradient(self):
        return self.of(lambda equation: 2, 2)


def arithmetic(fn, gradient, *args):
    """Of a function; what its gradient takes says which of its dots are products."""
    forward = contractions(fn, *args)
    total = sum(times * _size(equation) for equation, times in forward)
    product = multiplications(gradient, *args) - 2 * total
    convolutions = tuple(
        (equation, times * _size(equation))
        for equation, times in forward
        if equation.primitive is p.conv_general_dilated_p
    )
    dense = total - product - sum(size for _, size in convolutions)
    return Arithmetic(convolutions, dense, product)


# What was compiled.

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_CONTRACTION = re.compile(r"\b(?:dot|convolution)\(|custom_call_target=\"__onednn")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation)"
    r"=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


def compiled_contractions(compiled):
    """How many dots and convolutions an executable runs, loops by their trip counts.

    XLA merges equal ones and drops dead ones: this is what is left to run.
    """
    own, calls, name = Counter(), {}, None
    entry = None
    for line in compiled.as_text().splitlines():
        start = _COMPUTATION.match(line)
        if start:
            name = start[1]
            calls[name] = []
            entry = name if line.startswith("ENTRY") else entry
        elif name is not None and " = " in line:
            own[name] += len(_CONTRACTION.findall(line))
            trips = _TRIPS.search(line)
            times = int(trips[1]) if trips else 1
            called = _CALLED.findall(line)
            for names in _BRANCHES.findall(line):
                called += [n.strip().lstrip("%") for n in names.split(",")]
            calls[name] += [(other, times) for other in called]

    def total(name):
        return own[name] + sum(times * total(other) for other, times in calls[name])

    return total(entry)
