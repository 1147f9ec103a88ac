"""README.md: its commands run (tiny, in one process, uncompiled, nothing downloaded), its pictures exist."""
import re
import shlex

import pytest
import torch
from conftest import ROOT, call

README = (ROOT / "README.md").read_text()
COMMANDS = [line.split("#")[0].strip() for block in re.findall(r"```bash\n(.*?)```", README, re.S) for line in block.splitlines()]
SCRIPTS = {"mae.py", "mocov3.py", "distill.py", "finetune.py", "analysis.py"}


def script_commands():
    """`[script, arguments]` of each command that runs a script, torchrun's in one process, one seed of a loop."""
    for command in COMMANDS:
        words = shlex.split(command.replace("$seed", "1"))
        names = [word for word in words if word in SCRIPTS]
        if names and words[0] != "diff":
            yield command, names[0].removesuffix(".py"), words[words.index(names[0]) + 1:]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, small_folder):
    """A folder in which README's paths exist: small checkpoints of each kind, and small images as DIR."""
    import mae
    import vit
    folder = tmp_path_factory.mktemp("readme")
    torch.manual_seed(0)
    pretrained = mae.MaskedAutoencoder(vit.vit_toy(img_size=32, patch_size=8, global_pool="token"))
    classifier = vit.vit_toy(img_size=32, patch_size=8, num_classes=10)
    for name, model in (("mae", pretrained), ("distill", pretrained), ("mocov3", pretrained), ("finetune", classifier), ("finetune-0", classifier)):
        (folder / "runs" / name).mkdir(parents=True)
        config = dict(method=name, arch="toy", img_size=32, patch_size=8, decoder_dim=96, decoder_depth=1, decoder_heads=3,
                      norm_pix_loss=True, mask_ratio=0.75, pool="avg", num_heads=12, mode="finetune")
        for file in ("last.pt", "best.pt"):
            torch.save({"model": model.state_dict(), "config": config, "step": 1}, folder / "runs" / name / file)
    torch.save(pretrained.encoder.state_dict(), folder / "mae_pretrain_vit_base.pth")
    (folder / "DIR").symlink_to(small_folder)
    return folder


@pytest.mark.parametrize("command, script, arguments", [pytest.param(*parts, id=parts[0][:90]) for parts in script_commands()])
def test_the_commands_of_the_readme_run(command, script, arguments, workplace, monkeypatch, tmp_path):
    module = __import__(script)
    monkeypatch.chdir(workplace)
    arguments = ["DIR" if word in ("cifar100", "cifar10") else word for word in arguments if word not in ("--download", "--compile")]
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
    if "--distill-blocks" in arguments:
        at = arguments.index("--distill-blocks")
        arguments = arguments[:at + 1] + ["3", "6"] + arguments[at + 5:]
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
