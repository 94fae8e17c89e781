"""Imports go down only, files stay small, and importing the package needs neither Triton nor a GPU."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "lora_kernels"
FLOORS = (
    ("reference", "philox", "problem", "checks", "segments", "packed", "operands"),
    ("kernels",),
    ("tuning",),
    ("launch", "launcher", "layouts", "launch_experts", "launch_plan", "launch_columns", "launch_gate", "chain", "streams")
    + ("compile_only", "compile_problems"),
    ("ops", "autograd", "calls", "dispatch", "projections", "merging"),
    ("nn", "multi", "over", "experts", "experts_node", "experts_layer", "dora", "lora_config", "shared_input", "gated", "gates")
    + ("packed_layer", "slots", "parity", "parity_cases", "dequantize"),
    ("cli", "__main__", "demo", "demo_data", "demo_peft", "integrations", "apply", "files", "adapter_store", "analysis", "inspect_adapter")
    + ("adapter_layers", "serving", "pool"),
)
FLOOR = {name: level for level, names in enumerate(FLOORS) for name in names}
FILES = sorted(path for path in PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    """The floor's name for a file: its folder below the package, or its own name."""
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imports(path: Path, *, lazy: bool = True) -> set[str]:
    """Modules that a file imports, absolute; ``lazy``: those inside functions too."""
    package = ["lora_kernels", *path.relative_to(PACKAGE).parts[:-1]]
    tree = ast.parse(path.read_text())
    nodes = ast.walk(tree) if lazy else tree.body
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return found


def parts(modules: set[str]) -> set[str]:
    return {m.split(".")[1] for m in modules if m.startswith("lora_kernels.") and m.split(".")[1] in FLOOR}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_file(path):
    assert len(path.read_text().splitlines()) <= 400, "one idea a file, at most 400 lines"
    assert ast.get_docstring(ast.parse(path.read_text())), "a file begins with what it is"
    part = part_of(path)
    if part == "__init__" and path.parent == PACKAGE:
        return
    assert part in FLOOR, f"{part} has no floor"
    higher = {other for other in parts(imports(path, lazy=False)) if FLOOR[other] > FLOOR[part]}
    assert not higher, f"{part} (floor {FLOOR[part]}) imports {higher} from above"
    late = {other for other in parts(imports(path)) if FLOOR[other] > FLOOR[part]}
    assert not late, f"{part} (floor {FLOOR[part]}) imports {late} from above inside a function"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_triton_and_torch_stay_on_their_floors(path):
    part, modules = part_of(path), {m.split(".")[0] for m in imports(path)}
    if "triton" in modules:
        assert part in ("kernels", "launch", "launcher", "compile_only", "dispatch"), f"{part} imports triton"
    if part == "kernels":
        assert "torch" not in modules
    if part == "tuning" and path.name not in ("validity.py",):
        assert "torch" not in modules, "tuning is values and rules, no tensors"


def test_import_without_triton():
    code = """
import sys
sys.modules['triton'] = None  # an import fails, and whoever looks for it is told that it is not there
import torch, lora_kernels
assert not torch.cuda.is_initialized()
x, w = torch.randn(3, 8), torch.randn(5, 8)
a, b = torch.randn(2, 8, requires_grad=True), torch.randn(5, 2)
lora_kernels.lora_linear(x, w, a, b).sum().backward()
try:
    lora_kernels.lora_linear(x, w, a, b, impl='triton')
except lora_kernels.UnsupportedError as error:
    assert 'triton cannot be imported' in str(error), error
    print('refused')
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.stdout == "refused\n", out.stderr


def test_every_mutants_text_stands_in_the_code():
    """`tests/mutation.py` is run by hand; what its slips replace has to be there when it is."""
    import mutants_launcher

    gone = [m.name for m in mutants_launcher.EVERY if (PACKAGE / m.file).read_text().count(m.old) != m.count]
    assert gone == []
