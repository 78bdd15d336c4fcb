"""Conditions: what a model is told -> condition tokens. `ConditionConfig` is the closed table of them."""

from continuar.conditions.base import Condition
from continuar.conditions.labels import Labels, LabelsConfig
from continuar.conditions.vectors import Vectors, VectorsConfig

ConditionConfig = LabelsConfig | VectorsConfig

__all__ = ["Condition", "ConditionConfig", "Labels", "LabelsConfig", "Vectors", "VectorsConfig"]
