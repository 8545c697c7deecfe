"""jlrp: Layer-wise Relevance Propagation for any JAX program."""

from jlrp import composites, rules
from jlrp.api import Explainer, Explanation, audit, explain, inspect, relevance
from jlrp.choosing import choose
from jlrp.composites import Composite
from jlrp.errors import (
    InputError,
    IntegrationError,
    JlrpError,
    JlrpWarning,
    MemoryLimitError,
    NoRelevanceError,
    RuleError,
    SelectorError,
    SpellingError,
    TargetError,
    UnsupportedPrimitiveError,
)
from jlrp.ir.own_primitives import custom_relevance, tag
from jlrp.plan.residuals import KeepWhere
from jlrp.references import Background
from jlrp.rules import register_rule, unregister_rule

__all__ = [
    "Background",
    "Composite",
    "Explainer",
    "Explanation",
    "InputError",
    "IntegrationError",
    "JlrpError",
    "JlrpWarning",
    "KeepWhere",
    "MemoryLimitError",
    "NoRelevanceError",
    "RuleError",
    "SelectorError",
    "SpellingError",
    "TargetError",
    "UnsupportedPrimitiveError",
    "audit",
    "choose",
    "composites",
    "custom_relevance",
    "explain",
    "inspect",
    "register_rule",
    "relevance",
    "rules",
    "tag",
    "unregister_rule",
]

__version__ = "0.1.0"
