"""The house: scripts share vit.py and nothing else; the plumbing is one text; six packages."""
import ast
import sys

import pytest
from conftest import ROOT
from plumbing import SCRIPTS, blocks

SCRIPTS = [name for name in SCRIPTS if (ROOT / f"{name}.py").exists()]
PLUMBING = blocks((ROOT / "mae.py").read_text())


def test_plumbing_has_three_blocks():
    assert [marker.split("plumbing, ")[1].split(":")[0] for marker in PLUMBING] == ["start", "data", "training"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_plumbing_is_one_text(script):
    """`python tests/plumbing.py` copies mae.py's."""
    own = blocks((ROOT / f"{script}.py").read_text())
    assert own and own.items() <= PLUMBING.items()


@pytest.mark.parametrize("script", [*SCRIPTS, "vit"])
def test_scripts_import_vit_and_five_packages(script):
    imports = set()
    for node in ast.walk(ast.parse((ROOT / f"{script}.py").read_text())):
        if isinstance(node, ast.Import):
            imports |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imports.add(node.module.split(".")[0])
    known = {"vit", "torch", "torchvision", "numpy", "tqdm", "matplotlib", "PIL"}
    assert imports - known <= sys.stdlib_module_names


def test_requirements_are_six_packages():
    lines = [line.split(">")[0] for line in (ROOT / "requirements.txt").read_text().split()]
    assert sorted(lines) == ["matplotlib", "numpy", "pytest", "torch", "torchvision", "tqdm"]
