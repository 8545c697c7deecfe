"""Models of other frameworks as ``(fn, params)``, their module paths as name scopes.

One file per framework, which it imports when called: ``from jlrp.integrations.flax
import linen`` needs no Flax until ``linen(...)``.
"""
