"""One train step for everything: pretraining, continued pretraining, sequence-level and token-level distillation."""

from jaxdraft.train.loop import train
from jaxdraft.train.state import OptimizerSettings, TrainState

__all__ = ["OptimizerSettings", "TrainState", "train"]
