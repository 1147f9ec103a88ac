"""docs/reproduce.md: scripts take each command, and one of each kind runs on tiny images."""
import importlib
import json
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import ROOT, call
from PIL import Image
from test_study import commands_of, parsed

import vit

PAGE = (ROOT / "docs" / "reproduce.md").read_text()
SECTIONS = re.findall(r"^## .*?(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
SHELL = "\n".join(re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL))
DOWNLOADED = ("cifar100",)
with tempfile.TemporaryDirectory() as folder:
    COMMANDS = commands_of(SHELL, Path(folder))  # loops are unrolled
KINDS = {}  # one command of each script and set of options
for script, words in COMMANDS:
    options = [word for word in words if word.startswith("--")]
    KINDS.setdefault(" ".join([script, *options]), (script, words))


# ------------------------------------------------------------ the page

def test_reproduce_scripts_take_each_command(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tests")
    assert len(COMMANDS) > 100
    for script, words in COMMANDS:
        parsed(script.removeprefix("tests/"), words, monkeypatch)


def runs_read(words):
    """The runs whose checkpoints a command reads."""
    return set(re.findall(r"(runs/[\w.-]+)/\w+\.pt", " ".join(words)))


def runs_used(commands):
    """The runs that commands, in their order, read. Each must have been made before."""
    made = set()
    used = set()
    for _, words in commands:
        assert runs_read(words) <= made, words
        used |= runs_read(words)
        if "--out" in words:
            out = words[words.index("--out") + 1]
            assert out not in made
            made.add(out)
    return used


def test_reproduce_read_from_the_top_a_run_starts_from_files_that_were_made_before():
    assert len(runs_used(COMMANDS)) > 10


def test_reproduce_table_5_can_repeat_table_4_loop_where_it_says_so(tmp_path):
    start, place = "for net in original mocov3 mae; do", "for net in distill; do"
    loop = re.search(rf"^{start}.*?^done\n", SHELL, re.MULTILINE | re.DOTALL)[0]
    before = SHELL[:SHELL.index(place)] + "\n"
    commands = commands_of(before + loop.replace(start, place), tmp_path)
    assert "runs/distill" in runs_used(commands)
    assert sum("runs/distill/last.pt" in words for _, words in commands) == 8  # 7 of the loop


def test_reproduce_each_row_of_a_table_has_a_command_of_its_name():
    found = 0
    for section in SECTIONS:
        comments = re.findall(r"^ *# (.*)", section, re.MULTILINE)
        for table in re.findall(r"^\| row \|.*\n\| -.*\n((?:\|.*\n)+)", section, re.MULTILINE):
            for line in table.splitlines():
                row = line.split("|")[1].strip()
                assert any(row in comment for comment in comments), row
                found += 1
    assert found > 30


@pytest.mark.parametrize("heading", [
    *[f"Table {i}" for i in range(1, 6)], *[f"Figure {i}" for i in range(1, 8)], "Appendix B"])
def test_reproduce_covers_the_paper(heading):
    """Figures 1, 3, 5, 6 and 2, 4 share a section."""
    kind, number = heading.split()
    titles = [section.splitlines()[0] for section in SECTIONS]
    assert any(kind in title and re.search(rf"\b{number}\b", title) for title in titles)


def test_reproduce_names_the_data_and_no_other():
    table = SECTIONS[-1].partition("\n\n")[2].partition("\n\n")[0]
    names = {line.split("|")[1].strip() for line in table.splitlines()[2:]}
    used = set()
    for _, words in COMMANDS:
        if "--data" in words:
            used.add(words[words.index("--data") + 1])
    assert used == names | set(DOWNLOADED)


@pytest.mark.parametrize("name", ["reproduce.md", "differences.md", "study.md", "study.sh",
                                  "benchmarks.md"])
def test_page_is_not_wider_than_100_columns(name):
    """A table row is one line of any width."""
    for line in (ROOT / "docs" / name).read_text().splitlines():
        assert len(line) <= 100 or line.startswith("|")


# ------------------------------------------------------------ its commands, tiny

@pytest.fixture(scope="module")
def workplace(tmp_path_factory, image_folder):
    """A folder with the page's data, small, and a checkpoint wherever a command wants one."""
    here = tmp_path_factory.mktemp("reproduce")
    for name in ("IN1K", "IN21K", "Flowers", "Pets", "Aircraft", "Cars", "iNat18"):
        (here / name).symlink_to(image_folder)
    (here / "V2").mkdir()
    for number, name in enumerate(("bird", "boat", "bus")):
        (here / "V2" / str(number)).symlink_to(image_folder / "val" / name)
    write_coco(here / "COCO")
    torch.manual_seed(0)
    network = vit.vit_tiny(img_size=32, patch_size=4, num_classes=3)
    checkpoint = {"model": network.state_dict(), "config": {"classes": ["bird", "boat", "bus"]}}
    for path in set(re.findall(r"runs/[\w.-]+/\w+\.pt", str(COMMANDS))):
        (here / path).parent.mkdir(parents=True, exist_ok=True)
        torch.save(checkpoint, here / path)
    return here


def write_coco(root):
    """COCO's layout: one image with one object in each split."""
    (root / "annotations").mkdir(parents=True)
    for split in ("train2017", "val2017"):
        (root / split).mkdir()
        Image.new("RGB", (60, 40), "gray").save(root / split / "1.jpg")
        outline = [10, 10, 40, 10, 40, 30, 10, 30]
        listing = {
            "images": [{"id": 1, "file_name": "1.jpg", "height": 40, "width": 60}],
            "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 10, 30, 20],
                             "area": 600, "iscrowd": 0, "segmentation": [outline]}],
            "categories": [{"id": 1, "name": "box"}]}
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(listing))


