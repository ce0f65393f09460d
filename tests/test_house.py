"""The rules of the house, checked on the sources: sizes, what may import what, who may patch, and stray paths."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.support import require

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "megatron_ra3"
MODULES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
SOURCES = sorted(
    path for folder in ("megatron_ra3", "tests", "tools", "examples") for path in (ROOT / folder).rglob("*.py")
)
# Everything a reader or a user meets, besides the Python sources.
TEXTS = sorted(
    [ROOT / name for name in ("README.md", "CHANGELOG.md", "pyproject.toml", "setup.py", ".ci/run")]
    + [
        path
        for folder in ("docs", "examples", "slurm", "tools", "tests", "requirements")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in {".md", ".yaml", ".sh", ".sbatch", ".txt", ".lock"}
    ]
)

HEAVY = {"torch", "megatron", "vllm", "transformers", "webdataset", "safetensors", "tokenizers", "numpy", "aiohttp"}
ENGINES = {"torch.distributed", "megatron", "vllm"}
# Decisions stay pure: what these modules may not import, at any depth (also inside functions).
FORBIDDEN_IMPORTS = {
    "config.py": HEAVY,
    "rlvr_config.py": HEAVY,
    "settings.py": HEAVY,
    "validation.py": HEAVY,
    "latents.py": HEAVY,
    "schedule.py": HEAVY,
    "corpus/lines.py": HEAVY,
    "presets.py": HEAVY,
    "report/signatures.py": HEAVY,
    "observe/spans.py": HEAVY,
    "observe/reading.py": HEAVY,
    "observe/timeline.py": HEAVY,
    "observe/engine_times.py": HEAVY,
    "observe/shares.py": HEAVY,
    "observe/run_view.py": HEAVY,
    "observe/engine_figures.py": HEAVY,
    "rollout/ahead.py": HEAVY,
    "rollout/staleness.py": HEAVY,
    "model/geometry.py": HEAVY,
    "launch/layout.py": HEAVY,
    "launch/memory.py": HEAVY,
    "launch/timing.py": HEAVY,
    "launch/forecast.py": HEAVY,
    "launch/placement.py": HEAVY,
    "launch/plan.py": HEAVY,
    "rollout/sampler.py": ENGINES | {"transformers", "webdataset", "aiohttp"},
    "objective.py": ENGINES | {"transformers", "webdataset", "aiohttp"},
}
PATCHES = "model/cpu.py"


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names of everything imported anywhere in `tree`; `from a import b` counts as a and as a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def breaches(names: set[str], forbidden: set[str]) -> set[str]:
    return {name for name in names if any(name == bad or name.startswith(f"{bad}.") for bad in forbidden)}


def foreign_names(tree: ast.AST) -> dict[str, str]:
    """Local name -> dotted origin, for every name bound by importing from torch or megatron."""
    bound: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.partition(".")[0]
                bound[alias.asname or top] = alias.name if alias.asname else top
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                bound[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return {name: origin for name, origin in bound.items() if origin.partition(".")[0] in {"torch", "megatron"}}


def dotted(node: ast.expr) -> str | None:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        left = dotted(node.value)
        return left and f"{left}.{node.attr}"
    return None


def patches(tree: ast.AST) -> Iterator[str]:
    """Writes to attributes of imported foreign names: `torch.x.y = z`, `del torch.x`, `setattr(torch.x, ...)`."""
    foreign = foreign_names(tree)
    for node in ast.walk(tree):
        written: list[ast.expr | None] = []
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del):
            written = [node.value]
        elif isinstance(node, ast.Call) and dotted(node.func) in {"setattr", "delattr"}:
            written = [node.args[0]]
        for target in written:
            name = dotted(target) if target is not None else None
            if name is not None and name.partition(".")[0] in foreign:
                yield f"line {node.lineno}: {ast.unparse(node)}"


def test_the_checks_see_what_they_forbid():
    tree = ast.parse(
        "def f():\n    import torch.cuda as gpu\n    from megatron import core\n    gpu.synchronize = print\n"
        "    setattr(core.parallel_state, 'x', 1)\n    del core.y\n    self.weight = 1\n    x = gpu.z\n"
    )
    assert breaches(set(imports(tree)), ENGINES | {"torch"}) == {"torch.cuda", "megatron", "megatron.core"}
    assert {line.split(":")[0] for line in patches(tree)} == {"line 4", "line 5", "line 6"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_and_functions_stay_short(path):
    lines = path.read_text(encoding="utf-8").count("\n")
    assert lines <= (150 if path == PACKAGE / "em.py" else 600)
    long = {
        node.name: node.end_lineno - node.lineno + 1
        for node in ast.walk(parse(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno - node.lineno >= 100
    }
    assert not long


@pytest.mark.parametrize("module", ["em.py", "estep.py", "mstep.py", PATCHES, *FORBIDDEN_IMPORTS])
def test_the_modules_these_rules_name_exist(module):
    assert module in MODULES


@pytest.mark.parametrize("module", FORBIDDEN_IMPORTS)
def test_decisions_stay_pure(module):
    assert not breaches(set(imports(parse(PACKAGE / module))), FORBIDDEN_IMPORTS[module])


@pytest.mark.parametrize("module", MODULES)
def test_only_one_module_patches_torch_and_megatron(module):
    if module != PATCHES:
        assert not list(patches(parse(PACKAGE / module)))


@pytest.mark.parametrize("module", MODULES)
def test_modules_say_why_they_exist(module):
    assert ast.get_docstring(parse(PACKAGE / module))


@pytest.mark.parametrize(
    "module", ["config", "rlvr_config", "latents", "schedule", "corpus.lines", "launch.plan_command"]
)
def test_pure_modules_import_without_heavy_packages(module):
    code = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({sorted(HEAVY)}))\n"  # None makes `import name` raise ImportError
        f"import megatron_ra3.{module}\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("path", [*SOURCES, *TEXTS], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_path_of_somebodys_machine(path):
    text = path.read_text(encoding="utf-8")
    assert not re.findall(r"(?<![\w.])/(?:home|root|Users|work|mnt|opt|scratch)/[\w.-]+", text)


def test_documented_commands_name_existing_files():
    named = []
    for document in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for block in re.findall(r"^```(?:bash|sh|console)\n(.*?)^```", document.read_text(), re.DOTALL | re.MULTILINE):
            named += re.findall(r"(?<![\w/.$-])((?:examples|tools|tests|slurm|benchmarks|\.ci)/[\w./-]*\w)", block)
    assert {"examples/quickstart.sh", "tests/run.sh"} <= set(named)
    assert not [name for name in named if not (ROOT / name).exists()]


def test_a_skip_is_a_failure_in_ci(monkeypatch):
    monkeypatch.delenv("CI", raising=False)
    require(True, "never shown")
    with pytest.raises(pytest.skip.Exception, match="no slurm"):
        require(False, "no slurm")
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="no slurm"):
        require(False, "no slurm")
