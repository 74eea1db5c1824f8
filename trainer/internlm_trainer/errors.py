"""Errors that end a job or a command, and what a process ends with for them."""

EXIT_USER_ERROR = 65  # sysexits.h: the input is wrong
EXIT_STOPPED = 75  # sysexits.h: try again later


class UserError(ValueError):
    """A mistake in what the user gave: one sentence with the field or file, what is wrong and what to do.

    The command line prints it without a traceback; on a cluster it ends the job at once, since a restart would
    fail the same way.
    """


class DataError(UserError):
    """A sample that is not what it should be: damaged in its file, or on its way from there.

    On a cluster the job tries it again, a few times.
    """


class StepFailed(RuntimeError):  # noqa: N818
    """Training cannot go on from here."""


class Diverged(StepFailed):
    """Training has left the path that it could come back to; from the same checkpoint it would do so again."""
