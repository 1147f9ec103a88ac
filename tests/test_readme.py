"""README.md: its commands run (tiny, in this process), its figures exist, its length."""
import re
import shlex

import pytest
import torch
from conftest import ROOT, SCRIPTS, call

README = (ROOT / "README.md").read_text()
LINES = [line.split(" #")[0].strip() for block in re.findall(r"```bash\n(.*?)```", README, re.S) for line in block.splitlines()]
COMMANDS = [line for line in LINES if re.match(r"(python|torchrun --\S+) \w+\.py", line)]
TINY = ["--workers", "0", "--max-steps", "1", "--save-minutes", "60"]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, image_folder):
    """A folder in which README's paths exist: small checkpoints, DIR, and a COCO folder with one image."""
    import mae
    import vit
    folder = tmp_path_factory.mktemp("readme")
    torch.manual_seed(0)
    encoder = vit.vit_toy(img_size=32, patch_size=4, global_pool="token")
    for name in ("mae_tiny.pth", "moco_tiny.pth", "mae_pretrain_vit_base.pth"):
        torch.save(encoder.state_dict(), folder / name)
    states = {"runs/mae/last.pt": mae.MaskedAutoencoder(encoder), "runs/finetune/best.pt": vit.vit_toy(img_size=32, patch_size=4, num_classes=10)}
    states["runs/finetune/last.pt"] = states["runs/finetune/best.pt"]
    for name, model in states.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        torch.save({"model": model.state_dict(), "config": {"data": "toy"}, "step": 1}, folder / name)
    for name in ("mae", "distill"):
        (folder / "runs" / name).mkdir(exist_ok=True)
        (folder / "runs" / name / "log.jsonl").write_text('{"step": 1, "epoch": 1, "loss": 2.0}\n')
    (folder / "DIR").symlink_to(image_folder)
    return folder


def tiny(script, words):
    """A command's arguments, on small images and for one step."""
    if script == "analysis":
        small = [] if words[0] == "curves" else ["--images", "8", "--batch-size", "4"]
        return [*words, *small]
    words = [word for word in words if word not in ("--download", "--compile")]
    words = ["DIR" if word == "cifar100" else word for word in words]
    sizes = ["--arch", "toy", "--img-size", "32", "--patch-size", "4"]
    if "--eval-only" in words:
        return [*words, "--workers", "0"]
    if "--accum" in words:
        words[words.index("--accum") + 1] = "2"
    if script == "detect":
        return [*words, *TINY, "--scenes", "8", "--val-scenes", "2"]
    if script == "distill":
        words = [word.replace("3,6,9,12", "3,6") for word in words]
        words += [] if "--teacher" in words else ["--teacher", "mae_pretrain_vit_base.pth"]
    batch = ["--batch-size", "8", "--epochs", "8", "--warmup-epochs", "0"]
    sizes += ["--local-size", "16", "--out-dim", "64"] if script == "dino" else []
    if "transfer" in words:
        sizes = []
    return [*words, *TINY, *batch, *([] if script == "finetune" and "--init" in words else sizes)]


@pytest.mark.parametrize("command", [pytest.param(line, id=line[:80]) for line in dict.fromkeys(COMMANDS) if "COCO" not in line])
def test_readme_command_runs(command, workplace, monkeypatch, tmp_path):
    """COCO's commands are tested in test_detect.py."""
    words = shlex.split(command)
    name = next(word for word in words if word.endswith(".py"))
    script = name.removesuffix(".py")
    module = __import__(script)
    monkeypatch.chdir(workplace)
    for figure in [name for name in vars(module) if name.startswith("draw_")] if script != "analysis" else []:
        monkeypatch.setattr(module, figure, lambda *args, **kw: None)
    call(module, *tiny(script, words[words.index(name) + 1:]), "--out", tmp_path / "out")
    assert (tmp_path / "out").exists() or "--eval-only" in words or "knn" in words


def test_readme_begins_with_the_two_commands():
    assert LINES[0] == "pip install -r requirements.txt && python mae.py"
    assert LINES[1] == "pip install -r requirements.txt && python -m pytest"


def test_readme_figures_exist_and_are_labeled():
    for page in ("README.md", "docs/study.md"):
        for label, path in re.findall(r"!\[(.*?)\]\((.*?)\)", (ROOT / page).read_text()):
            assert label and ((ROOT / page).parent / path).stat().st_size > 5000, path


def test_readme_links_lead_to_files():
    for path in re.findall(r"\]\(([\w/.-]+)\)", README):
        assert (ROOT / path).exists(), path


def test_readme_is_short_and_complete():
    assert len(README.splitlines()) <= 240 and not re.search(r"@\w+@|TODO|XXX", README)


@pytest.mark.parametrize("script", SCRIPTS)
def test_readme_says_how_many_lines_to_read(script):
    """Up to the last line of `train`."""
    import ast
    tree = ast.parse((ROOT / f"{script}.py").read_text())
    last = next(node.end_lineno for node in tree.body if getattr(node, "name", "") == "train")
    assert f"| {last} lines |" in next(line for line in README.splitlines() if line.startswith(f"| [{script}.py]"))
