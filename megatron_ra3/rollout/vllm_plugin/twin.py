"""A second set of a model's parameters: filled while the first is served, then exchanged with it in no time."""
# ruff: noqa: SLF001 - torch has no other way to put a module's copy over parameters of its own

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import nn


class Twin:
    """The modules of `model` over parameters of their own; buffers, caches and all else are shared.

    Only for models that compute with their parameters as `load_weights` leaves them (`plain_weights.are_plain`).
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._twin = _twin_of(model, {}, {})

    def fill(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load weights, named as in a checkpoint; parameters that get none take the served value.

        A parameter that joins several tensors of a checkpoint must get all of them or none.
        """
        loaded = self._twin.load_weights(weights)
        served = dict(self.model.named_parameters())
        for name, parameter in self._twin.named_parameters():
            if name not in loaded:
                parameter.data.copy_(served[name].data)

    def exchange(self) -> None:
        """Let `model` compute with what was filled in, and keep its old parameters for the next filling."""
        pairs = zip(self.model.parameters(), self._twin.parameters(), strict=True)
        for served, filled in pairs:
            served.data, filled.data = filled.data, served.data


def _twin_of(module: nn.Module, modules: dict[nn.Module, nn.Module], own: dict[int, nn.Parameter]) -> nn.Module:
    """Tied embeddings and whatever else the model shares, its twin shares too: `modules` and `own` know the copies."""
    if module not in modules:
        twin = modules[module] = copy.copy(module)
        twin._parameters = {name: _like(found, own) for name, found in module._parameters.items()}
        twin._modules = {
            name: None if child is None else _twin_of(child, modules, own) for name, child in module._modules.items()
        }
    return modules[module]


def _like(parameter: nn.Parameter | None, own: dict[int, nn.Parameter]) -> nn.Parameter | None:
    """A parameter of the same shape, class and attributes, vLLM's loaders among them; its values are undefined."""
    if parameter is None:
        return None
    if id(parameter) not in own:
        made = torch.Tensor._make_subclass(type(parameter), torch.empty_like(parameter.data), False)
        made.__dict__.update(parameter.__dict__)
        own[id(parameter)] = made
    return own[id(parameter)]
