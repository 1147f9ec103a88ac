"""Lists tests that check nothing: `python tests/assertions.py`.

A check is an `assert`, a call of pytest's raises, warns or fail, of numpy.testing or torch.testing,
or of a function in this folder that checks. A fixture checks for the tests that name it.
"""
import ast
import sys
from pathlib import Path

CHECKS = ("pytest.raises", "pytest.warns", "pytest.fail", "np.testing.", "torch.testing.")


def checks(node):
    """Whether there is a check in a function itself."""
    parts = list(ast.walk(node))
    calls = [ast.unparse(part.func) for part in parts if isinstance(part, ast.Call)]
    asserts = any(isinstance(part, ast.Assert) for part in parts)
    return asserts or any(call.startswith(CHECKS) for call in calls)


def helpers(file, node, imports):
    """What a function calls by name, and its fixtures, as pairs: file, name."""
    calls = [part.func for part in ast.walk(node) if isinstance(part, ast.Call)]
    found = {(file, call.id) for call in calls if isinstance(call, ast.Name)}
    fixture = any("fixture" in ast.unparse(decorator) for decorator in node.decorator_list)
    if fixture or node.name.startswith("test_"):
        for argument in node.args.args:
            found |= {(file, argument.arg), ("conftest", argument.arg)}
    return {imports.get(pair, pair) for pair in found}


def unchecked(texts):
    """The tests in `{file: text}` that check nothing, as pairs: file, name."""
    functions = {}
    imports = {}
    for file, text in texts.items():
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef):
                functions[file, node.name] = node
            elif isinstance(node, ast.ImportFrom):
                imports |= {(file, name.name): (node.module, name.name) for name in node.names}
    rest = {pair for pair, node in functions.items() if not checks(node)}
    checked = functions.keys() - rest
    while checked:  # those that call what was found in the round before
        checked = {pair for pair in rest if helpers(pair[0], functions[pair], imports) & checked}
        rest -= checked
    return sorted(pair for pair in rest if pair[1].startswith("test_"))


def main():
    folder = Path(__file__).resolve().parent
    found = unchecked({path.stem: path.read_text() for path in folder.glob("*.py")})
    for file, name in found:
        print(f"tests/{file}.py: {name}")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
