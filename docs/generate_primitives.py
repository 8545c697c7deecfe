"""Writes ``primitives.md``: how each primitive of JAX carries relevance.

Run it again, with the newest JAX, when the table of ``jlrp.ir.primitives`` changes; a
test says when.
"""

from pathlib import Path

import jax

from jlrp.ir.primitives import STATES, documented

PAGE = Path(__file__).with_name("primitives.md")
VERSION = f"jax {jax.__version__}"
HEAD = f"""# Primitives

How relevance goes through each primitive of JAX, made from the table of
`jlrp.ir.primitives` with {VERSION} by `docs/generate_primitives.py`. Primitives form
*kinds*, by which a composite selects; a fact about the program may make more of one:
a `dot_general` with a parameter is `dense`, an `exp` in a softmax is `softmax`,
elementwise functions of one value are one `activation`.

- *Linear* operations hand the multiplier on through their transpose; constants that
  they add absorb their share, and the ledger says so.
- An operation that is *homogeneous* of degree k takes Euler's identity,
  `R_x = (1/k) x df/dx m`, which conserves relevance: a Cholesky factor is of degree 1/2
  in its matrix, a product of n factors of degree n. A solver is a product of `1/A` and
  `b`: if both depend on x, each gets half.
- A function without a degree, or of degree 0 (eigenvectors, the Q of QR, atan2), takes
  *first-order Taylor* in all its active operands. The remainder is the ledger's. Where
  this table says so, this counts as covered.
- Complex numbers have real relevance, `Re(v m)`: a network in complex arithmetic is
  explained as the same one in real arithmetic. Powers of complex numbers take Euler's
  identity, other functions first-order Taylor. Kernels are not looked at: `ZPlus`,
  `Gamma` and their like do not apply, and the presets take `Zero` in their place.
- A primitive that *needs a rule* on a path of relevance is an error. Register one with
  `jlrp.register_rule(primitive, rule)`, wrap the function in `jlrp.custom_relevance`,
  or pass `fallback="gradient"` or `fallback="stop"`.

Primitives that are not part of `jax.extend.core.primitives` are recognised by name.
"""


def markdown() -> str:
    """The page."""
    found: dict[str, dict[str, list[str]]] = {}
    for row in documented():
        found.setdefault(row.kind, {}).setdefault(row.how, []).append(row.primitive)
    kinds = sorted(set(found) - set(STATES))
    parts = [HEAD]
    for kind in [*kinds, *sorted(STATES)]:
        lines = [f"## {kind}", "", "| primitives | relevance |", "|---|---|"]
        for how, names in sorted(found[kind].items()):
            listed = ", ".join(f"`{name}`" for name in sorted(names))
            lines.append(f"| {listed} | {how} |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(markdown())
