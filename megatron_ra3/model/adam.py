"""AdamW that keeps its step count in the parameter groups, as the FusedAdam of Transformer Engine and Apex do.

Megatron-Core falls back to torch.optim.AdamW where neither is installed. That one keeps `step` per parameter, and
Megatron's distributed optimizer then can neither be saved nor loaded (it asserts on `step`), and its freshly
initialised state lacks the key. With the count in the group, every checkpoint path of Megatron works unchanged.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101), a whole group at once.

    `adam_w_mode` is part of FusedAdam's signature, which Megatron calls; only True is implemented.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
    ) -> None:
        if not adam_w_mode:
            raise ValueError("adam_w_mode=False (L2 regularisation) is not implemented: use decoupled weight decay")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "step": 0})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """Update every parameter that has a gradient; groups without parameters count the step too."""
        assert closure is None, "Megatron never passes a closure"
        for group in self.param_groups:
            group["step"] += 1
            params = [param for param in group["params"] if param.grad is not None]
            if params:
                self._update(group, params)

    def _update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        for param in params:
            state = self.state[param]
            if not state:
                state["exp_avg"] = torch.zeros_like(param)
                state["exp_avg_sq"] = torch.zeros_like(param)
        beta1, beta2 = group["betas"]
        grads = [param.grad for param in params]
        exp_avg = [self.state[param]["exp_avg"] for param in params]
        exp_avg_sq = [self.state[param]["exp_avg_sq"] for param in params]
        torch._foreach_mul_(params, 1.0 - group["lr"] * group["weight_decay"])
        torch._foreach_lerp_(exp_avg, grads, 1.0 - beta1)
        torch._foreach_mul_(exp_avg_sq, beta2)
        torch._foreach_addcmul_(exp_avg_sq, grads, grads, 1.0 - beta2)
        denominator = torch._foreach_sqrt(exp_avg_sq)  # noqa: SLF001
        torch._foreach_div_(denominator, (1.0 - beta2 ** group["step"]) ** 0.5)
        torch._foreach_add_(denominator, group["eps"])
        step_size = -group["lr"] / (1.0 - beta1 ** group["step"])
        torch._foreach_addcdiv_(params, exp_avg, denominator, step_size)
