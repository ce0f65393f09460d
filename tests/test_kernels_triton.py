"""The Triton kernels without a GPU: right in the interpreter, and compiled for Hopper without spilling a register."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

from triton import knobs  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from megatron_ra3.kernels import triton_backend, triton_kernels  # noqa: E402
from megatron_ra3.kernels.tuning import CANDIDATES, Tiles  # noqa: E402

HOPPER = GPUTarget("cuda", 90, 32)
SHARED_MEMORY_BYTES = 227 * 1024


def test_in_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "tests/interpreter"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert re.search(r"\d+ passed", done.stdout)
    assert "skipped" not in done.stdout


def _compiled(kernel, constants: dict[str, object], types: dict[str, str], **options: int):
    """As launched on sizes that are multiples of 16, as rows of tensors always are."""
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    aligned = [index for index, kind in enumerate(signature.values()) if kind.startswith("*") or kind == "i32"]
    attributes = {(index,): [["tt.divisibility", 16]] for index in aligned}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places, attrs=attributes)
    return triton.compile(source, target=HOPPER, options=options)


def _tiled(kernel, tiles: Tiles, constants: dict[str, object], types: dict[str, str]):
    constants = {**constants, **tiles.blocks(), "UPCAST": False}
    return _compiled(kernel, constants, types, num_warps=tiles.warps, num_stages=tiles.stages)


def _descriptors(element: str, tiles: Tiles) -> dict[str, str]:
    return {
        "x_desc": f"tensordesc<{element}[{tiles.rows},{tiles.hidden}]>",
        "w_desc": f"tensordesc<{element}[{tiles.columns},{tiles.hidden}]>",
    }


def _spilled(compiled, tmp_path: Path) -> int:
    """Bytes of registers kept in memory."""
    binary = tmp_path / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    usage = subprocess.run(
        [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", binary], capture_output=True, text=True, check=True
    ).stdout
    return int(re.search(r"REG:\d+ STACK:(\d+)", usage).group(1))


def _check(compiled, tmp_path: Path, *, columns: int) -> None:
    assert _spilled(compiled, tmp_path) == 0
    assert f"wgmma.mma_async.sync.aligned.m64n{columns}" in compiled.asm["ptx"]
    assert "cp.async.bulk.tensor" in compiled.asm["ptx"]
    assert compiled.metadata.shared <= SHARED_MEMORY_BYTES


def _cases() -> list[tuple[str, bool, int, Tiles]]:
    """All launches with the shipped tiles, which are the first candidates; the others with 4 splits."""
    cases = [("bf16", entropy, 4, CANDIDATES["bf16"][0]) for entropy in (False, True)]
    cases += [("fp8", entropy, 4, CANDIDATES["fp8"][0]) for entropy in (False, True)]
    cases += [
        ("fp8_rescored", entropy, splits, CANDIDATES["fp8"][0]) for entropy in (False, True) for splits in (1, 4, 12)
    ]
    cases += [("bf16", entropy, 4, tiles) for tiles in CANDIDATES["bf16"][1:] for entropy in (False, True)]
    return cases + [("fp8_rescored", entropy, 4, tiles) for tiles in CANDIDATES["fp8"][1:] for entropy in (False, True)]


@pytest.mark.parametrize(("precision", "with_entropy", "splits", "tiles"), _cases())
def test_forward_for_hopper_spills_nothing_and_uses_its_tensor_cores(tmp_path, precision, with_entropy, splits, tiles):
    quantized = precision != "bf16"
    types = {
        **_descriptors("fp8e4nv" if quantized else "bf16", tiles),
        **dict.fromkeys(("row_scale", "tile_scale"), "*fp32" if quantized else "*bf16"),
        **dict.fromkeys(("sums", "maxima"), "*fp32"),
        **dict.fromkeys(("rows", "vocab", "hidden", "row_programs", "segment_tiles"), "i32"),
        "targets": "*i64",
        "columns_of_maxima": "*i32",
        "factor": "fp32",
    }
    constants = {
        "SPLITS": splits,
        "SEGMENTS": triton_backend.SEGMENTS,
        "GROUP_TILES": triton_backend.GROUP_TILES,
        "FP8": quantized,
        "RESCORED": precision == "fp8_rescored",
        "ENTROPY": with_entropy,
    }
    compiled = _tiled(triton_kernels.forward_kernel, tiles, constants, types)
    _check(compiled, tmp_path, columns=tiles.columns)


@pytest.mark.parametrize(
    ("with_entropy", "tiles"),
    [
        *((False, tiles) for tiles in CANDIDATES["gradient"]),
        *((True, tiles) for tiles in CANDIDATES["gradient_with_entropy"]),
    ],
)
def test_gradient_for_hopper_spills_nothing(tmp_path, with_entropy, tiles):
    types = {
        **_descriptors("bf16", tiles),
        **dict.fromkeys(("lse", "entropy", "grad_logprob", "grad_entropy"), "*fp32"),
        **dict.fromkeys(("factor", "inverse_temperature"), "fp32"),
        "targets": "*i64",
        "out": "*bf16",
        **dict.fromkeys(("rows", "vocab", "hidden", "first_column", "out_columns"), "i32"),
    }
    compiled = _tiled(triton_kernels.gradient_kernel, tiles, {"ENTROPY": with_entropy}, types)
    _check(compiled, tmp_path, columns=tiles.columns)


@pytest.mark.parametrize("element", ["bf16", "fp8e4nv"])
def test_gathered_dots_and_projections_for_hopper(tmp_path, element):
    types = {"x": f"*{element}", "w": f"*{element}", "columns": "*i64", "out": "*fp32", "hidden": "i32"}
    gather = _compiled(triton_kernels.gather_dot_kernel, {"PER_ROW": 9, "BLOCK_HIDDEN": 2048}, types)
    types = {"x": "*bf16", "rounded": "*fp8e4nv", "hidden": "i32"} | dict.fromkeys(
        ("moments", "own", "square"), "*fp32"
    )
    project = _compiled(triton_kernels.projections_kernel, {"BLOCK_HIDDEN": 2048}, types)
    assert [_spilled(compiled, tmp_path) for compiled in (gather, project)] == [0, 0]


def test_passes_over_rows_of_logits_for_hopper(tmp_path):
    types = {
        **dict.fromkeys(("logits", "sums", "target_logits", "lse", "weights"), "*fp32"),
        **dict.fromkeys(("factor", "inverse_temperature"), "fp32"),
        **dict.fromkeys(("rows", "vocab", "stride", "out_stride"), "i32"),
        "targets": "*i64",
        "out": "*bf16",
    }
    for kernel in (triton_kernels.row_sums_kernel, triton_kernels.cross_entropy_gradient_kernel):
        compiled = _compiled(kernel, {"BLOCK_COLUMNS": triton_backend.COLUMNS_AT_ONCE}, types)
        assert _spilled(compiled, tmp_path) == 0
        assert "ld.global.v4" in compiled.asm["ptx"]
