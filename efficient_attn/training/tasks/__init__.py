"""The tasks by name."""

from ..task import Task
from .language import LanguageModelling, Translation
from .pairs import Clip
from .series import Forecast
from .text import Bytes, ListOps, Text
from .vision import Digits, Images, MaskedAutoencoding, SimClr

TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (
        ListOps,
        Bytes,
        Text,
        Digits,
        Images,
        MaskedAutoencoding,
        SimClr,
        Forecast,
        Clip,
        LanguageModelling,
        Translation,
    )
}

__all__ = ["TASKS"]
