"""docs/study.md: its block of commands in both scales, and its numbers, which stand in docs/study.json."""
import json
import os
import re
import subprocess
import sys
from statistics import mean, stdev

import analysis
import pytest
from conftest import ROOT

PAGE = (ROOT / "docs" / "study.md").read_text()
NUMBERS = json.loads((ROOT / "docs" / "study.json").read_text())
PYTHON = f"""#!/bin/sh
case "$1" in
analysis.py) echo "$@" >> analysis ;;
*.py) echo "$@" >> commands; for out; do :; done; mkdir -p "$out"; echo '{{"loss": 1}}' > "$out/log.jsonl" ;;
*) exec {sys.executable} "$@" ;;
esac
"""


@pytest.mark.parametrize("scale", ["two cores", "one GPU"])
def test_study_block_runs(scale, tmp_path, monkeypatch):
    """Each script takes each command; nothing is trained."""
    block = re.search(r"```bash\n(.*?)```", PAGE, re.S)[1]
    if scale == "one GPU":
        block = re.sub(r"^[A-Z]+=.*# (?=[A-Z]+=)", "", block, flags=re.M)
    (tmp_path / "docs").mkdir()
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    subprocess.run(["bash", "-eu", "-c", block], cwd=tmp_path, env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}, check=True)
    runs = []
    for line in (tmp_path / "commands").read_text().splitlines():
        script, *words = line.split()
        module = __import__(script.removesuffix(".py"))
        monkeypatch.setattr(module, "train", runs.append)
        module.main(words)
    assert len({args.out for args in runs}) == len(runs) > 40
    monkeypatch.chdir(tmp_path)
    for line in (tmp_path / "analysis").read_text().splitlines():
        with pytest.raises(analysis.vit.InputError, match="scratch-all-./last.pt"):    # the first model is looked for: the words are right
            analysis.main(line.split()[1:])
    if scale == "two cores":
        assert set(json.loads((tmp_path / "docs" / "study.json").read_text())) == set(NUMBERS)


def test_study_tables_say_what_was_measured():
    groups = {}
    for name, number in NUMBERS.items():
        groups.setdefault(name[:-2], []).append(number)
    measured = {f"{mean(numbers):.1f} ± {stdev(numbers):.1f}" for numbers in groups.values() if len(numbers) == 3}
    said = set(re.findall(r"\d+\.\d ± \d+\.\d", PAGE))
    assert len(said) > 10 and said <= measured
    readme = (ROOT / "README.md").read_text().split("| fine-tuned with |")[1].split("\n\n")[0]
    assert all(row in PAGE for row in readme.replace("**", "").splitlines()[2:])
