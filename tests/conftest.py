"""What the tests share: golden numbers, their weights and inputs, ways to run a script.

`goldens.json` says where its numbers come from. Agreement: 1e-6 in float64, 1e-4 in float32.
"""
import functools
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

if os.environ.get("TEST_GPU") != "1":  # tests/test_gpu.py says how to run it
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # everything else is compared on the CPU
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import vit  # noqa: E402

GOLDENS = json.loads((ROOT / "tests" / "goldens.json").read_text())
# The golden networks'
SIZES = dict(img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=6, mlp_ratio=4)
TEACHER = dict(img_size=32, patch_size=8, embed_dim=96, depth=3, num_heads=4, mlp_ratio=4)


# ------------------------------------------------------------ quick and slow tests

def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="run the slow tests, too")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: left out unless --all is given")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--all"):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    items[:] = [item for item in items if not item.get_closest_marker("slow")]
    config.hook.pytest_deselected(items=slow)
    config.left_out = len(slow)


def pytest_terminal_summary(terminalreporter, config):
    if getattr(config, "left_out", 0):
        terminalreporter.write_line(
            f"{config.left_out} slow tests were left out (kills, ranks, compile, wrong versions, "
            "README's commands): python -m pytest --all")


# ------------------------------------------------------------ golden numbers

def value(name, shape):
    """The golden value of a parameter, in float64."""
    v = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    leaf = name.split(".")[-1]
    if leaf in ("cls_token", "mask_token"):
        v = 0.5 * v
    elif len(shape) == 1:
        v = 0.1 * v + (leaf == "weight")  # 1-D weights are those of LayerNorm and BatchNorm
    else:
        v = v / np.sqrt(np.prod(shape[1:]))
    return torch.from_numpy(v)


def fill(module, prefix="", dtype=torch.float64, rename=lambda name: name):
    """Casts a module and gives each parameter its golden value; position tables stay."""
    module.to(dtype)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if not name.endswith("pos_embed"):
                parameter.copy_(value(prefix + rename(name), tuple(parameter.shape)))
    return module


def images(n=4, size=32, dtype=torch.float64):
    pixels = np.random.RandomState(1000 * n + size).standard_normal((n, 3, size, size))
    return torch.from_numpy(pixels).to(dtype)


def noise(n, length, dtype=torch.float64):
    keys = np.random.RandomState(7).random_sample((n, length))
    return torch.from_numpy(keys).to(dtype)


def agrees(tensor, golden, tolerance=1e-6):
    """Asserts that a tensor is the golden one: a number, nested lists, or a big one's summary."""
    if not isinstance(golden, dict):
        expected = torch.tensor(golden, dtype=torch.float64)
        actual = torch.as_tensor(tensor).detach().double()
    else:
        assert list(tensor.shape) == golden["shape"]
        flat = tensor.detach().double().flatten()
        sums = torch.stack([flat.std(correction=0), flat.abs().sum(), flat.norm()])
        actual = torch.cat([sums, flat[:16], flat[golden["rand_idx"]]])
        numbers = [golden[name] for name in ("std", "abs_sum", "l2")]
        numbers += golden["first16"] + golden["rand_vals"]
        expected = torch.tensor(numbers, dtype=torch.float64)
    mean = expected[expected.isfinite()].abs().mean()
    scale = expected.abs() + 1e-3 * mean  # near zero: of the mean
    worst = ((actual - expected).abs() / scale).max().item()
    assert worst <= tolerance, f"off by {worst:.1e}, allowed {tolerance:.0e}"


# ------------------------------------------------------------ running a script

def begin(script, *arguments, ranks=1, **popen):
    """Starts `python -W error script ...`, or torchrun with several gloo ranks: the process."""
    launcher = [sys.executable, "-W", "error"]
    if torch.__version__.startswith("2.6."):  # it leaves a folder of its own behind
        launcher += ["-W", "ignore:Implicitly cleaning up:ResourceWarning"]
    if ranks > 1:
        launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}",
                    f"--master_port={free_port()}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*launcher, str(ROOT / script), *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **popen)


