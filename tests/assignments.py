"""Sixteen exercises: bodies of functions are erased, students write them again, tests grade them.

    python tests/assignments.py list             # the table of docs/assignments.md
    python tests/assignments.py start 5 DIR      # a copy of the project without the code of exercise 5
    python tests/assignments.py grade 5          # in such a copy: what is wrong, in words
"""
import ast
import functools
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
parse = functools.lru_cache(ast.parse)    # the trees are only read


class Exercise(NamedTuple):
    functions: str    # "script: function ...", erased wherever a script has functions of these names
    task: str
    source: str       # in the literature
    tests: str        # files in tests/
    k: str            # pytest's -k: which of their tests grade it
    hours: int
    needs: str        # exercises that come before


EXERCISES = {
    1: Exercise("vit: Attention.heads Attention.scores Attention.forward",
                "multi-head attention; `forward` calls `F.scaled_dot_product_attention`",
                "Dosovitskiy et al., 2021, Eq. 5-8", "test_vit", "attention or published_vit", 2, "-"),
    2: Exercise("vit: sincos_position", "the position table in two dimensions",
                "Vaswani et al., 2017, Sec. 3.5; MAE, App. A", "test_vit", "position_table", 1, "-"),
    3: Exercise("vit: Block.stochastic_depth", "drop whole branches, image by image",
                "Huang et al., 2016, Sec. 3", "test_vit", "stochastic_depth or published_vit", 1, "1"),
    4: Exercise("mae: patchify unpatchify", "images to patches and back",
                "Dosovitskiy et al., 2021, Sec. 3.1", "test_mae", "patchify or published_mae_gives", 1, "-"),
    5: Exercise("mae: random_masking", "keep the patches with the smallest noise",
                "MAE, Sec. 3, Simple implementation", "test_mae", "random_masking", 2, "4"),
    6: Exercise("mae: MaskedAutoencoder.forward MaskedAutoencoder.decode MaskedAutoencoder.target",
                "encode the visible, predict the removed, normalized target",
                "MAE, Sec. 3", "test_mae", "sec3 or norm_pix or published_mae", 3, "4, 5"),
    7: Exercise("mocov3: similarities contrastive_loss", "InfoNCE with the keys of all ranks",
                "MoCo-v3, Eq. 1, Alg. 1", "test_mocov3", "eq1_moco", 2, "-"),
    8: Exercise("mocov3: MoCoV3.forward MoCoV3.update_momentum_encoder",
                "two encoders and a predictor; `monitors`: `contrastive_accuracy` of q1 among k2, "
                "`projection_spread` and `token_spread` of the first view",
                "MoCo-v3, Alg. 1", "test_mocov3", "alg1 or monitors", 2, "7"),
    9: Exercise("mae: learning_rate",
                "warm-up and cosine, step by step; `python tests/plumbing.py` copies yours to every script",
                "Goyal et al., 2017, Sec. 2.2; Loshchilov and Hutter, 2017, Eq. 5",
                "test_data test_mocov3", "learning_rate or momentum_schedule", 1, "-"),
    10: Exercise("distill: attention_distillation_loss Teacher.forward", "distill attention scores",
                 "A Closer Look, Sec. 5, Eq. 3", "test_distill", "eq3", 2, "1, 6"),
    11: Exercise("finetune: layer_decay_groups", "lower layers learn more slowly",
                 "BEiT, App.; MAE, App. A.1", "test_finetune", "layer_decay", 1, "9"),
    12: Exercise("finetune: nearest_neighbors", "weighted k-nearest-neighbor classification",
                 "Wu et al., 2018, Sec. 3.4", "test_finetune", "nearest_neighbors", 1, "-"),
    13: Exercise("analysis: centered_gram CKA.update CKA.compute", "unbiased CKA from mini-batches",
                 "Song et al., 2012; Nguyen et al., 2021; A Closer Look, Fig. 1",
                 "test_analysis", "fig1_cka", 3, "-"),
    14: Exercise("analysis: attention_distance attention_entropy fourier_log_amplitude",
                 "how far and how broadly heads look, how much detail layers keep",
                 "A Closer Look, Eq. 1, Eq. 2, Fig. 3; Park and Kim, 2022",
                 "test_analysis", "eq1_distance or eq2 or fig3 or fig5", 3, "1"),
    15: Exercise("simmim: random_mask SimMIM.forward", "mask squares, encode all patches, predict removed pixels",
                 "SimMIM, Sec. 3", "test_simmim", "sec3 or published_simmim", 2, "5, 6"),
    16: Exercise("dino: dino_loss DINO.update_center DINO.forward",
                 "the loss over pairs of crops, the center of all outputs of the teacher, both at work; `monitors`: "
                 "`entropy` of the targets, `kl` from target to student, `token_spread` of the teacher",
                 "DINO, Eq. 1-4, Alg. 1", "test_dino", "dino_loss or dino_center or published_dino_gives or monitors or dino_two_ranks", 2,
                 "7, 8"),
}
HEADER = ("| # | erase | write again | source | `python -m pytest` | hours | needs |\n"
          "| --- | --- | --- | --- | --- | --- | --- |")


