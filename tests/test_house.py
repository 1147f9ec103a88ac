"""The house: scripts share vit.py only; plumbing is one text by name; tests check something."""
import ast
import re
import subprocess
import sys

import pytest
from assertions import unchecked
from conftest import ROOT
from plumbing import SCRIPTS, plumbing

SHARED = plumbing((ROOT / "mae.py").read_text())
LESSONS = {"distill": 120, "simmim": 150}  # changed lines above the plumbing, against mae.py


@pytest.mark.parametrize("script", SCRIPTS)
def test_plumbing_of_one_name_is_one_text(script):
    """`python tests/plumbing.py` copies mae.py's."""
    own = plumbing((ROOT / f"{script}.py").read_text())
    assert "__main__" in own
    for name in own.keys() & SHARED.keys():
        assert own[name] == SHARED[name], name


def test_detect_parses_as_all_others_but_for_its_options():
    """Its own parser begins and ends with the text of `parse`."""
    text = (ROOT / "detect.py").read_text()
    own = text[text.index("def parse_detection"):]
    for first, last in (("    parser = argparse", "    add = "), ("    if typed.resume", "(argv)")):
        shared = SHARED["parse"][SHARED["parse"].index(first):]
        shared = shared[:shared.rindex(last) + len(last)]
        assert shared.count("\n") >= 3 and shared in own


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_has_no_plumbing_that_it_does_not_use(script):
    text = (ROOT / f"{script}.py").read_text()
    for name in plumbing(text).keys() - {"__main__"}:
        assert len(re.findall(rf"\b{name}\b", text)) > 1, name


@pytest.mark.parametrize("script", LESSONS)
def test_a_lesson_is_a_short_diff_of_mae(script, tmp_path):
    files = []
    for name in ("mae", script):
        top, _, _ = (ROOT / f"{name}.py").read_text().partition("\n# ====")
        files.append(tmp_path / name)
        files[-1].write_text(top)
    diff = subprocess.run(["diff", *files], capture_output=True, text=True).stdout
    assert 0 < len(re.findall("^[<>]", diff, re.MULTILINE)) <= LESSONS[script]


FILES = sorted([*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")])


@pytest.mark.parametrize("path", FILES, ids=[path.name for path in FILES])
def test_no_line_is_wider_than_a_page(path):
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        assert len(line) <= 100, number


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


# ------------------------------------------------------------ tests

MADE_UP = """
def helper(x):
    assert x

@pytest.fixture
def fixture():
    helper(1)

def test_helper():
    helper(1)

def test_fixture(fixture):
    pass

def test_raises():
    with pytest.raises(KeyError):
        {}["key"]

def test_nothing():
    pass

def test_other_helper(other):
    other.helper()
"""


def test_every_test_checks_something():
    paths = (ROOT / "tests").glob("*.py")
    assert unchecked({path.stem: path.read_text() for path in paths}) == []


def test_a_made_up_test_that_checks_nothing_is_found():
    found = unchecked({"test_made_up": MADE_UP})
    assert found == [("test_made_up", "test_nothing"), ("test_made_up", "test_other_helper")]
