"""The error every fault of the data or of what is asked of it ends in."""


class DatasetError(ValueError):
    """Data that is damaged, missing or too little; the message says what to do about it."""
