"""The error of explanation jobs."""

from jlrp.errors import JlrpError


class JobError(JlrpError):
    """A job cannot start, or cannot go on; what it reported as done is safe."""