def run(script, *arguments, code=0, **kw):
    """Runs a script to its end, asserts its exit code, returns what it printed."""
    process = begin(script, *arguments, **kw)
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, out[-3000:] + err[-3000:]
    return out + err


def call(module, *arguments):
    """Runs a script's `main` in this process; what it writes to stdout can be captured."""
    module.main([str(argument) for argument in arguments])


def draw_nothing(module, monkeypatch):
    """Leaves out a script's figures: most of a short run, and other tests look at them."""
    for name in vars(module).copy():
        if name.startswith("draw_") and name != "draw_shapes":
            monkeypatch.setattr(module, name, no_figure)


def no_figure(*args, **kw):
    pass


def refused(capsys, module, *arguments):
    """Runs a script that must refuse its input: what it says, in one line."""
    capsys.readouterr()
    try:
        call(module, *arguments)
    except vit.InputError as error:
        line = str(error)
    except SystemExit as ended:  # argparse
        line = capsys.readouterr().err.strip()
        assert ended.code == 2
    else:
        pytest.fail("the input was not refused")
    assert line and "\n" not in line
    return line


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


SCRIPTS = [name for name in ("mae", "distill", "mocov3", "finetune", "detect", "simmim", "dino")
           if (ROOT / f"{name}.py").exists()]
FORKS = multiprocessing.get_context("forkserver")  # imports the scripts once, for all processes
FORKS.set_forkserver_preload(SCRIPTS)


def finish(processes, code=0):
    for process in processes:
        process.join(120)
    codes = [process.exitcode for process in processes]
    for process in processes:  # one that hangs would keep pytest from ending
        process.kill()
    assert codes == [code] * len(processes), f"exit codes {codes}, not {code}"


def log_of(folder):
    path = Path(folder) / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def same_state(a, b, tolerance=0.0, name="last.pt"):
    """Asserts that two runs end in the same weights and optimizer state."""
    a, b = [torch.load(Path(folder) / name, weights_only=True) for folder in (a, b)]
    assert a["step"] == b["step"]
    assert a.keys() == b.keys() and a["model"].keys() == b["model"].keys()
    for key, x in a["model"].items():
        y = b["model"][key]
        if tolerance and key.endswith("qkv.bias"):
            # The keys' bias cancels in the softmax: Adam scales up rounding.
            x, y = [torch.cat([bias.chunk(3)[0], bias.chunk(3)[2]]) for bias in (x, y)]
        if tolerance and key.endswith(("_encoder.norm.bias", "running_mean")):
            continue  # BatchNorm removes it, as above
        assert (x.double() - y.double()).abs().max() <= tolerance, key
    if not tolerance and "optimizer" in a:
        states = [checkpoint["optimizer"]["state"].values() for checkpoint in (a, b)]
        for x, y in zip(*states, strict=True):
            assert x.keys() == y.keys()
            assert all(torch.equal(torch.as_tensor(x[key]), torch.as_tensor(y[key])) for key in x)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """JPEGs of three classes, each 12 for training, 6 for validation, 66 x 66 to 79 x 71 pixels."""
    from PIL import Image
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 6)):
        for label in ("bird", "boat", "bus"):
            (root / split / label).mkdir(parents=True)
            for i in range(count):
                coarse = rng.integers(0, 255, (4, 4, 3), dtype=np.uint8)
                size = (int(rng.integers(66, 80)), int(rng.integers(66, 72)))
                image = Image.fromarray(coarse).resize(size, Image.BICUBIC)
                image.save(root / split / label / f"{i}.jpg")
    return root


@pytest.fixture(scope="session", autouse=True)
def toy_shapes_are_drawn_once():
    """Runs in this process share the toy images."""
    import vit
    vit.toy_shapes = functools.lru_cache(maxsize=None)(vit.toy_shapes)
