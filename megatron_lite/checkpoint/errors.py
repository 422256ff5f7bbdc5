"""The one exception of this package."""


class CheckpointError(ValueError):
    """A checkpoint cannot be written, found or read; the message names the file, the fault and the remedy."""
