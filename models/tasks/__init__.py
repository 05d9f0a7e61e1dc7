"""What is trained, for each model: data, batches, loss, optimizer and test. Nothing here knows how gradients travel."""

from dct_compile.models.tasks.dlrm import DlrmTask
from dct_compile.models.tasks.gpt import GptTask
from dct_compile.models.tasks.resnet import ResnetTask
from dct_compile.models.tasks.task import Batch, DataSource, Metric, Task

TASKS: dict[str, type[Task]] = {"dlrm": DlrmTask, "gpt": GptTask, "resnet": ResnetTask}
"""By the model's name."""

__all__ = ["TASKS", "Batch", "DataSource", "Metric", "Task"]
