"""Generation: the plan, the engine that follows it, and the pipeline from labels to images."""

from __future__ import annotations
