"""Every error a user can meet, in one tree.

A message names what is wrong, in which file, and what to do next; the command line prints it as one
line and exits with 1. Anything that is not a `GigavimError` is a defect of gigavim.
"""


class GigavimError(Exception):
    """Base of all errors that gigavim raises on purpose."""


class SlideError(GigavimError):
    """An input image cannot be used as it is."""


class UnsupportedSlideError(SlideError):
    """The file is of no format that gigavim reads, or of a kind it cannot use."""


class CorruptSlideError(SlideError):
    """The file is of a known format, but damaged or inconsistent."""


class MissingMppError(SlideError):
    """The file does not say how many micrometres a pixel covers, and a model needs to know."""


class TileReadError(SlideError):
    """A region of an otherwise readable slide cannot be decoded."""


class ModelError(GigavimError):
    """A model, its card or its weights cannot be used."""


class SettingsError(GigavimError):
    """A setting is unknown or has a value that makes no sense."""


class ResourceError(GigavimError):
    """The work does not fit the memory or disk it may use."""


class OutputError(GigavimError):
    """A result cannot be written."""


class StoreError(GigavimError):
    """An embedding store cannot be read: it is none, damaged, or of a later version."""
