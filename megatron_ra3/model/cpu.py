"""The only place that patches: Megatron-Core without CUDA, and without Transformer Engine or Apex.

Megatron-Core writes `device="cuda"` and `torch.cuda.current_device()` into its modules, so it fails on a machine that
has none. Here Megatron's modules, and only they, see a `torch` whose allocations land on the CPU. Everything else in
the process keeps the real one. Separately, Megatron's torch fallback optimizer cannot be checkpointed when
distributed: it is replaced by `adam.AdamW`.
"""

import atexit
import functools
import gc
import importlib
import logging
import os
import queue
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any

_FACTORIES = ("tensor", "empty", "zeros", "ones", "full", "arange", "empty_like", "zeros_like", "ones_like")

_MODULES = (
    "megatron.core.dist_checkpointing.strategies.torch",
    "megatron.core.distributed",
    "megatron.core.distributed.finalize_model_grads",
    "megatron.core.models.gpt",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.optimizer",
    "megatron.core.optimizer.distrib_optimizer",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.tensor_parallel",
)


def enable() -> None:
    """Make Megatron-Core work on this machine; call before any other import of Megatron. Idempotent.

    With CUDA, Megatron's modules keep the real torch. AdamW is installed where Transformer Engine and Apex are missing.
    """
    import torch

    _import_megatron()
    _install_adam()
    _save_without_manager()
    if torch.cuda.is_available():
        return
    view = _torch_on_cpu()
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and getattr(module, "torch", None) is torch:
            module.torch = view  # type: ignore[attr-defined]
    _patch_tensor()
    # Advice on CUDA settings, and deprecations in torch that only Megatron can act on.
    warnings.filterwarnings("ignore", module=r"megatron\.core\.")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.")


@functools.cache
def _import_megatron() -> None:
    """Import Megatron-Core, sooner than plainly.

    The garbage collector is kept from the hundreds of thousands of objects that imports make and never drop. Without a
    GPU nothing of Megatron is compiled, and its decorators are kept from loading torch's whole compiler.
    """
    import torch

    logging.getLogger("megatron.core").setLevel(logging.ERROR)
    switch = "TORCHDYNAMO_DISABLE"
    without_compiler = not torch.cuda.is_available() and switch not in os.environ
    collecting = gc.isenabled()
    gc.disable()
    if without_compiler:
        os.environ[switch] = "1"
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"megatron\.")
            for name in _MODULES:
                importlib.import_module(name)
    finally:
        if without_compiler:
            del os.environ[switch]
        gc.freeze()
        atexit.register(gc.unfreeze)  # bindings would call what is left at the exit a leak
        if collecting:
            gc.enable()


@functools.cache
def _torch_on_cpu() -> types.ModuleType:
    """Return a view of torch in which "cuda" means the CPU."""
    import torch

    cuda = _view(torch.cuda)
    cuda.current_device = lambda: torch.device("cpu")  # type: ignore[attr-defined]
    cuda.synchronize = lambda *_args, **_kwargs: None  # type: ignore[attr-defined]
    view = _view(torch)
    view.cuda = cuda  # type: ignore[attr-defined]
    for name in _FACTORIES:
        setattr(view, name, _on_cpu(getattr(torch, name)))
    return view


def _view(module: types.ModuleType) -> types.ModuleType:
    """Return a module that answers with `module`'s attributes unless one of its own is set."""
    view = types.ModuleType(module.__name__)
    view.__getattr__ = lambda name: getattr(module, name)  # type: ignore[method-assign]
    return view


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return wrapper


@functools.cache
def _patch_tensor() -> None:
    """Let `Tensor.cuda()` stay on the CPU, and `Tensor.type()` answer the CUDA names that Megatron compares with."""
    import torch

    real_type = torch.Tensor.type

    def type_(self: torch.Tensor, dtype: Any = None, non_blocking: bool = False, **kwargs: Any) -> Any:
        if dtype is not None:
            return real_type(self, dtype, non_blocking, **kwargs)
        return real_type(self).replace("torch.", "torch.cuda.", 1)

    torch.Tensor.type = type_
    torch.Tensor.cuda = lambda self, *_args, **_kwargs: self


@functools.cache
def _install_adam() -> None:
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    from megatron_ra3.model.adam import AdamW

    if not optimizer.USING_PYTORCH_OPTIMIZER:
        return
    optimizer.Adam, optimizer.USING_PYTORCH_OPTIMIZER = AdamW, False
    distrib_optimizer.Adam = AdamW
    distrib_optimizer.HAVE_APEX_OR_TE, distrib_optimizer.USING_APEX_OPTIMIZER = True, True


@functools.cache
def _save_without_manager() -> None:
    """Collect a checkpoint's write results in this process.

    Megatron spawns a manager process per rank for its asynchronous saves. Ours write in a thread, and the manager would
    outlive a killed rank.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    filesystem_async._results_queue = queue.Queue()  # noqa: SLF001
