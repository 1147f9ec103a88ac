"""What every test shares: the golden numbers, the weights and inputs they were made with, and a way to run a script.

`goldens.json` holds what the published implementations (MAE, MoCo-v3, MAE-Lite, ...) compute on weights and inputs given
by formula: `fill` and `images` below are those formulas. Agreement: 1e-6 relative in float64, 1e-4 in float32.
"""
import ast
import errno
import functools
import importlib
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # everything is compared on the CPU
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
GOLDENS = json.loads((ROOT / "tests" / "goldens.json").read_text())
SIZES = dict(img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=6, mlp_ratio=4)  # of the golden networks
TEACHER = dict(img_size=32, patch_size=8, embed_dim=96, depth=3, num_heads=4, mlp_ratio=4)


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "ignore:The image decoding and encoding:DeprecationWarning")  # torchvision 0.29


def value(name, shape):
    """The golden value of a parameter, in float64."""
    v = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    leaf = name.rsplit(".", 1)[-1]
    if leaf in ("cls_token", "mask_token"):
        v = 0.5 * v
    elif len(shape) == 1:
        v = 0.1 * v + (leaf == "weight")  # 1-D weights are those of LayerNorm and BatchNorm
    else:
        v = v / np.sqrt(np.prod(shape[1:]))
    return torch.from_numpy(v)


def fill(module, prefix="", dtype=torch.float64, rename=lambda name: name):
    """Casts a module and gives each parameter its golden value (the fixed position tables stay)."""
    module.to(dtype)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if not name.endswith("pos_embed"):
                parameter.copy_(value(prefix + rename(name), tuple(parameter.shape)))
    return module


def images(n=4, size=32, dtype=torch.float64):
    return torch.from_numpy(np.random.RandomState(1000 * n + size).standard_normal((n, 3, size, size))).to(dtype)


def noise(n, length, dtype=torch.float64):
    return torch.from_numpy(np.random.RandomState(7).random_sample((n, length))).to(dtype)


def agrees(tensor, golden, tolerance=1e-6):
    """Asserts that a tensor is the golden one: a number, nested lists, or a summary of a big tensor."""
    if not isinstance(golden, dict):
        expected = torch.tensor(golden, dtype=torch.float64)
        actual = torch.as_tensor(tensor).detach().double()
    else:
        assert list(tensor.shape) == golden["shape"]
        flat = tensor.detach().double().flatten()
        actual = torch.cat([torch.stack([flat.std(correction=0), flat.abs().sum(), flat.norm()]), flat[:16], flat[golden["rand_idx"]]])
        expected = torch.tensor([golden["std"], golden["abs_sum"], golden["l2"], *golden["first16"], *golden["rand_vals"]],
                                dtype=torch.float64)
    scale = expected.abs() + 1e-3 * expected[torch.isfinite(expected)].abs().mean()  # relative, near zero: to the mean
    worst = ((actual - expected).abs() / scale).max().item()
    assert worst <= tolerance, f"off by {worst:.1e}, allowed {tolerance:.0e}"


def start(script, *arguments, ranks=1, cwd=ROOT, **popen):
    """Starts `python script ...` (or torchrun with `ranks` gloo processes) and returns the process."""
    launcher = [sys.executable]
    if ranks > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        launcher += ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", f"--master_port={port}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "MPLBACKEND": "Agg"}
    return subprocess.Popen([*launcher, str(ROOT / script), *map(str, arguments)], cwd=cwd, env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **popen)


def run(script, *arguments, code=0, **kw):
    """Runs a script to its end, asserts its exit code, returns what it printed (stdout, then stderr)."""
    process = start(script, *arguments, **kw)
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, f"exit {process.returncode}, expected {code}:\n{out[-3000:]}\n{err[-3000:]}"
    return out + err


def call(module, *arguments):
    """Runs a script's `main` in this process: `call(mae, "--out", folder)`. The signal handlers it sets are undone."""
    handlers = {name: signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGINT)}
    try:
        module.run(lambda: module.main([str(argument) for argument in arguments]))
    finally:
        for name, handler in handlers.items():
            signal.signal(name, handler)


def refused(capsys, module, *arguments):
    """Runs a script that must refuse its input: exit code 2 and one line on stderr, which is returned."""
    with pytest.raises(SystemExit) as ended:
        call(module, *arguments)
    lines = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


# Processes of a script that start at once: a server imports it one time and forks.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["vit", "mae", "distill", "mocov3", "finetune"])


def forked(script, arguments, environment, break_at_step, errors):
    if errors:
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    os.environ.update(environment)
    sys.path.insert(0, str(ROOT))
    torch.set_num_threads(1)
    module = importlib.import_module(script)
    for name in dir(module):  # the pictures, which take most of a short run, are tested elsewhere
        if name.startswith("draw_") and name != "draw_views":
            setattr(module, name, lambda *a, **kw: None)
    if break_at_step is not None and environment.get("RANK") == "1":  # a NaN in one rank's images
        step, draw = [0], module.draw

        def broken(batch, *shape, **kw):
            step[0] = batch.step
            return draw(batch, *shape, **kw)
        whole = module.normalize
        module.draw = broken
        module.normalize = lambda images, args: whole(images, args) * (float("nan") if step[0] == break_at_step else 1)
    module.run(lambda: module.main(arguments))


