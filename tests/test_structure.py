"""The house rules: imports run one way, importing is cheap, formats are named only in formats/, packages are complete."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = [
    {"errors", "target", "names", "logs", "variables", "einsum", "handover", "collector"},
    {"store", "formats", "artifacts", "autoload"},
    {"codegen"},
    {"kernels", "doctor"},
    {"gradient"},
    {"ops"},
    {"aoti"},
    {"inductor", "qat"},
    {"tensor", "tensor_ops", "tensor_parts", "experts", "expert_views", "multihead", "kv_cache", "paged_cache"},
    {"packing", "sharding"},
    {"dtensor"},
    {"plan", "rules", "hf_cache", "presets", "gguf_presets", "owners", "guards", "dynamo_errors", "rounding"},
    {"tracing"},
    {"policy", "report", "trust"},
    {"timing", "calibration"},
    {"options", "recorder", "trail", "policy_file"},
    {"repro"},
    {"passes", "checkpoints"},
    {"comparison"},
    {"suggestion", "divergence"},
    {"evaluation"},
    {"allocation", "lm_eval", "api", "warm", "cli_cache", "cli", "cli_debug", "cli_search", "bisection", "memory", "parallel",
     "cli_memory", "calibration_peak"},
    {"deployment"},
    {"backend"},
]
"""From the ground up: a module imports from its own layer or below."""


def sources() -> list[tuple[str, Path]]:
    """(first part of the module's name below qcompile, file)"""
    found = [(p.relative_to(ROOT / "qcompile").parts[0].removesuffix(".py"), p) for p in (ROOT / "qcompile").rglob("*.py")]
    return found + [("passes", p) for p in (ROOT / "passes").rglob("*.py")]


def imported(path: Path, part: str) -> set[str]:
    """First parts of the qcompile modules that a file imports when it is imported."""
    package = ["qcompile", *path.relative_to(ROOT / "qcompile").parts[:-1]] if part != "passes" else ["qcompile", "passes"]
    names: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names |= {f"{module}.{a.name}" for a in node.names}
    return {n.split(".")[1] for n in names if n.startswith("qcompile.")}


def test_every_module_has_a_layer() -> None:
    assert {part for part, _ in sources()} - {"__init__"} == set().union(*LAYERS)


@pytest.mark.parametrize("part,path", sources(), ids=lambda v: v.name if isinstance(v, Path) else v)
def test_imports_run_one_way(part: str, path: Path) -> None:
    if part == "__init__":
        return
    level = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    above = {name for name in imported(path, part) if name in level and level[name] > level[part]}
    assert not above, f"{path.relative_to(ROOT)} imports {above} from above"


def test_importing_touches_no_compiler_and_no_gpu() -> None:
    heavy = ["triton", "torchao", "transformers", "torch._inductor.compile_fx", "rich", "typer"]
    program = f"import sys, qcompile; print([m for m in {heavy!r} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_formats_are_asked_for_only_in_formats() -> None:
    question = re.compile(r"\b(?:if|elif)\b.*\b(?:fmt|spec\.name|format_name|format\.name)\b *(?:==|in\b)")
    found = [
        f"{path.relative_to(ROOT)}:{i}"
        for part, path in sources()
        if part != "formats"
        for i, line in enumerate(path.read_text().splitlines(), 1)
        if question.search(line)
    ]
    assert not found


def test_every_folder_of_code_is_packaged() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    folders = {p.parent.relative_to(ROOT) for p in (ROOT / "qcompile").rglob("__init__.py")}
    assert listed == {".".join(f.parts) for f in folders} | {"qcompile.passes"}
