"""The import order of docs/architecture.md: every module imports only modules of a lower rank.

Every module may import those in ``FREE``. Modules of the same rank do not import each other, nor do the parts (ranks 1
to 4). Only entry points import entry points.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

ROOMS = {
    0: "types errors files distributed weights contracts secrets identity ranges overrides presets objective",
    1: "data",
    2: "encoders families",
    3: "adapter",
    5: "model",
    6: "references",
    7: "export",
    8: "sampling",
    9: "prompter metrics",
    10: "training evaluation",
    11: "launcher",
    12: "slurm",
    13: "cli",
    14: "tools",
}
RANKS = {room: rank for rank, rooms in ROOMS.items() for room in rooms.split()}
FREE = {"types", "errors", "files", "distributed", "weights", "contracts", "objective", "__version__"}
PARTS = {"data", "encoders", "families", "adapter"}
STARTERS = {"launcher", "slurm", "cli", "tools"}  # imported by no other module


def imported_modules(source: str, module: str) -> Iterator[str]:
    """Full names of the modules of `ipa` that the source of ``module`` imports, wherever in it the import stands.

    For ``from ipa import x`` that is ``ipa.x``; ``module`` is ``ipa.room.__init__`` for a package itself.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".")[: -node.level] if node.level else []
            origin = ".".join([*package, *([node.module] if node.module else [])])
            names = [f"{origin}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name for name in names if name.startswith("ipa."))


def complaint(importer: str, imported: str) -> str | None:
    """What is wrong when one module imports another, None if nothing is."""
    if importer == imported or imported in FREE:
        return None
    for room in (importer, imported):
        if room not in RANKS:
            return f"{room!r} has no rank: give it one in tests/test_import_order.py and in docs/architecture.md"
    if imported in STARTERS and importer not in STARTERS:
        return "only entry points import entry points"
    if {importer, imported} <= PARTS:
        return "parts do not import each other; they meet in ipa.model"
    if RANKS[imported] >= RANKS[importer]:
        return f"rank {RANKS[importer]} imports rank {RANKS[imported]}"
    return None


def complaints(source: str, module: str) -> list[str]:
    """All offending imports of a module, with the reason."""
    importer = module.split(".")[1]
    found = []
    for name in imported_modules(source, module):
        reason = complaint(importer, name.split(".")[1])
        if reason:
            found.append(f"{module} imports {name}: {reason}")
    return found


def modules() -> list[Path]:
    return sorted(path for path in (ROOT / "ipa").rglob("*.py") if path != ROOT / "ipa/__init__.py")


def test_modules_import_only_what_is_above_them() -> None:
    found = []
    for path in modules():
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        found += complaints(path.read_text(), module)

    assert found == []


def test_package_itself_imports_nothing() -> None:
    tree = ast.parse((ROOT / "ipa/__init__.py").read_text())

    assert [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)] == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("ipa.adapter.heads", "from ipa import model"),
        ("ipa.adapter.__init__", "from ..families.sdxl import StableDiffusionXL"),
        ("ipa.model", "def late():\n    from ipa.sampling import pipeline"),
        ("ipa.training.run", "from ipa.tools.sample import main"),
        ("ipa.cellar", "from ipa.model import Model"),
    ],
)
def test_checker_objects(module: str, source: str) -> None:
    assert len(complaints(source, module)) == 1
