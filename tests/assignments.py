"""Sixteen exercises: bodies of functions are erased, students write them again, tests grade them.

    python tests/assignments.py list             # the table of docs/assignments.md
    python tests/assignments.py start 5 DIR      # a copy of the project without exercise 5's code
    python tests/assignments.py grade 5          # in such a copy: what is wrong, in words
"""
import ast
import functools
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
SOLUTIONS = ("test_assignments.py", "right_versions.txt", "wrong_versions.txt")  # never handed out
LIMIT = 60  # seconds to grade a hand-in
parse = functools.lru_cache(ast.parse)  # nobody changes the trees


class Exercise(NamedTuple):
    file: str  # which students hand in
    functions: str  # erased wherever a script has functions of these names
    task: str
    source: str  # in the literature
    graders: str  # what follows `python -m pytest`: files of tests, and which of their tests
    hours: int
    needs: str = "-"  # exercises that come before
    also: str = ""  # functions that are erased because they repeat lines of the solution


EXERCISES = {
    1: Exercise(
        file="vit.py", functions="Attention.heads Attention.scores Attention.forward",
        task="multi-head attention", source="ViT, Eq. 5-8",
        graders='tests/test_vit.py -k "attention or published_vit or float32"', hours=2),
    2: Exercise(
        file="vit.py", functions="sincos_position",
        task="positions in two dimensions", source="Transformer, Sec. 3.5",
        graders="tests/test_vit.py -k position_table", hours=1),
    3: Exercise(
        file="vit.py", functions="Block.stochastic_depth",
        task="drop whole branches of images", source="Stochastic depth, Sec. 3",
        graders='tests/test_vit.py -k "stochastic_depth or published_vit"', hours=1, needs="1"),
    4: Exercise(
        file="mae.py", functions="patchify unpatchify",
        task="images to patches and back", source="ViT, Sec. 3.1",
        graders='tests/test_mae.py -k "patchify or published_mae_gives"', hours=1),
    5: Exercise(
        file="mae.py", functions="random_masking",
        task="keep the patches with the smallest noise", source="MAE, Sec. 3",
        graders="tests/test_mae.py -k random_masking", hours=2, needs="4"),
    6: Exercise(
        file="mae.py", functions="MaskedAutoencoder.forward MaskedAutoencoder.decode "
        "MaskedAutoencoder.target", also="SimMIM.forward",
        task="encode the visible, predict the removed", source="MAE, Sec. 3",
        graders='tests/test_mae.py -k "sec3 or norm_pix or published_mae_gives"',
        hours=3, needs="4, 5"),
    7: Exercise(
        file="mocov3.py", functions="similarities contrastive_loss",
        task="InfoNCE with the keys of all ranks", source="MoCo-v3, Eq. 1, Alg. 1",
        graders="tests/test_mocov3.py -k eq1_moco", hours=2),
    8: Exercise(
        file="mocov3.py", functions="MoCoV3.forward MoCoV3.update_momentum_encoder",
        task="two encoders and a predictor", source="MoCo-v3, Alg. 1",
        graders='tests/test_mocov3.py -k "alg1 or monitors"', hours=2, needs="7"),
    9: Exercise(
        file="mae.py", functions="learning_rate",
        task="warm-up, then a cosine", source="SGDR, Eq. 5",
        graders="tests/test_data.py -k learning_rate", hours=1),
    10: Exercise(
        file="distill.py", functions="attention_distillation_loss Teacher.forward",
        task="distill attention scores", source="A Closer Look, Eq. 3",
        graders="tests/test_distill.py -k eq3", hours=2, needs="1, 6"),
    11: Exercise(
        file="finetune.py", functions="layer_decay_groups",
        task="lower layers learn more slowly", source="MAE, App. A.1",
        graders="tests/test_finetune.py -k layer_decay", hours=1, needs="9"),
    12: Exercise(
        file="finetune.py", functions="nearest_neighbors",
        task="weighted k-nearest-neighbor classifier", source="Wu et al., Sec. 3.4",
        graders="tests/test_finetune.py -k nearest_neighbors", hours=1),
    13: Exercise(
        file="analysis.py", functions="centered_gram CKA.update CKA.compute",
        task="unbiased CKA from mini-batches", source="Nguyen et al., Sec. 2",
        graders="tests/test_analysis.py -k fig1_cka", hours=3),
    14: Exercise(
        file="analysis.py",
        functions="attention_distance attention_entropy fourier_log_amplitude",
        task="where heads look, which detail is kept", source="A Closer Look, Eq. 1-2",
        graders='tests/test_analysis.py -k "eq1_distance or eq2 or fig3 or fig5_measure"',
        hours=3, needs="1"),
    15: Exercise(
        file="simmim.py", functions="random_mask SimMIM.forward",
        task="mask squares, predict their pixels", source="SimMIM, Sec. 3",
        graders='tests/test_simmim.py -k "sec3 or published_simmim"', hours=2, needs="5, 6"),
    16: Exercise(
        file="dino.py", functions="dino_loss DINO.update_center DINO.forward",
        task="compare crops, center the teacher", source="DINO, Eq. 1-4, Alg. 1",
        graders='tests/test_dino.py -k "dino_loss or dino_center or published_dino_gives '
        'or monitors or dino_two_ranks"', hours=2, needs="7, 8"),
}
HEADER = """\
| # | file | write again | source | hours | needs |
| --- | --- | --- | --- | --- | --- |"""


