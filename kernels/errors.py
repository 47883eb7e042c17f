"""Why a model cannot be served. Every message is one sentence for the person who started the server."""


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
