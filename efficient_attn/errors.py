"""The package's errors: each says what was given, what is allowed and what to do, before any kernel starts."""


class EfficientAttnError(Exception):
    """Base of every error that this package raises on purpose."""


class InputError(EfficientAttnError, ValueError):
    """A value, shape or combination of arguments that the operation does not define."""


class InputTypeError(EfficientAttnError, TypeError):
    """An argument of the wrong type or dtype."""


class MaskError(InputError):
    """Block lists or mask arguments that do not describe a valid mask."""


class UnsupportedError(EfficientAttnError, NotImplementedError):
    """A well-defined request that the chosen method or backend cannot serve."""


class CudaError(EfficientAttnError, RuntimeError):
    """A call of the CUDA runtime or driver that failed, by name, with what it was for."""


class ConversionError(EfficientAttnError, RuntimeError):
    """A converted model that does not compute, with dense attention, what the original computed."""


class CheckpointError(EfficientAttnError, RuntimeError):
    """A checkpoint that cannot be read, is of an unknown architecture, or does not fit the model."""


class CommunicationError(EfficientAttnError, RuntimeError):
    """A process of a group that has died, does not answer in time, or was asked for something else than the others."""
