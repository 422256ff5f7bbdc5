"""The exceptions of this package."""


class CheckpointError(ValueError):
    """A checkpoint cannot be written, found or read; the message names the file, the fault and the remedy."""


class DamagedCheckpoint(CheckpointError):
    """A checkpoint is not as it was written; another one may be."""
