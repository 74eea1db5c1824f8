"""What can go wrong with a checkpoint, by what is to be done about it."""


class BadCheckpoint(Exception):  # noqa: N818 - it says what happened
    """A checkpoint that must not be resumed from: cut off, damaged or incomplete.

    The one before it may be whole.  `why` is the part of the sentence that names the file and what is wrong
    with it.
    """

    def __init__(self, name: str, why: str) -> None:
        super().__init__(f"checkpoint {name} cannot be used: {why}")
        self.name, self.why = name, why


class SaveFailed(Exception):  # noqa: N818 - it says what happened
    """A save did not become a checkpoint: the store refused it or is full.

    Nothing else is lost: the half-written step has no manifest, so the checkpoint before it stays the newest.
    """


class StorageUnavailable(Exception):  # noqa: N818 - it says what happened
    """The store did not answer, or answered errors, for longer than a reader waits.

    That says nothing about the checkpoints in it: the job is to be tried again, not ended or started afresh.
    """
