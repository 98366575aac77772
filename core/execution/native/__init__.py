"""CPU kernels in C, compiled on the machine that runs them: linear layers, paged attention and row-wise helpers.

`load_native(cache_dir)` builds and loads them, or returns None where no C compiler works; torch then does the work.
"""

from core.execution.native.instructions import Instructions, do_all_products, packs_weights
from core.execution.native.kernels import NativeKernels, load_native
from core.execution.native.layers import NativeLayers, rehome, swap_layers
from core.execution.native.modules import NativeLinear, NativeRMSNorm, swap_linears, swap_norms
from core.execution.native.packed import PackedLinear, pack_linears, packing_bytes
from core.execution.native.quantized import NativeProducts, PanelProducts, covers, covers_panels, use_kernels

__all__ = [
    "Instructions",
    "NativeKernels",
    "NativeLayers",
    "NativeLinear",
    "NativeProducts",
    "NativeRMSNorm",
    "PackedLinear",
    "PanelProducts",
    "covers",
    "covers_panels",
    "do_all_products",
    "load_native",
    "pack_linears",
    "packing_bytes",
    "packs_weights",
    "rehome",
    "swap_layers",
    "swap_linears",
    "swap_norms",
    "use_kernels",
]
