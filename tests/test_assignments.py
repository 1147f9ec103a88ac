"""The graders of docs/assignments.md: each accepts what is right and rejects what is wrong.

`right_versions.txt` and `wrong_versions.txt` hold small changes of the scripts. The functions that
a version changes are compiled anew, and the tests that grade its exercise run, in this process.
"""
import ast
import importlib
import shlex
import shutil
import subprocess
import sys
from typing import NamedTuple

import assignments
import pytest
from assignments import EXERCISES, HEADER, find, main, row
from conftest import ROOT

TWO_RANKS = "(two ranks)"  # ends the title of what only a test with two processes can see


class Version(NamedTuple):
    number: int  # of the exercise
    functions: list
    title: str
    changes: list  # pairs of lists: old lines, new lines


def read_versions(name):
    """The versions in a file; the head of `wrong_versions.txt` says how they are written."""
    versions = []
    for line in (ROOT / "tests" / name).read_text().splitlines():
        if line[:1].isdigit():
            head, title = line.split(": ", maxsplit=1)
            number, *functions = head.split()
            versions.append(Version(int(number), functions, title, []))
        elif line.startswith("-"):
            changes = versions[-1].changes
            if not changes or changes[-1][1]:  # new lines end the change before
                changes.append(([], []))
            changes[-1][0].append(line[2:])
        elif line.startswith("+"):
            versions[-1].changes[-1][1].append(line[2:])
    return versions


def code(line):
    """A line of a script without comment, indentation and spaces."""
    return "".join(line.split("  #")[0].split())


def changed(text, version):
    """A script's text with the changes of a version, each in the one place where it fits."""
    lines = text.splitlines()
    for old, new in version.changes:
        wanted = [code(line) for line in old]
        places = []
        for name in version.functions:
            node = find("\n".join(lines), name)
            for i in range(node.lineno - 1, node.end_lineno):
                if [code(line) for line in lines[i:i + len(old)]] == wanted:
                    places.append(i)
        assert len(places) == 1, f"{version.title}: {len(places)} places for {old}"
        place = places[0]
        indent = lines[place][:-len(lines[place].lstrip())]
        lines[place:place + len(old)] = [indent + line for line in new]
    return "\n".join(lines) + "\n"


def put(number, functions, text, monkeypatch):
    """Puts functions of a changed script into the place of the right ones, in this process."""
    module = importlib.import_module(EXERCISES[number].file.removesuffix(".py"))
    for name in functions:
        *parents, leaf = name.split(".")
        owner = getattr(module, parents[0]) if parents else module
        tree = ast.Module([find(text, name)], type_ignores=[])
        namespace = {}
        exec(compile(tree, f"{name}, changed", "exec"), vars(module), namespace)
        monkeypatch.setattr(owner, leaf, namespace[leaf])


class Outcomes:
    """A plugin of pytest: the names of the tests that passed and of those that failed."""

    def __init__(self):
        self.passed = set()
        self.failed = set()

    def pytest_runtest_logreport(self, report):
        name = report.nodeid.rpartition("::")[2].partition("[")[0]
        if report.failed:
            self.failed.add(name)
        elif report.when == "call":
            self.passed.add(name)


def graded(number, *options):
    """Runs the tests that grade an exercise: which passed, which failed."""
    fast = ["-q", "--tb=no", "--noconftest", "--assert=plain", "-p", "no:cacheprovider",
            "-p", "no:unraisableexception"]
    words = [str(ROOT / word) if word.startswith("tests/") else word
             for word in shlex.split(EXERCISES[number].graders)]
    outcomes = Outcomes()
    pytest.main([*fast, *options, *words], plugins=[outcomes])
    return outcomes.passed, outcomes.failed


def each(versions):
    """The versions as parameters of a slow test, with readable names."""
    return [pytest.param(version, marks=pytest.mark.slow, id=f"{version.number}-{version.title}")
            for version in versions]


def script(version):
    return (ROOT / EXERCISES[version.number].file).read_text()


RIGHT = read_versions("right_versions.txt")
WRONG = read_versions("wrong_versions.txt")


# ------------------------------------------------------------ right and wrong versions

@pytest.mark.parametrize("number", EXERCISES)
def test_each_version_fits_the_script(number):
    versions = [version for version in RIGHT + WRONG if version.number == number]
    text = (ROOT / EXERCISES[number].file).read_text()
    for version in versions:
        assert set(version.functions) <= set(EXERCISES[number].functions.split())
        assert changed(text, version) != text


def test_a_version_fits_whatever_the_comments_and_spaces():
    text = script(WRONG[0])
    formatted = text.replace("  # ", "      # As a formatter writes it: ").replace(", ", ",  ")
    differ = [line for line in changed(formatted, WRONG[0]).splitlines()
              if line not in formatted.splitlines()]
    assert differ == [" " * 8 + line for line in WRONG[0].changes[0][1]]


