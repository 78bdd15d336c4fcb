"""Orders: which positions are known when. `OrderConfig` is the closed table of them."""

from continuar.orders.base import Order, View
from continuar.orders.confidence import ConfidenceOrder, ConfidenceOrderConfig
from continuar.orders.mar import MAROrder, MAROrderConfig
from continuar.orders.random import RandomOrder, RandomOrderConfig
from continuar.orders.raster import RasterOrder, RasterOrderConfig

OrderConfig = MAROrderConfig | RandomOrderConfig | RasterOrderConfig | ConfidenceOrderConfig

__all__ = [
    "ConfidenceOrder",
    "ConfidenceOrderConfig",
    "MAROrder",
    "MAROrderConfig",
    "Order",
    "OrderConfig",
    "RandomOrder",
    "RandomOrderConfig",
    "RasterOrder",
    "RasterOrderConfig",
    "View",
]
