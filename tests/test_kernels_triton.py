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

from megatron_ra3.kernels import fp8, triton_backend, triton_kernels  # noqa: E402
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


def _cases() -> list[tuple[str, bool, int, int, Tiles]]:
    """Splits and tiles of a group: all with the shipped tiles, which are the first candidates; the others with one."""
    shipped, others, both = CANDIDATES["fp8"][0], CANDIDATES["fp8"][1:], (False, True)
    cases = [("bf16", entropy, 4, 1, tiles) for tiles in CANDIDATES["bf16"] for entropy in both]
    cases += [("fp8", entropy, 4, 1, shipped) for entropy in both]
    cases += [("fp8_rescored", entropy, splits, 4, shipped) for entropy in both for splits in (1, 4, 12)]
    cases += [("fp8_rescored", entropy, 4, group, shipped) for entropy in both for group in (1, 2)]
    return cases + [("fp8_rescored", entropy, 4, 4, tiles) for tiles in others for entropy in both]


@pytest.mark.parametrize(("precision", "with_entropy", "splits", "group_tiles", "tiles"), _cases())
def test_forward_for_hopper_spills_nothing_and_uses_its_tensor_cores(
    tmp_path, precision, with_entropy, splits, group_tiles, tiles
):
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
        "GROUP_TILES": group_tiles,
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


@pytest.mark.parametrize("rank", [16, fp8.RANK])
def test_quantising_for_hopper(tmp_path, rank):
    types = {"x": "*bf16", "directions": "*bf16", "values": "*fp8e4nv", "rows": "i32", "hidden": "i32"}
    types |= dict.fromkeys(("moments", "scales"), "*fp32")
    rows, hidden = triton_backend.QUANTIZE_BLOCK
    constants = {"RANK": rank, "SPREAD": fp8.SPREAD, "BLOCK_ROWS": rows, "BLOCK_HIDDEN": hidden, "UPCAST": False}
    compiled = _compiled(triton_kernels.quantize_kernel, constants, types)
    assert _spilled(compiled, tmp_path) == 0
    assert f"wgmma.mma_async.sync.aligned.m64n{rank}" in compiled.asm["ptx"]
    assert "cvt.rn.satfinite.e4m3x2.f32" in compiled.asm["ptx"]


@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize(("precision", "groups"), [("bf16", 1), ("fp8", 1), ("fp8_rescored", 256)])
def test_finishing_rows_for_hopper(tmp_path, precision, groups, with_entropy):
    element, candidates = "fp8e4nv" if precision == "fp8" else "bf16", fp8.CANDIDATES * (groups > 1)
    types = {
        **dict.fromkeys(("x", "w"), f"*{element}"),
        **dict.fromkeys(("row_scale", "tile_scale"), "*fp32" if precision == "fp8" else "*bf16"),
        **dict.fromkeys(("sums", "maxima", "out"), "*fp32"),
        **dict.fromkeys(("rows", "hidden", "groups"), "i32"),
        "targets": "*i64",
        "columns_of_maxima": "*i32",
        "factor": "fp32",
    }
    constants = {
        "SEGMENTS": triton_backend.SEGMENTS,
        "PARTS": triton.next_power_of_2(triton_backend.SEGMENTS),
        "CANDIDATES": candidates,
        "GROUPS": groups,
        "PLACES": triton.next_power_of_2(1 + candidates),
        "TILE": fp8.TILE,
        "FP8": precision == "fp8",
        "ENTROPY": with_entropy,
        "BLOCK_HIDDEN": triton_backend.FINISH_CHANNELS,
    }
    assert _spilled(_compiled(triton_kernels.finish_kernel, constants, types), tmp_path) == 0


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