def row(number):
    """A line of the table in docs/assignments.md."""
    exercise = EXERCISES[number]
    return (f"| {number} | {exercise.file} | {exercise.task} | {exercise.source} "
            f"| {exercise.hours} | {exercise.needs} |")


# ------------------------------------------------------------ start

def find(text, name):
    """The syntax tree of `function` or `Class.method` in a script's text, or None."""
    tree = parse(text)
    for part in name.split("."):
        named = [node for node in tree.body
                 if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == part]
        if not named:
            return None
        tree = named[0]
    return tree


def erase(text, name, message):
    """A script's text without the body of a function; its signature and docstring stay."""
    node = find(text, name)
    if node is None:
        return text
    lines = text.splitlines(keepends=True)
    first = node.body[0]
    start = first.lineno - 1
    if ast.get_docstring(node):
        start = first.end_lineno
    indent = " " * first.col_offset
    lines[start:node.end_lineno] = [f'{indent}raise NotImplementedError("{message}")\n']
    return "".join(lines)


def start(number, folder):
    """Copies scripts, tests and documents to a folder and erases an exercise's functions there."""
    folder = Path(folder).resolve()
    if folder == ROOT or ROOT in folder.parents:
        refuse(f"{folder} lies in the project itself")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        refuse(f"{folder} is not an empty folder")
    files = [path for path in ROOT.iterdir() if path.is_file() and path.name[0] != "."]
    for part in ("tests", "docs"):
        files += [path for path in (ROOT / part).iterdir() if path.is_file()]
    for path in files:
        if path.name not in SOLUTIONS:
            copy = folder / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
    exercise = EXERCISES[number]
    for path in folder.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        for name in [*exercise.functions.split(), *exercise.also.split()]:
            text = erase(text, name, f"exercise {number}: {exercise.task}")
        path.write_text(text, encoding="utf-8")
    functions = exercise.functions.replace(" ", ", ")
    print(f"exercise {number}: {exercise.task} ({exercise.source})")
    print(f"write in {folder / exercise.file}: {functions}")
    print(f"then: cd {folder} && python tests/assignments.py grade {number}")


def refuse(reason):
    print(f"error: {reason}", file=sys.stderr)
    sys.exit(2)


# ------------------------------------------------------------ grade

def grade(number):
    """Runs the tests of an exercise, says what failed, returns the exit code."""
    graders = EXERCISES[number].graders
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "--all", f"--junitxml={report}"]
        with open(Path(folder) / "output.txt", "w+") as output:
            process = subprocess.Popen(
                command + shlex.split(graders), cwd=ROOT, start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=output, stderr=output)
            try:
                process.wait(LIMIT)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # and the ranks that a test started
                process.wait()
                print(f"failed: stopped after {LIMIT} seconds. Is there a loop that never ends?")
                return 1
            output.seek(0)
            said = output.read()
        if not report.exists():
            print(f"failed: Python stopped before the tests ended\n{said.strip()[-1000:]}")
            return 1
        results = read_report(report)
    failed = {test: reason for test, reason in results.items() if reason}
    for test, reason in failed.items():
        print(f"failed: {test}\n        {reason}")
    if failed or not results:
        print(f"exercise {number}: {len(results) - len(failed)} of {len(results)} tests passed; "
              f"in full: python -m pytest --all {graders}")
        return 1
    print(f"exercise {number}: all {len(results)} tests passed")
    return 0


def read_report(path):
    """`{what a test says: why it failed, or ""}`; once, whatever its parameters."""
    results = {}
    for case in ElementTree.parse(path).iter("testcase"):
        name = case.get("name").partition("[")[0]
        test = "the tests cannot begin"  # a file with an error
        if name.startswith("test_"):
            test = name.removeprefix("test_").replace("_", " ")
        results.setdefault(test, "")
        for trouble in case:  # a failure, an error, or a test that was skipped
            results[test] = results[test] or why(trouble)
    return results


def why(trouble):
    """What happened, in one line that is never empty."""
    if trouble.tag != "error":
        return trouble.get("message").partition("\n")[0] or trouble.tag
    lines = trouble.text.strip().splitlines()
    marked = [line[1:].strip() for line in lines if line.startswith("E ")]
    if len(marked) > 1:
        return f"{marked[0]}: {marked[-1]}"  # the place, the error
    return (marked or lines)[-1]


def main(argv):
    verb, number, folder = (*argv, "", "", "")[:3]
    known = number.isdecimal() and int(number) in EXERCISES
    if argv == ["list"]:
        print("\n".join([HEADER, *map(row, EXERCISES)]))
    elif verb == "start" and known and len(argv) == 3:
        start(int(number), folder)
    elif verb == "grade" and known and len(argv) == 2:
        sys.exit(grade(int(number)))
    else:
        refuse(f"list, start N DIR or grade N, with N from 1 to {len(EXERCISES)}")


if __name__ == "__main__":
    main(sys.argv[1:])