def test_each_exercise_has_two_right_versions_and_no_version_stands_twice():
    numbers = [version.number for version in RIGHT]
    assert all(numbers.count(number) >= 2 for number in EXERCISES)
    for versions in (RIGHT, WRONG):
        changes = [(version.number, version.changes) for version in versions]
        assert all(changes.count(change) == 1 for change in changes)


@pytest.mark.slow
@pytest.mark.parametrize("number", EXERCISES)
def test_graders_accept_the_projects_own_code(number):
    passed, failed = graded(number)
    assert len(passed) >= 2 and not failed


@pytest.mark.slow
@pytest.mark.parametrize("number", EXERCISES)
def test_graders_pass_nothing_that_is_not_written(number, monkeypatch):
    functions = EXERCISES[number].functions.split()
    text = (ROOT / EXERCISES[number].file).read_text()
    for name in functions:
        text = assignments.erase(text, name, "not written")
    put(number, functions, text, monkeypatch)
    passed, failed = graded(number)
    assert failed and not passed


@pytest.mark.parametrize("version", each(RIGHT))
def test_graders_accept_what_is_right(version, monkeypatch):
    put(version.number, version.functions, changed(script(version), version), monkeypatch)
    passed, failed = graded(version.number)
    assert passed and not failed


@pytest.mark.parametrize("version", each(v for v in WRONG if TWO_RANKS not in v.title))
def test_graders_reject_what_is_wrong(version, monkeypatch):
    put(version.number, version.functions, changed(script(version), version), monkeypatch)
    _, failed = graded(version.number, "-x")
    assert failed


@pytest.mark.parametrize("version", each(v for v in WRONG if TWO_RANKS in v.title))
def test_graders_reject_what_only_two_ranks_can_see(version, tmp_path):
    """Ranks are processes of their own: they need the change in a file."""
    copy = handed_in(version.number, tmp_path, changed(script(version), version))
    status, said = call("grade", version.number, folder=copy)
    assert status == 1 and said.count("failed: ") == 1
    assert "two ranks" in said


# ------------------------------------------------------------ the command line

def call(*arguments, folder=ROOT):
    """Runs tests/assignments.py of a copy: exit code and output."""
    command = [sys.executable, folder / "tests" / "assignments.py", *map(str, arguments)]
    process = subprocess.run(command, capture_output=True, text=True)
    return process.returncode, process.stdout + process.stderr


def handed_in(number, folder, text):
    """A fresh copy with the file that a student hands in."""
    main(["start", str(number), str(folder)])
    (folder / EXERCISES[number].file).write_text(text)
    return folder


def test_table_of_the_document_is_that_of_the_exercises(capsys):
    main(["list"])
    table = capsys.readouterr().out
    assert table == "\n".join([HEADER, *map(row, EXERCISES)]) + "\n"
    assert table in (ROOT / "docs" / "assignments.md").read_text()


@pytest.mark.parametrize("number", EXERCISES)
def test_start_erases_bodies_and_keeps_signature_and_docstring(number, tmp_path):
    main(["start", str(number), str(tmp_path)])
    exercise = EXERCISES[number]
    for path in ROOT.glob("*.py"):
        before = path.read_text()
        after = (tmp_path / path.name).read_text()
        for name in exercise.functions.split() + exercise.also.split():
            old = find(before, name)
            new = find(after, name)
            if old:
                assert ast.unparse(new.args) == ast.unparse(old.args)
                assert ast.get_docstring(new) == ast.get_docstring(old)
                assert ast.unparse(new.body[-1]).startswith("raise NotImplementedError('exercise")
            before = assignments.erase(before, name, f"exercise {number}: {exercise.task}")
        assert before == after  # nothing else differs


@pytest.mark.parametrize("number", EXERCISES)
def test_start_hands_out_no_line_of_the_solution(number, tmp_path):
    """No long line, that is; lines of the exercises that come before are known."""
    main(["start", str(number), str(tmp_path)])
    before = [int(needed) for needed in EXERCISES[number].needs.split(", ") if needed != "-"]
    known = set().union(*map(solution, before))
    for path in tmp_path.glob("*.py"):
        lines = {code(line) for line in path.read_text().splitlines()}
        assert not {line for line in lines & solution(number) - known if len(line) >= 30}


def solution(number):
    """Lines of code of an exercise's functions, without those that call vit.py in the one way."""
    text = (ROOT / EXERCISES[number].file).read_text()
    lines = set()
    for name in EXERCISES[number].functions.split():
        node = find(text, name)
        body = text.splitlines()[node.body[0].end_lineno:node.end_lineno]  # without docstring
        lines |= {code(line) for line in body}
    return {line for line in lines if "promote_types" not in line and ".states(" not in line}


def test_start_copies_what_a_student_needs(tmp_path, capsys):
    main(["start", "5", str(tmp_path)])
    assert f"write in {tmp_path / 'mae.py'}: random_masking" in capsys.readouterr().out
    names = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert {"vit.py", "README.md", "docs/assignments.md", "tests/goldens.json"} <= names
    hidden = {f"tests/{name}" for name in assignments.SOLUTIONS}
    assert not names & {".git", "runs", "data", *hidden}


