"""README.md: its commands run (tiny, in one process, uncompiled, nothing downloaded), its pictures exist."""
import re
import subprocess

import pytest
import torch
from conftest import ROOT, call

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.S)
BLOCKS += [re.sub(r"^\w+=.*\s# (?=\w+=)", "", block, flags=re.M) for block in BLOCKS if re.search(r"\s# \w+=", block)]  # the settings on the right
COMMANDS = [line.split("#")[0].strip() for block in BLOCKS for line in block.splitlines()]
SCRIPTS = {"mae.py", "mocov3.py", "distill.py", "finetune.py", "analysis.py"}
# Stand for the programs that README calls: each prints its name and arguments on a line.
STUBS = "".join(f"{name}() {{ printf '%s\\t' {name} \"$@\"; echo; }}\n" for name in ("python", "torchrun", "pip", "diff"))

OVERRIDDEN = {"--out", "--download", "--compile", "--arch", "--patch-size", "--batch-size", "--epochs", "--warmup-epochs", "--fraction",
              "--accum", "--seed", "--nproc_per_node"}  # by the test, or of no interest: commands that differ in these alone are run once


def script_commands():
    """`command, script, arguments` of the commands that run a script, as bash expands them: one for each set of options that matter."""
    seen = set()
    for block in BLOCKS:
        called = subprocess.run(["bash", "-c", STUBS + block], capture_output=True, text=True, check=True).stdout
        for words in (line.split("\t")[:-1] for line in called.splitlines()):
            names = [word for word in words if word in SCRIPTS]
            options = {word.split("=")[0] for word in words if word.startswith("--")} - OVERRIDDEN
            options = (*sorted(options), *({"linear", "knn", "cka", "all"} & set(words)))
            if not names or words[0] == "diff" or (names[0], options) in seen:
                continue
            seen.add((names[0], options))
            yield " ".join(words), names[0].removesuffix(".py"), words[words.index(names[0]) + 1:]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, small_folder):
    """A folder in which README's paths exist: small checkpoints of each kind, and small images as DIR."""
    import mae
    import vit
    folder = tmp_path_factory.mktemp("readme")
    torch.manual_seed(0)
    pretrained = mae.MaskedAutoencoder(vit.vit_toy(img_size=32, patch_size=8, global_pool="token"))
    classifier = vit.vit_toy(img_size=32, patch_size=8, num_classes=10)
    for path in {path for _, _, arguments in script_commands() for word in arguments for path in re.findall(r"runs/.*[.]pt", word)}:
        model = classifier if re.search("finetune|scratch|/all/", path) else pretrained
        config = dict(method="mae", arch="toy", img_size=32, patch_size=8, decoder_dim=96, decoder_depth=1, decoder_heads=3,
                      norm_pix_loss=True, mask_ratio=0.75, pool="avg", num_heads=12, mode="finetune")
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        torch.save({"model": model.state_dict(), "config": config, "step": 1}, folder / path)
    torch.save(pretrained.encoder.state_dict(), folder / "mae_pretrain_vit_base.pth")
    (folder / "DIR").symlink_to(small_folder)
    return folder


@pytest.mark.parametrize("command, script, arguments", [pytest.param(*parts, id=parts[0][:90]) for parts in script_commands()])
def test_the_commands_of_the_readme_run(command, script, arguments, workplace, monkeypatch, tmp_path):
    module = __import__(script)
    monkeypatch.chdir(workplace)
    arguments = ["DIR" if word in ("cifar100", "fashionmnist") else word for word in arguments if word not in ("--download", "--compile")]
    tiny = ["--out", tmp_path]
    if script == "analysis":
        tiny += ["--images", 8, "--batch-size", 4]
    elif not {"--reconstruct", "--eval-only"} & set(arguments):
        tiny += ["--arch", "toy", "--img-size", 32, "--patch-size", 8, "--batch-size", 8, "--workers", 0]
        tiny += [] if "--throughput" in arguments else ["--epochs", 1, "--warmup-epochs", 0, "--max-steps", 1, "--fraction", 0.04]
        if "DIR" in arguments:
            tiny[-1:] = [1]
    if script == "distill" and "--teacher" not in arguments:
        tiny += ["--teacher", "mae_pretrain_vit_base.pth"]  # training one first is tested in test_distill.py
    arguments = [{"9": "4", "12": "5"}.get(word, word) for word in arguments]  # the toy network has 6 blocks
    call(module, *arguments, *tiny)
    assert any(tmp_path.iterdir()) or "--throughput" in arguments or "--eval-only" in arguments


def test_the_two_commands_come_first():
    assert COMMANDS[0] == "pip install -r requirements.txt && python mae.py"
    assert COMMANDS[1] == "pip install -r requirements.txt && python -m pytest"


def test_pictures_exist_and_are_labelled():
    pictures = re.findall(r"!\[(.*?)\]\((.*?)\)", README)
    assert len(pictures) >= 6
    for label, path in pictures:
        assert label and (ROOT / path).stat().st_size > 5000


def test_nothing_is_left_to_fill_in():
    assert not re.search(r"@\w+@|TODO|XXX", README)


@pytest.mark.parametrize("script", sorted(SCRIPTS - {"analysis.py"}))
def test_every_docstring_opens_with_the_commands_for_each_machine(script):
    lines = (ROOT / script).read_text().split('"""')[1].splitlines()
    for machine, start in (("laptop", f"python {script}"), ("one GPU", f"python {script}"), ("8 GPUs", "torchrun --nproc_per_node=8"),
                           ("two nodes", "torchrun --nnodes=2")):
        command = next(line.split(machine, 1)[1].strip() for line in lines if line.startswith(f"    {machine}"))
        assert command.startswith(start) and script in command
