"""Saved activations as packed codes: layers that save the output of a qrelu for backward save its codes instead.

Inside `packed_activations` a pair of saved-tensor hooks sees each tensor that autograd saves. The storage of a qrelu's
output y carries a record, from which the hooks learn what to save instead: the codes, from which y is rebuilt bit for
bit. Every view of y shares that storage, and the record is freed with it.
"""

from .blocks import is_packed, pack_activations_, packed_activations
from .graphs import packs_graph
from .hooks import Packing, active_packing, packing_of, record_codes, record_product, record_source, square

__all__ = [
    "Packing",
    "active_packing",
    "is_packed",
    "pack_activations_",
    "packed_activations",
    "packing_of",
    "packs_graph",
    "record_codes",
    "record_product",
    "record_source",
    "square",
]
