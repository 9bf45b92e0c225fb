"""Mixed precision by a copy: a model computes with its weights in bfloat16 while these, their gradients and the
optimizer stay in float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class ComputingCopy:
    """Of all the weights of a model; buffers, as the rotary frequencies, stay as they are."""

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        self._places = [
            (module, name, weight)
            for module in model.modules()
            for name, weight in module.named_parameters(recurse=False)
            if weight.is_floating_point()
        ]
        self._dtype = dtype
        self._in_place = False

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the model's layers hold a copy; what is computed with it gives gradients to the weights themselves.

        A backward pass that computes activations again belongs inside too. Within another one it does nothing.
        """
        if self._in_place:
            yield
            return
        copies: dict[nn.Parameter, Tensor] = {}
        for module, name, weight in self._places:
            if weight not in copies:  # of tied layers, one for all
                copies[weight] = weight.to(self._dtype)
            module._parameters[name] = copies[weight]  # type: ignore[assignment]
        self._in_place = True
        try:
            yield
        finally:
            self._in_place = False
            for module, name, weight in self._places:
                module._parameters[name] = weight
