"""Training data: images decoded once and kept in memory."""

from continuar.data.loader import ImageSet, class_names, load_images

__all__ = ["ImageSet", "class_names", "load_images"]