SMALL = {  # sizes of networks and images; the checkpoints are of 32 pixels
    "mae": "--img-size 32 --patch-size 4",
    "distill": "--img-size 32 --patch-size 4",
    "simmim": "--img-size 32 --patch-size 4 --mask-unit 8",
    "mocov3": "--img-size 32 --patch-size 4 --dim 32 --mlp-dim 64",
    "dino": "--img-size 32 --patch-size 4 --local-size 16 --out-dim 64 --hidden-dim 64",
    "finetune": "--img-size 32 --patch-size 4",
    "detect": "--preset toy --arch tiny",
    "analysis": "--images 8 --batch-size 4"}
ONE_STEP = "--workers 0 --max-steps 1"


def tiny(script, words, out):
    """The words of a command for one step on tiny images; what is added wins."""
    words = ["IN1K" if word in DOWNLOADED else word for word in words if word != "--download"]
    words = ["tiny" if word == "base" else word for word in words]
    words += SMALL[script].split()
    if script != "analysis":
        images = 1 if script == "detect" else 3
        words += [*ONE_STEP.split(), "--batch-size", str(images)]
    return [*words, "--out", str(out)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("tests/")])
def test_reproduce_command_runs(kind, workplace, tmp_path, monkeypatch):
    script, words = KINDS[kind]
    monkeypatch.chdir(workplace)
    call(importlib.import_module(script), *tiny(script, words, tmp_path / "out"))
    assert list((tmp_path / "out").iterdir())


# ------------------------------------------------------------ its Python

def python_block(words):
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    return next(block for block in blocks if words in block)


def test_reproduce_real_counts_all_labels_of_an_image(workplace, tmp_path, monkeypatch, capsys):
    """Of 8 images the first has another class, two have none, five may have any."""
    monkeypatch.chdir(tmp_path)
    Path("runs").symlink_to(workplace / "runs")
    for i in range(8):
        path = Path("IN1K", "val", f"class{i % 3}", f"{i}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40)).save(path)
    Path("real.json").write_text(json.dumps([[7], [], []] + [[0, 1, 2]] * 5))
    exec(python_block("real.json"), {})
    assert "ReaL: 83.33" in capsys.readouterr().out


def test_reproduce_flowers_pets_aircraft_become_folders(tmp_path, monkeypatch):
    def dataset(root, split, download):
        return [(Image.new("RGB", (9, 7)), label) for label in (0, 36)]
    for name in ("FGVCAircraft", "Flowers102", "OxfordIIITPet"):
        monkeypatch.setattr(torchvision.datasets, name, dataset)
    monkeypatch.chdir(tmp_path)
    exec(python_block("Flowers102"), {})
    for name, images in (("Flowers", 2), ("Pets", 1), ("Aircraft", 1)):
        assert len(list(Path(name, "train", "036").iterdir())) == images
        assert len(list(Path(name, "test", "000").iterdir())) == 1


def test_reproduce_inat_becomes_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for split in ("train", "val"):
        path = f"train_val2018/Plantae/7477/{split}.jpg"
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).touch()
        listing = {"images": [{"id": 5, "file_name": path}],
                   "annotations": [{"image_id": 5, "category_id": 7477}]}
        Path(f"{split}2018.json").write_text(json.dumps(listing))
    exec(python_block("iNat18/"), {})
    assert Path("iNat18/train/7477/train.jpg").exists()
    assert Path("iNat18/val/7477/val.jpg").exists()


def test_reproduce_cars_becomes_folders(tmp_path, monkeypatch):
    scipy_io = pytest.importorskip("scipy.io")
    monkeypatch.chdir(tmp_path)
    Path("devkit").mkdir()
    notes = np.array([("00001.jpg", 7), ("00002.jpg", 196)], [("fname", object), ("class", object)])
    for split, path in (("train", "devkit/cars_train_annos.mat"),
                        ("test", "cars_test_annos_withlabels.mat")):
        Path(f"cars_{split}").mkdir()
        for name in notes["fname"]:
            Path(f"cars_{split}", name).touch()
        scipy_io.savemat(path, {"annotations": notes})
    exec(python_block("Cars/"), {})
    for split in ("train", "test"):
        assert Path("Cars", split, "007", "00001.jpg").exists()
        assert Path("Cars", split, "196", "00002.jpg").exists()