def launch(script, *arguments, ranks=1, break_at_step=None, errors=None):
    """Starts `script` (its module's name) on so many gloo ranks, as torchrun would; returns the processes.

    At `break_at_step`, rank 1's images turn to NaN; `errors`: a file for stderr.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = []
    for rank in range(ranks):
        environment = {"CUDA_VISIBLE_DEVICES": ""}
        if ranks > 1:
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
                            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        processes.append(FORKS.Process(target=forked, args=(script, [str(a) for a in arguments], environment, break_at_step, errors)))
        processes[-1].start()
    return processes


def finish(processes, code=0):
    for process in processes:
        process.join(120)
    codes = [process.exitcode for process in processes]
    for process in processes:  # one that hangs would keep pytest from ending
        process.kill()
    assert codes == [code] * len(processes), f"exit codes {codes}, expected {code}"


def fill_disk(monkeypatch):
    """From now on checkpoints are written and then found not to have fitted."""
    save = torch.save

    def full(state, path):
        save(state, path)
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(torch, "save", full)


def killed_and_resumed_equals_uninterrupted(script, settings, folder):
    """SIGKILL at a moment nobody chose, of a run too long to have ended before; then a few steps more, against as many in one go."""
    process, = launch(script, *settings, "--out", folder / "killed")
    deadline = time.monotonic() + 120
    while not (folder / "killed" / "last.pt").exists():
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(np.random.default_rng().uniform(0, 0.2))
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    steps = torch.load(folder / "killed" / "last.pt", weights_only=True)["step"]
    resumed = launch(script, *settings, "--out", folder / "killed", "--resume", "--max-steps", 6)
    finish(resumed + launch(script, *settings, "--out", folder / "whole", "--max-steps", steps + 6))
    same_state(folder / "whole", folder / "killed")
    assert losses(folder / "whole") == losses(folder / "killed") and len(losses(folder / "whole")) == steps + 6


def log_of(folder):
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def losses(folder):
    return [entry["loss"] for entry in log_of(folder)]


def wait_for_lines(process, folder, count):
    """Until a running script has logged so many lines."""
    deadline = time.monotonic() + 120
    while not (Path(folder) / "log.jsonl").exists() or len(log_of(folder)) < count:
        assert process.poll() is None and time.monotonic() < deadline, "it ended too early, or never began"
        time.sleep(0.05)


def same_state(a, b, tolerance=0.0):
    """Asserts that two checkpoints hold the same model and optimizer: bit for bit, or to a tolerance."""
    a, b = (torch.load(Path(folder) / "last.pt", weights_only=True) for folder in (a, b))
    assert a["step"] == b["step"]
    tensors_a, tensors_b = [dict(flatten({"model": c["model"], "optimizer": c["optimizer"]})) for c in (a, b)]
    assert tensors_a.keys() == tensors_b.keys()
    for name, x in tensors_a.items():
        y = tensors_b[name]
        if tolerance and name.endswith("qkv.bias"):  # the keys' bias cancels in the softmax: its gradient is rounding, which Adam scales up
            x, y = (torch.cat([b.chunk(3)[0], b.chunk(3)[2]]) for b in (x, y))
        if isinstance(x, torch.Tensor):
            difference = (x.double() - y.double()).abs().max().item() if x.numel() else 0
            assert difference <= tolerance, f"{name} differs by {difference}"


def flatten(tree, name=""):
    if isinstance(tree, (dict, list)):
        for key, value in (tree.items() if isinstance(tree, dict) else enumerate(tree)):
            yield from flatten(value, f"{name}.{key}")
    else:
        yield name, tree


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """JPEGs of three classes, 12 for training and 6 for validation each, 66 x 66 to 79 x 71 pixels: read from disk, not kept."""
    from PIL import Image
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 6)):
        for kind in ("bird", "boat", "bus"):
            (root / split / kind).mkdir(parents=True)
            for i in range(count):
                coarse = rng.integers(0, 255, (4, 4, 3), dtype=np.uint8)
                size = (int(rng.integers(66, 80)), int(rng.integers(66, 72)))
                Image.fromarray(coarse).resize(size, Image.BICUBIC).save(root / split / kind / f"{i}.jpg")
    return root


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory):
    """32 x 32 PNGs of two classes, as CIFAR-100 comes."""
    from PIL import Image
    import vit
    root = tmp_path_factory.mktemp("small")
    pixels, _ = vit.toy_shapes(36, 32, seed=3)
    for i, image in enumerate(pixels):
        folder = root / ("train" if i < 24 else "val") / ("even", "odd")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i:03d}.png")
    return root


@pytest.fixture(scope="session", autouse=True)
def toy_shapes_are_drawn_once():
    """Scripts that run in this process share the toy images."""
    import vit
    vit.toy_shapes = functools.lru_cache(maxsize=None)(vit.toy_shapes)


@pytest.fixture
def teacher(tmp_path):
    """The arguments that distill.py needs beside mae.py's: a small teacher's weights."""
    def make(script, patch=4):
        if script != "distill":
            return ()
        import vit
        torch.manual_seed(1)
        torch.save(vit.vit_toy(img_size=32, patch_size=patch).state_dict(), tmp_path / "teacher.pt")
        return "--teacher", tmp_path / "teacher.pt"
    return make


def function_source(path, name):
    """The text of one top-level function or class of a script, decorators included."""
    text = (ROOT / path).read_text()
    node = next(node for node in ast.parse(text).body if getattr(node, "name", None) == name)
    return "\n".join(text.splitlines()[min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1:node.end_lineno])
