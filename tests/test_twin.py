"""A twin takes new weights beside the served model, shares what is no parameter, and changes places with it."""

import torch
from torch import Tensor, nn

from megatron_ra3.rollout.vllm_plugin.twin import Twin


class Special(nn.Parameter):
    """As vLLM's parameters: a class and attributes that loading goes by."""

    rows: int


class Model(nn.Module):
    """Two fused rows, a norm that no checkpoint brings, a tied head and a cache."""

    def __init__(self) -> None:
        super().__init__()
        self.fused = nn.Module()
        self.fused.weight = Special(torch.zeros(2, 3), requires_grad=False)
        self.fused.weight.rows = 2
        self.norm = nn.Parameter(torch.full((3,), 7.0), requires_grad=False)
        self.embedding = nn.Embedding(4, 3)
        self.head = self.embedding
        self.register_buffer("frequencies", torch.arange(3.0))
        self.cache = [torch.zeros(1)]

    def load_weights(self, weights: list[tuple[str, Tensor]]) -> set[str]:
        parameters = dict(self.named_parameters())
        loaded = set()
        for name, value in weights:
            found, row = ("fused.weight", int(name[-1])) if name.startswith("row") else (name, None)
            parameter = parameters[found]
            if row is not None:
                assert type(parameter) is Special
                assert row < parameter.rows
            (parameter.data if row is None else parameter.data[row]).copy_(value)
            loaded.add(found)
        return loaded


def weights(value: float) -> list[tuple[str, Tensor]]:
    rows = [(f"row{row}", torch.full((3,), value + row)) for row in range(2)]
    return [*rows, ("embedding.weight", torch.full((4, 3), value))]


def served(model: Model) -> tuple[list[float], float, float]:
    return model.fused.weight[:, 0].tolist(), float(model.norm[0]), float(model.head.weight.detach()[0, 0])


def test_new_weights_are_served_from_the_exchange_on_and_not_before():
    model = Model()
    before = served(model)
    twin = Twin(model)
    parameters = dict(model.named_parameters())
    for value in (1.0, 5.0, -2.0):
        twin.fill(weights(value))
        assert served(model) == before
        twin.exchange()
        before = ([value, value + 1], 7.0, value)
        assert served(model) == before
    assert all(parameters[name] is found for name, found in model.named_parameters())
    assert model.head is model.embedding


def test_what_is_no_parameter_is_shared_and_memory_is_not_taken_twice():
    model = Model()
    twin = Twin(model)
    assert twin._twin.cache is model.cache
    assert twin._twin.frequencies is model.frequencies
    assert twin._twin.head is twin._twin.embedding
    assert twin._twin.embedding is not model.embedding
    addresses = {found.data_ptr() for each in (model, twin._twin) for found in each.parameters()}
    for value in (1.0, 2.0):
        twin.fill(weights(value))
        twin.exchange()
    assert {found.data_ptr() for each in (model, twin._twin) for found in each.parameters()} == addresses
    assert len(addresses) == 6
