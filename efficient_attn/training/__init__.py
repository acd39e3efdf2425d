"""Training: tasks with their data, and one trainer for all of them.

from efficient_attn.training import TrainOptions, train
from efficient_attn.training.tasks import Digits

result = train(Digits(attention="nystrom:landmarks=8"), TrainOptions(out=Path("runs/digits"), epochs=40))
"""

from .options import TrainOptions
from .task import Task
from .trainer import DivergedError, Interrupted, train

__all__ = ["DivergedError", "Interrupted", "Task", "TrainOptions", "train"]
