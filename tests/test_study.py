"""docs/study.sh in both scales, and the numbers of docs/study.md: those of docs/study.json."""
import argparse
import importlib
import json
import os
import re
import subprocess
import sys
from statistics import mean, stdev

import pytest
from conftest import ROOT

PAGE = (ROOT / "docs" / "study.md").read_text()
NUMBERS = json.loads((ROOT / "docs" / "study.json").read_text())
RUNS = {}  # the numbers of the three seeds of a run
for run, number in NUMBERS.items():
    RUNS.setdefault(run[:-2], []).append(number)

# Stands in for python and torchrun: notes the command, and leaves a log as a run would.
STAND_IN = """#!/bin/sh
if [ "$1" = - ]; then exec {python} "$@"; fi  # a program on standard input
echo "$@" >> commands
while [ $# -gt 1 ] && [ "$1" != --out ]; do shift; done
if [ "$1" = --out ]; then mkdir -p "$2"; echo '{{"loss": 1}}' > "$2/log.jsonl"; fi
"""


def commands_of(shell, folder, **environment):
    """Runs shell text with stand-ins for python and torchrun: its commands, as script and words."""
    for program in ("python", "torchrun"):
        (folder / program).write_text(STAND_IN.format(python=sys.executable))
        (folder / program).chmod(0o755)
    path = f"{folder}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, **environment}
    subprocess.run(["bash", "-eu", "-c", shell], cwd=folder, env=environment, check=True)
    commands = []
    for line in (folder / "commands").read_text().splitlines():
        words = line.removeprefix("--nproc_per_node=8 ").split()
        commands.append((words[0].removesuffix(".py"), words[1:]))
    return commands


class Parsed(Exception):
    """Carries the arguments out of a script that would go on with them."""


def parsed(script, words, monkeypatch):
    """The arguments that a script makes of words. It refuses words that it does not know."""
    def stop_after(parse):
        def stop(parser, argv=None):
            raise Parsed(parse(parser, argv))
        return stop
    module = importlib.import_module(script)
    with monkeypatch.context() as patch:
        for name in ("parse_args", "parse_intermixed_args"):
            parse = getattr(argparse.ArgumentParser, name)
            patch.setattr(argparse.ArgumentParser, name, stop_after(parse))
        patch.setattr(sys, "argv", [script, *words])
        with pytest.raises(Parsed) as caught:
            module.main()
    return caught.value.args[0]


@pytest.mark.parametrize("scale", ["cpu", "gpu"])
def test_study_runs_and_scripts_take_its_commands(scale, tmp_path, monkeypatch):
    """Nothing is trained. A file that a command reads is one that a command before it wrote."""
    commands = commands_of((ROOT / "docs" / "study.sh").read_text(), tmp_path, SCALE=scale)
    assert len(commands) > 60
    monkeypatch.chdir(tmp_path)
    written = set()
    for script, words in commands:
        args = parsed(script, words, monkeypatch)
        read = re.findall(rf"runs/study-{scale}/\S+/last.pt", " ".join(words))
        assert {os.path.dirname(path) for path in read} <= written
        assert str(args.out) not in written
        written.add(str(args.out))
    numbers = json.loads((tmp_path / f"runs/study-{scale}/numbers.json").read_text())
    if scale == "cpu":
        assert {run for run in numbers if "analysis" not in run} == NUMBERS.keys()


def test_study_runs_from_scratch_have_the_layer_decay_that_was_measured(tmp_path):
    commands = commands_of((ROOT / "docs" / "study.sh").read_text(), tmp_path, SCALE="cpu")
    tuned = [words for script, words in commands if script == "finetune"]
    scratch = [words for words in tuned if "--init" not in words]
    assert len(scratch) == 9
    for words in tuned:
        assert ("--layer-decay" in words) == (words in scratch)
    assert all(words[words.index("--layer-decay") + 1] == "1.0" for words in scratch)


def test_study_means_are_those_of_the_runs():
    measured = set()
    for numbers in RUNS.values():
        if len(numbers) == 3:
            measured.add(f"{mean(numbers):.1f} ± {stdev(numbers):.1f}")
    said = set(re.findall(r"\d+\.\d ± \d+\.\d", PAGE))
    assert len(said) > 10
    assert said <= measured


def test_study_differences_in_accuracy_are_those_of_the_runs():
    """As in the page: a difference of means, and twice its standard error."""
    pairs = [
        ("moco-all", "scratch-all"), ("mae-all", "moco-all"),  # Table 1
        ("mae-tenth", "moco-tenth"), ("mae-hundredth", "moco-hundredth"),  # Table 4
        ("distill-all", "mae-all"), ("distill-tenth", "mae-tenth"),  # Table 5
        ("distill-hundredth", "mae-hundredth"),
        ("mae-kept2-tenth", "mae-kept0-tenth"), ("mae-tenth", "mae-kept0-tenth"),  # Figure 2
        ("moco-kept2-tenth", "moco-kept0-tenth"), ("moco-tenth", "moco-kept0-tenth"),
        ("mae-tenth", "mae-kept2-tenth"), ("mae-all", "mae-kept2-all"),  # Figure 4
        ("moco-tenth", "moco-kept2-tenth")]
    measured = {difference(RUNS[first], RUNS[second], 1) for first, second in pairs}
    assert set(re.findall(r"\+\d+\.\d \(\d+\.\d\)", " ".join(PAGE.split()))) == measured


def difference(first, second, digits):
    """Of two runs of three seeds, as in the page: +3.4 (0.5)."""
    error = 2 * (stdev(first) ** 2 / 3 + stdev(second) ** 2 / 3) ** 0.5
    return f"{mean(first) - mean(second):+.{digits}f} ({error:.{digits}f})"


def test_study_differences_of_similarity_are_those_of_its_three_seeds():
    """Figures 1, 3, 6: the page has the numbers of each seed."""
    mae, moco, distilled = [0.56, 0.51, 0.50], [0.54, 0.53, 0.52], [0.60, 0.59, 0.58]
    fine = [-1.68 + 1.74, -1.70 + 1.71, -1.58 + 1.66]
    lost = [-2.75 + 1.79, -2.85 + 1.77, -2.71 + 1.78]
    for first, second in ((mae, moco), (distilled, mae), (fine, lost)):
        assert f"| {difference(first, second, 2)} |" in PAGE


@pytest.mark.parametrize("first, second, words", [
    ([0.60, 0.59, 0.58], [0.56, 0.51, 0.50], "({df} degrees of freedom): its difference is {t} "),
    (RUNS["mae-hundredth"], RUNS["moco-hundredth"], "{df} degrees of freedom) is {t} where")])
def test_study_with_unequal_variances_two_differences_are_less_certain(first, second, words):
    """Welch's degrees of freedom, and the difference in standard errors, of three seeds each."""
    squares = [stdev(numbers) ** 2 / 3 for numbers in (first, second)]
    t = (mean(first) - mean(second)) / sum(squares) ** 0.5
    df = sum(squares) ** 2 / sum(square ** 2 / 2 for square in squares)
    assert words.format(df=f"{df:.1f}", t=f"{t:.1f}") in " ".join(PAGE.split())


def test_study_table_in_readme_is_the_same():
    """A row of three means in README stands in the page, too."""
    lines = (ROOT / "README.md").read_text().replace("**", "").splitlines()
    rows = [line for line in lines if line.count("|") == 5 and line.count("±") == 3]
    assert rows
    for row in rows:
        assert row in PAGE
