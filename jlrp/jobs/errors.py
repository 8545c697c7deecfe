"""The error of explanation jobs."""

from pathlib import Path

from jlrp.arguments import shown
from jlrp.errors import JlrpError


class JobError(JlrpError):
    """A job cannot start, or cannot go on; what it reported as done is safe."""


def check_path(name: str, value: object) -> None:
    """Refuse what is no path, by the argument's name."""
    if not isinstance(value, str | Path) or not str(value) or "\0" in str(value):
        raise JobError(f"{name} is {shown(value)}; give a path, such as 'results'.")