@pytest.mark.parametrize("arguments, reason", [
    (("start", "5", ROOT / "copy"), "lies in the project itself"),
    (("start", "5", ROOT), "lies in the project itself"),
    (("start", "5", "full"), "is not an empty folder"),
    (("start", "5", "full/file"), "is not an empty folder"),
    (("start", len(EXERCISES) + 1, "copy"), f"from 1 to {len(EXERCISES)}"),
    (("start", "5"), "from 1 to "),
    (("grade", "x"), "from 1 to "),
    ((), "list, start")])
def test_what_cannot_be_started_or_graded_is_refused(
        arguments, reason, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    lines = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and len(lines) == 1
    assert lines[0].startswith("error: ") and reason in lines[0]
    assert [path.name for path in tmp_path.iterdir()] == ["full"] and not (ROOT / "copy").exists()


# ------------------------------------------------------------ grade

def graded_copy(number, folder, text, monkeypatch, capsys):
    """What `grade` says in a fresh copy with a student's file: exit code, lines."""
    handed_in(number, folder, text)
    monkeypatch.setattr(assignments, "ROOT", folder)
    capsys.readouterr()
    status = assignments.grade(number)
    return status, capsys.readouterr().out.splitlines()


@pytest.mark.slow
def test_grade_says_in_words_what_failed_and_accepts_the_right_body(tmp_path):
    main(["start", "5", str(tmp_path)])
    status, said = call("grade", 5, folder=tmp_path)
    assert status == 1 and "exercise 5: 0 of 3 tests passed" in said
    assert ("failed: random masking keeps the smallest noise and says where it was\n"
            "        NotImplementedError: exercise 5: keep the patches") in said
    shutil.copy(ROOT / "mae.py", tmp_path)
    assert call("grade", 5, folder=tmp_path) == (0, "exercise 5: all 3 tests passed\n")


@pytest.mark.slow
@pytest.mark.parametrize("version", [v for v in RIGHT if v.number == 9], ids=lambda v: v.title)
def test_exercise_9_is_graded_by_mae_alone(version, tmp_path, monkeypatch, capsys):
    """In a fresh copy, all other scripts have an erased `learning_rate`."""
    text = changed(script(version), version)
    status, lines = graded_copy(9, tmp_path, text, monkeypatch, capsys)
    assert status == 0 and lines == ["exercise 9: all 2 tests passed"]
    assert "NotImplementedError" in (tmp_path / "dino.py").read_text()


FAILURES = """
import pytest

def test_says_what_is_raised_without_words():
    raise ValueError("")

def test_says_what_is_not_so():
    assert 1 + 1 == 3

def test_says_that_nothing_was_tested():
    pytest.skip()

def test_says_that_python_was_left():
    raise SystemExit

@pytest.fixture
def broken():
    raise KeyError

def test_says_what_was_wrong_before(broken):
    pass

def test_is_right():
    pass
"""


@pytest.mark.slow
def test_grade_gives_a_reason_for_every_failure(tmp_path, monkeypatch, capsys):
    main(["start", "5", str(tmp_path)])
    (tmp_path / "tests" / "test_mae.py").write_text(FAILURES)
    monkeypatch.setitem(EXERCISES, 5, EXERCISES[5]._replace(graders="tests/test_mae.py"))
    monkeypatch.setattr(assignments, "ROOT", tmp_path)
    capsys.readouterr()
    assert assignments.grade(5) == 1
    *lines, summary = capsys.readouterr().out.splitlines()
    assert "exercise 5: 1 of 6 tests passed" in summary
    said = dict(zip(lines[::2], [line.strip() for line in lines[1::2]]))
    assert len(said) == 5 and all(said.values())
    assert "ValueError" in said["failed: says what is raised without words"]
    assert said["failed: says what is not so"] == "assert (1 + 1) == 3"
    assert "SystemExit" in said["failed: says that python was left"]
    assert "KeyError" in said["failed: says what was wrong before"]


@pytest.mark.slow
@pytest.mark.parametrize("text, reason", [
    ("\ndef patchify(images:\n", "mae.py\", line 2: SyntaxError: "),
    ("import nothing_like_it\n", "No module named 'nothing_like_it'"),
    ("raise SystemExit\n", "SystemExit"),
    ("import os\nos._exit(0)\n", "failed: Python stopped before the tests ended")])
def test_grade_says_why_a_script_cannot_be_imported(text, reason, tmp_path, monkeypatch, capsys):
    status, lines = graded_copy(5, tmp_path, text, monkeypatch, capsys)
    assert status == 1 and reason in "\n".join(lines)


ENDLESS = """
def random_masking(*x):
    while True:
        pass
"""


@pytest.mark.slow
def test_grade_stops_what_never_ends(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(assignments, "LIMIT", 10)
    status, lines = graded_copy(5, tmp_path, ENDLESS, monkeypatch, capsys)
    assert status == 1
    assert lines == ["failed: stopped after 10 seconds. Is there a loop that never ends?"]
