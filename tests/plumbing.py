"""Copies mae.py's plumbing into every other script: `python tests/plumbing.py`.

The plumbing is repeated on purpose: three blocks of text, each from one marker line ("# ====...") to the next.
"""
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("mae", "mocov3", "distill", "finetune", "detect", "analysis", "simmim", "dino")


def blocks(text):
    """`{marker line: block}` of a script: each block with its marker line, up to the next one."""
    marks = [match.start() for match in re.finditer(r"^# ==", text, re.MULTILINE)]
    parts = [text[start:end] for start, end in zip(marks, marks[1:])]
    return {part.splitlines()[0]: part for part in parts}


def main():
    original = blocks((ROOT / "mae.py").read_text())
    for path in (ROOT / f"{name}.py" for name in SCRIPTS[1:]):
        text = path.read_text() if path.exists() else ""
        changed = text
        for marker, block in blocks(text).items():
            changed = changed.replace(block, original.get(marker, block))
        if changed != text:
            path.write_text(changed)
            print(f"{path.name}: plumbing renewed")


if __name__ == "__main__":
    main()