def selection(number):
    """What follows `python -m pytest` to grade an exercise."""
    files = " ".join(f"tests/{name}.py" for name in EXERCISES[number].tests.split())
    return f'{files} -k "{EXERCISES[number].k}"'


def row(number):
    """A line of the table in docs/assignments.md."""
    exercise = EXERCISES[number]
    script, names = exercise.functions.split(": ")
    functions = ", ".join(f"`{name}`" for name in names.split())
    return (f"| {number} | {script}.py: {functions} | {exercise.task} | {exercise.source} "
            f"| `{selection(number)}` | {exercise.hours} | {exercise.needs} |")


def find(text, name):
    """The syntax tree of `function` or `Class.method` in a script's text, or None."""
    nodes = parse(text).body
    for part in name.split("."):
        node = next((node for node in nodes if getattr(node, "name", None) == part), None)
        nodes = getattr(node, "body", [])
    return node


def erase(text, name, message):
    """A script's text without the body of a function; its signature and docstring stay."""
    node, lines = find(text, name), text.splitlines(keepends=True)
    if node is None:
        return text
    first = node.body[0]
    start = first.end_lineno if ast.get_docstring(node) else first.lineno - 1
    indent = " " * first.col_offset
    return "".join([*lines[:start], f'{indent}raise NotImplementedError("{message}")\n', *lines[node.end_lineno:]])


def refuse(reason):
    print(f"error: {reason}", file=sys.stderr)
    sys.exit(2)


def start(number, folder):
    """Copies the scripts, tests and documents to a folder and erases the bodies of an exercise there."""
    folder = Path(folder).resolve()
    if folder == ROOT or ROOT in folder.parents:
        refuse(f"{folder} lies in the project itself")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        refuse(f"{folder} is not an empty folder")
    files = [path for path in ROOT.iterdir() if path.is_file() and path.name[0] != "."]
    for part in ("tests", "docs", "assets"):
        files += [path for path in (ROOT / part).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    for path in files:
        if path.name != "test_assignments.py":    # has pieces of the solutions
            copy = folder / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
    exercise = EXERCISES[number]
    for path in folder.glob("*.py"):
        text = original = path.read_text(encoding="utf-8")
        for name in exercise.functions.split()[1:]:
            text = erase(text, name, f"exercise {number}: {exercise.task}")
        if text != original:
            path.write_text(text, encoding="utf-8")
            print(f"erased in {path.name}")
    print(f"exercise {number} is in {folder}: {exercise.task}\nsource: {exercise.source}\n"
          f"cd {folder} && python tests/assignments.py grade {number}")


def grade(number):
    """Runs the tests of an exercise, says what failed, returns the exit code."""
    command = [sys.executable, "-m", "pytest", "-q", "-rfE", *shlex.split(selection(number))]
    process = subprocess.run(command, cwd=ROOT, env={**os.environ, "COLUMNS": "300"}, capture_output=True, text=True)
    summary = r"^(?:FAILED|ERROR) ([^\s:]+)(?:::(\w+))?(?:\[.*?\])?(?: - (.*))?$"    # file, test, reason
    said = set()
    for file, test, reason in re.findall(summary, process.stdout, re.MULTILINE):
        sentence = test.removeprefix("test_").replace("_", " ") or f"{file} cannot be imported"
        if sentence not in said:    # once, whatever the parameters
            print(f"failed: {sentence}\n        {reason}")
        said.add(sentence)
    last = process.stdout.rstrip().rpartition("\n")[2]
    counts = {word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|error)", last)}
    if process.returncode == 0:
        print(f"exercise {number}: all {counts['passed']} tests passed")
    elif said:
        print(f"exercise {number}: {counts.get('passed', 0)} of {sum(counts.values())} tests passed; "
              f"in full: python -m pytest {selection(number)}")
    else:
        print(process.stdout + process.stderr)    # pytest itself failed
    return 1 if process.returncode else 0


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
