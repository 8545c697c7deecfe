"""The errors that jlrp raises: each says what, where, and the way out."""

__all__ = [
    "InputError",
    "IntegrationError",
    "JlrpError",
    "JlrpWarning",
    "MemoryLimitError",
    "NoRelevanceError",
    "RuleError",
    "SelectorError",
    "SpellingError",
    "TargetError",
    "UnsupportedPrimitiveError",
]


class JlrpError(Exception):
    """Base class of every error that jlrp raises on purpose."""


class JlrpWarning(UserWarning):
    """Relevance stops where another path goes on: a part of it is on no input."""


class UnsupportedPrimitiveError(JlrpError, NotImplementedError):
    """A primitive on a path of relevance has no propagation rule."""


class TargetError(JlrpError, ValueError):
    """The target does not fit the output of the function."""


class RuleError(JlrpError, ValueError):
    """A rule has a parameter that is not allowed, or reads what it does not declare."""


class SelectorError(JlrpError, ValueError):
    """A selector of a composite matches no operation, or its rule does not fit."""


class NoRelevanceError(JlrpError, ValueError):
    """The explained output does not depend on the explained input."""


class InputError(JlrpError, TypeError):
    """An argument has a type, dtype or value that jlrp cannot explain."""


class MemoryLimitError(JlrpError, MemoryError):
    """No residual policy keeps an explanation within the memory that it may take."""


class IntegrationError(JlrpError):
    """A framework is missing, or a model of it is not in a state to be explained."""


class SpellingError(JlrpError, AssertionError):
    """Two spellings of one function have two explanations."""
