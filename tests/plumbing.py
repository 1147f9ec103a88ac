"""Copies mae.py's plumbing into every other script: `python tests/plumbing.py`.

The plumbing is repeated on purpose. Below its line `# ====`, what a script has under the same name
as mae.py (a function, a class, a constant) is the same text; what is special has another name.
"""
import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("mae", "distill", "simmim", "mocov3", "dino", "finetune", "detect", "analysis")


def plumbing(text):
    """`{name: source}` of what stands below the line `# ====`; "__main__" is the script's end."""
    lines = text.splitlines()
    first = [i for i, line in enumerate(lines) if line.startswith("# ====")][0]
    found = {}
    for node in ast.parse(text).body:
        if node.lineno <= first:
            continue
        if isinstance(node, ast.Assign):
            name = node.targets[0].id
        elif isinstance(node, ast.If):
            name = "__main__"
        else:
            name = node.name
        start = min([node.lineno, *(line.lineno for line in getattr(node, "decorator_list", []))])
        found[name] = "\n".join(lines[start - 1:node.end_lineno])
    return found


def main():
    original = plumbing((ROOT / "mae.py").read_text())
    for script in SCRIPTS[1:]:
        path = ROOT / f"{script}.py"
        text = path.read_text()
        for name, source in plumbing(text).items():
            if source != original.get(name, source):
                text = text.replace(source, original[name])
                print(f"{path.name}: {name} renewed")
        path.write_text(text)


if __name__ == "__main__":
    main()
