"""Orders: which positions are known when. `OrderConfig` is the closed table of them."""

from continuar.orders.base import Order, View
from continuar.orders.mar import MAROrder, MAROrderConfig

OrderConfig = MAROrderConfig

__all__ = ["MAROrder", "MAROrderConfig", "Order", "OrderConfig", "View"]
