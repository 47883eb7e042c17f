"""What can go wrong, in one sentence: a model that cannot be served, for the person who started the server; a row's
edit, for the client.
"""

MAX_ERROR = 500
"""Characters of an edit's error that reach the client."""


class LoadError(Exception):
    """The model cannot be served; the message says what to do."""


class NotAModel(LoadError):
    """No such folder, or a folder without a model in it."""


class UnknownArchitecture(LoadError):
    """transformers does not know this kind of model."""


class UnsupportedModel(LoadError):
    """A model that transformers runs, but that continuous batching cannot."""


class UnsupportedSetting(LoadError):
    """A dtype, device or length that the model or the machine does not allow."""


class NotEnoughMemory(LoadError):
    """Weights or KV cache do not fit."""


class EditError(Exception):
    """A row's scores could not be edited; the message is one sentence for the client, whose row ends with it."""
