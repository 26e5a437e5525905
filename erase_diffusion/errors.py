"""The errors a caller would catch. Each message says what was wrong, the value received, and the fix."""


class EraseDiffusionError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigError(EraseDiffusionError, ValueError):
    """A parameter, a concept or a name is not one that is allowed."""


class ModelError(EraseDiffusionError):
    """A model folder is incomplete, unreadable, unsafe, or not the model that was expected."""


class DataError(EraseDiffusionError):
    """An image, a prompt file or a metadata line that cannot be used."""


class OutputError(EraseDiffusionError):
    """The output folder exists, cannot be written, or the disk is full."""


class NothingToEraseError(EraseDiffusionError):
    """The original model never draws the concept, so there is nothing to erase and nothing to prove."""
