"""The errors of this package: one base, one class for each kind of work."""


class FcconvError(Exception):
    """Base of this package's errors; the message names the cause and a fix."""


class PlanError(FcconvError, ValueError):
    """A plan cannot be made, read or applied."""


class CheckpointError(FcconvError, ValueError):
    """A checkpoint cannot be read, converted or written; names the file and the leaf.

    Nothing has been written when it is raised.
    """


class ImageError(FcconvError, ValueError):
    """An image cannot be read, or a result cannot be written as one; names the file."""


class ExportError(FcconvError, ValueError):
    """A model cannot be exported, or an exported file cannot be read."""


class MissingExtraError(FcconvError, ImportError):
    """A package of an optional extra is not installed."""


class BackendError(FcconvError, ValueError):
    """A backend does not exist, or its compiler failed; names the backend."""
