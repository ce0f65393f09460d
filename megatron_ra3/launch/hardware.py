"""Peak rates of GPUs as published, and how much of a peak a run reaches: the only numbers a plan takes on trust.

Everything else in a plan is arithmetic, so a forecast that turns out wrong is put right here.

Sources, datasheets of NVIDIA unless named (dense rates, no sparsity; SXM boards):
    A100 80GB: 312 TFLOP/s bf16, 19.5 fp32, 2.04 TB/s, NVLink 600 GB/s both ways together; DGX A100: 200 Gb/s per GPU.
    H100: 989.4 bf16, 1978.9 fp8, 66.9 fp32, 3.35 TB/s, NVLink 900 GB/s; DGX H100: 400 Gb/s per GPU.
    H200: as H100 with 4.8 TB/s. B200 (HGX): 2250 bf16, 4500 fp8, 75 fp32, 7.7 TB/s, NVLink 1800 GB/s, 400 Gb/s per GPU.
    Memory is what `torch.cuda.get_device_properties` reports, a little less than what is sold.
    A100 has no fp8 matrix units, so fp8 runs at its bf16 rate.

Shares of a peak (`Efficiency`):
    matrix 0.60: FBGEMM reports 585 TFLOP/s bf16 for 8192^3 on a power-limited H100 (59 %); 790 (80 %) is reached by an
        H200 on random data of that size. With all else a step must end near the 41 to 48 % of the peak that the README
        of Megatron-LM reports for whole training steps of 2 to 462 billion parameters on H100s.
    memory 0.80: a plain copy reaches 4.3 of an H200's 4.8 TB/s (90 %); short kernels reach less.
    link 0.80: what NCCL's all-reduce makes of NVLink and of one 400 Gb/s adapter per GPU; an assumption.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

GIB = 2**30
Dtype = Literal["fp32", "bf16"]
DTYPE_BYTES: dict[Dtype, int] = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU in a node of its usual kind: published peaks, in FLOP/s and bytes/s; links count one direction."""

    memory_bytes: float
    bf16_flops: float
    fp8_flops: float
    fp32_flops: float
    memory_bytes_per_s: float
    nvlink_bytes_per_s: float
    network_bytes_per_s: float


GPUS: dict[str, Gpu] = {
    "a100": Gpu(
        memory_bytes=79.1 * GIB,
        bf16_flops=312e12,
        fp8_flops=312e12,
        fp32_flops=19.5e12,
        memory_bytes_per_s=2.04e12,
        nvlink_bytes_per_s=300e9,
        network_bytes_per_s=25e9,
    ),
    "h100": Gpu(
        memory_bytes=79.1 * GIB,
        bf16_flops=989.4e12,
        fp8_flops=1978.9e12,
        fp32_flops=66.9e12,
        memory_bytes_per_s=3.35e12,
        nvlink_bytes_per_s=450e9,
        network_bytes_per_s=50e9,
    ),
    "h200": Gpu(
        memory_bytes=139.8 * GIB,
        bf16_flops=989.4e12,
        fp8_flops=1978.9e12,
        fp32_flops=66.9e12,
        memory_bytes_per_s=4.8e12,
        nvlink_bytes_per_s=450e9,
        network_bytes_per_s=50e9,
    ),
    "b200": Gpu(
        memory_bytes=178.4 * GIB,
        bf16_flops=2250e12,
        fp8_flops=4500e12,
        fp32_flops=75e12,
        memory_bytes_per_s=7.7e12,
        nvlink_bytes_per_s=900e9,
        network_bytes_per_s=50e9,
    ),
}


@dataclass(frozen=True)
class Efficiency:
    """Shares of the published peaks that a run reaches; see the module's sources."""

    matrix: float = 0.60
    memory: float = 0.80
    link: float = 0.80


@dataclass(frozen=True, kw_only=True)
class Device:
    """What one rank computes with: rates as reached, and how its layers are built.

    `fused`: Transformer Engine's layers (no [s, s] scores in memory, sequence parallelism beside tensor parallelism);
    without it Megatron's own. `row_multiple`: rows of the vocabulary on a rank are rounded up to it.
    """

    flops: float
    fp8_flops: float
    memory_bytes_per_s: float
    nvlink_bytes_per_s: float
    network_bytes_per_s: float
    fused: bool
    row_multiple: int


def device(gpu: Gpu, dtype: Dtype, efficiency: Efficiency = Efficiency()) -> Device:
    """A GPU as a run in `dtype` finds it."""
    peak = gpu.bf16_flops if dtype == "bf16" else gpu.fp32_flops
    return Device(
        flops=peak * efficiency.matrix,
        fp8_flops=gpu.fp8_flops * efficiency.matrix,
        memory_bytes_per_s=gpu.memory_bytes_per_s * efficiency.memory,
        nvlink_bytes_per_s=gpu.nvlink_bytes_per_s * efficiency.link,
        network_bytes_per_s=gpu.network_bytes_per_s * efficiency.link,
        fused=True,
        row_multiple=128,
    )
