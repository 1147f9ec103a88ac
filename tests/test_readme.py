"""README.md: its commands run on tiny images, links lead to what they name, length and width."""
import ast
import re
import shlex

import pytest
import torch
from conftest import ROOT, SCRIPTS, call, draw_nothing

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.S)
LINES = [line.split(" #")[0].strip() for block in BLOCKS for line in block.splitlines()]
COMMANDS = []
for line in LINES:
    if not line.startswith("pip"):
        COMMANDS += [command.strip() for command in line.split("&&")]
TINY = ["--workers", "0", "--max-steps", "1", "--save-minutes", "60"]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, image_folder):
    """A folder in which README's paths exist: small checkpoints, and DIR."""
    import mae
    import vit
    folder = tmp_path_factory.mktemp("readme")
    torch.manual_seed(0)
    encoder = vit.vit_toy(img_size=32, patch_size=4, global_pool="token")
    for name in ("mae_tiny.pth", "moco_tiny.pth", "mae_pretrain_vit_base.pth"):
        torch.save(encoder.state_dict(), folder / name)
    model = mae.MaskedAutoencoder(encoder)
    (folder / "runs" / "mae").mkdir(parents=True)
    checkpoint = {"model": model.state_dict(), "config": {"data": "toy"}, "step": 1}
    torch.save(checkpoint, folder / "runs" / "mae" / "last.pt")
    (folder / "DIR").symlink_to(image_folder)
    return folder


def tiny(script, words):
    """A command's arguments, on small images and for one step."""
    if script == "analysis":
        return [*words, "--images", "8", "--batch-size", "4"]
    words = [word for word in words if word not in ("--download", "--compile")]
    words = ["DIR" if word == "cifar100" else word for word in words]
    if "--accum" in words:
        words[words.index("--accum") + 1] = "2"
    if script == "detect":
        return [*words, *TINY, "--scenes", "8", "--val-scenes", "2"]
    words += [*TINY, "--batch-size", "8", "--epochs", "8", "--warmup-epochs", "0"]
    if script != "finetune" or "--init" not in words:
        words += ["--arch", "toy", "--img-size", "32", "--patch-size", "4"]
    if script == "dino":
        words += ["--local-size", "16", "--out-dim", "64"]
    return words


@pytest.mark.slow
@pytest.mark.parametrize("command", [
    pytest.param(line, id=line[:60]) for line in dict.fromkeys(COMMANDS)])
def test_readme_command_runs(command, workplace, monkeypatch, tmp_path):
    words = shlex.split(command)
    name = [word for word in words if word.endswith(".py")][0]
    script = name.removesuffix(".py")
    module = __import__(script)
    monkeypatch.chdir(workplace)
    if script != "analysis":
        draw_nothing(module, monkeypatch)
    arguments = tiny(script, words[words.index(name) + 1:])
    out = workplace / "runs" / "mae"
    if "--resume" not in words:
        out = tmp_path / "out"
        arguments += ["--out", str(out)]
    call(module, *arguments)
    assert list(out.glob("*.json*"))  # the log, the result or an analysis


def test_readme_begins_with_the_two_commands():
    assert LINES[0] == "pip install -r requirements.txt && python mae.py"
    assert LINES[1] == "pip install -r requirements.txt && python -m pytest"


def test_readme_python_block_runs(workplace, monkeypatch, capsys):
    from PIL import Image
    code = re.search(r"```python\n(.*?)```", README, re.S)[1]
    monkeypatch.chdir(workplace)
    Image.new("RGB", (50, 40)).save("photo.jpg")
    names = {}
    exec(code, names)
    assert names["feature"].shape == (1, 96) and "randomly initialized: " in capsys.readouterr().out
    assert names["maps"].shape == (6, 1, 12, 65, 65)


def test_readme_figures_exist_and_have_a_text():
    for page in ("README.md", "docs/study.md"):
        figures = re.findall(r"!\[(.*?)\]\((.*?)\)", (ROOT / page).read_text())
        assert figures
        for label, path in figures:
            assert label and ((ROOT / page).parent / path).stat().st_size > 5000, path


def test_readme_links_to_files_and_to_lines_that_hold_their_text():
    links = re.findall(r"\[([^\]]*)\]\(([\w/.-]+)(?:#L(\d+))?\)", README)
    assert any(line for _, _, line in links)
    for text, path, line in links:
        assert (ROOT / path).exists(), path
        if line:
            assert text.strip("`") in (ROOT / path).read_text().splitlines()[int(line) - 1], text


def test_readme_is_short_narrow_and_complete():
    assert len(README.split()) <= 1300
    assert not re.search(r"@\w*@|TODO|XXX", README)
    for line in README.splitlines():
        assert len(line) <= 100 or line.startswith("|"), line


@pytest.mark.parametrize("script", [*SCRIPTS, "vit", "analysis"])
def test_readme_says_how_far_to_read(script):
    """To the end of `train`; of vit.py to the weights, of analysis.py to the end of instruments."""
    text = (ROOT / f"{script}.py").read_text()
    row = [line for line in README.splitlines() if line.startswith(f"| [{script}.py]")][0]
    lines = text.splitlines()
    if script == "vit":
        last = [i for i, line in enumerate(lines) if line.endswith("- weights")][0]
    else:
        name = "fourier_log_amplitude" if script == "analysis" else "train"
        last = [node.end_lineno for node in ast.parse(text).body
                if getattr(node, "name", "") == name][0]
    assert f"| {last} |" in row
