"""The modules that stand for `nn.Linear` and `nn.Embedding` where weights are quantized."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from core.quantization.form import WeightForm
from core.quantization.kernels import Product, ProductKernel
from core.quantization.weight import DTYPES, QuantizedWeight, product


class QuantModule(nn.Module):
    """Holds a weight `[n, k]` in the inner form: a buffer for each of its tensors, under its name.

    Buffers keep their own dtypes when a model is loaded in another one, and are saved, moved and streamed like any.
    """

    def __init__(self, form: WeightForm, n: int, k: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.form, self._n, self._k = form, n, k
        self._names = tuple(form.tensors(n, k))
        for name, (shape, dtype) in form.tensors(n, k).items():
            self.register_buffer(name, torch.empty(shape, dtype=DTYPES[dtype], device=device))

    @property
    def stored(self) -> QuantizedWeight:
        """The tensors as they are; a kernel may have arranged them."""
        tensors: dict[str, Any] = {name: self._buffers[name] for name in self._names}
        return QuantizedWeight(self.form, self._n, self._k, **tensors)

    @property
    def num_parameters(self) -> int:
        """Of the weight that this stands for, with its bias."""
        return self._n * self._k + sum(each.numel() for each in self.parameters(recurse=False))

    @property
    def weight_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._buffers.values() if tensor is not None)


class QuantLinear(QuantModule):
    """A linear layer with a quantized weight. For inference: there are no gradients for it."""

    def __init__(
        self, form: WeightForm, in_features: int, out_features: int, *, bias: bool = False,
        dtype: torch.dtype | None = None, device: torch.device | str | None = None,
    ) -> None:  # fmt: skip
        """`dtype` is that of the bias, and of what comes in."""
        super().__init__(form, out_features, in_features, device)
        self.in_features, self.out_features = in_features, out_features
        self.dtype = dtype or torch.get_default_dtype()
        self.bias: nn.Parameter | None
        self.register_parameter("bias", None)
        if bias:
            empty = torch.empty(out_features, dtype=self.dtype, device=device)
            self.bias = nn.Parameter(empty, requires_grad=False)
        self._kernel: ProductKernel | None = None
        self._product: Product | None = None

    def use(self, kernel: ProductKernel, *, may_change: bool = True) -> bool:
        """Compute with a kernel from now on, if it covers the weight; it may rearrange the tensors in place where they
        are this module's alone (`may_change`). Returns whether it does."""
        if self._kernel is None and kernel.arrange(self.stored, may_change=may_change):
            self._kernel = kernel
            self.tensors_moved()
        return self._kernel is not None

    def tensors_moved(self) -> None:
        """Buffers or bias have other memory than when a kernel looked them up."""
        self._product = None

    @property
    def prepared(self) -> Product | None:
        """The kernel's product, if a kernel computes this layer."""
        if self._product is None and self._kernel is not None:
            self._product = self._kernel.prepare(self.stored, self.bias)
        return self._product

    @property
    def quantized(self) -> QuantizedWeight:
        """The weight in the inner form."""
        return self.stored if self._kernel is None else self._kernel.restored(self.stored)

    @property
    def weight(self) -> torch.Tensor:
        """`[out_features, in_features]`, dequantized when asked for."""
        return self.quantized.dequantize().to(self.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` `[..., in_features]` to `[..., out_features]`."""
        product_of = self._product or self.prepared
        if product_of is not None:
            out = product_of(x)
            if out is not None:
                return out
        return product(x, self.quantized, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.form.title}, bias={self.bias is not None}"


class QuantEmbedding(QuantModule):
    """An embedding with a quantized table; rows are dequantized when they are looked up."""

    def __init__(
        self, form: WeightForm, num_embeddings: int, embedding_dim: int, *, dtype: torch.dtype | None = None,
        device: torch.device | str | None = None, factor: float = 1.0,
    ) -> None:  # fmt: skip
        """Rows are multiplied by `factor`, in `dtype`."""
        super().__init__(form, num_embeddings, embedding_dim, device)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.dtype = dtype or torch.get_default_dtype()
        self.factor = factor

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids `[...]` to `[..., embedding_dim]`."""
        rows = self.stored.take(ids.flatten().long())
        found = rows.to(self.dtype).view(*ids.shape, self.embedding_dim)
        return found if self.factor == 1.0 else found * torch.tensor(self.factor, dtype=self.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.form.title}"
