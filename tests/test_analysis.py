"""analysis.py against the published numbers, closed forms, and real runs of the script."""
import itertools
import json
import math

import numpy as np
import pytest
import torch
from conftest import GOLDENS, SIZES, agrees, call, fill, images, refused

import analysis
import vit


def normal(*shape, seed=0):
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape))


def cka_of(batches):
    """CKA of mini-batches, each a pair of lists of layers."""
    cka = analysis.CKA(len(batches[0][0]), len(batches[0][1]))
    for features1, features2 in batches:
        cka.update(features1, features2)
    return cka.compute()


def golden_features():
    """Two mini-batches of 3 layers and of 4 layers, drawn as the golden file says."""
    rng = np.random.RandomState(11)
    features1 = [[rng.standard_normal((16, 5, 8)) for _ in range(2)] for _ in range(3)]
    features2 = []
    for j in range(4):
        W = rng.standard_normal((8, 6))
        features2.append([features1[min(j, 2)][b] @ W + 0.5 * rng.standard_normal((16, 5, 6))
                          for b in range(2)])
    return [[[torch.from_numpy(layer[b]) for layer in model] for model in (features1, features2)]
            for b in range(2)]


def test_fig1_cka_is_the_published_one():
    agrees(cka_of(golden_features()), GOLDENS["8_cka"]["mae_lite_cka_3x4"])


def test_fig1_cka_averages_the_hsic_of_song_et_al_over_mini_batches():
    def hsic(x, y):
        n, one = len(x), torch.ones(len(x), dtype=torch.float64)
        K, L = ((z @ z.T).fill_diagonal_(0) for z in (x, y))
        middle = (one @ K @ one) * (one @ L @ one) / ((n - 1) * (n - 2))
        return ((K @ L).trace() + middle - 2 / (n - 2) * (one @ K @ L @ one)) / (n * (n - 3))

    batches = [(normal(n, 5, seed=n), normal(n, 5, seed=n) ** 2 + normal(n, 5, seed=n + 50))
               for n in (5, 9, 30)]
    KL, KK, LL = (sum(hsic(*pair) for pair in pairs) for pairs in (
        batches, [(x, x) for x, _ in batches], [(y, y) for _, y in batches]))
    agrees(cka_of([([x], [y]) for x, y in batches]), [[(KL / (KK * LL).sqrt()).item()]])


def test_fig1_cka_ignores_rotation_scale_and_shift():
    x, y = normal(32, 10), normal(32, 10, seed=1)
    rotation, _ = torch.linalg.qr(normal(10, 10, seed=2))
    agrees(cka_of([([x, y], [x, y])]).diagonal(), [1.0, 1.0])
    related = x + y
    before, after, mapped = (cka_of([([x], [z])]).item() for z in (
        related, 7 * related @ rotation + 3000, related @ normal(10, 10, seed=3)))
    assert after == pytest.approx(before)  # in float32, the shift would be felt
    assert abs(mapped - before) > 1e-3


def test_fig1_cka_of_small_mini_batches_estimates_what_one_full_batch_does():
    x = normal(512, 20)
    y = x @ normal(20, 20, seed=1) + 4 * normal(512, 20, seed=2)
    whole = cka_of([([x], [y])])
    halves = cka_of([([a], [b]) for a, b in zip(x.split(8), y.split(8))])
    assert abs(halves - whole) < 0.05  # biased HSIC: 0.3 too much
    unrelated = [([normal(8, 40, seed=b)], [normal(8, 30, seed=900 + b)]) for b in range(200)]
    assert abs(cka_of(unrelated)) < 0.05


def test_features_of_cka_are_the_published_ones():
    model, golden = fill(vit.VisionTransformer(**SIZES, num_classes=10)), GOLDENS["2_attention"]
    features = analysis.cka_features(model, model.states(model.embed(images())))
    for x, expected in zip(features, golden["rep_catcher_features"], strict=True):
        agrees(x, expected)
    model = vit.VisionTransformer(**SIZES, global_pool="token")  # its final norm is another
    torch.nn.init.constant_(model.norm.weight, 2)
    x = torch.randn(2, 17, 48)
    assert torch.equal(analysis.cka_features(model, [x] * 4)[-1], model.norm(x)[:, 1:])


def test_fig1_cka_refuses_mini_batches_of_fewer_than_four_images():
    with pytest.raises(vit.InputError):
        cka_of([([normal(3, 5)], [normal(3, 5)])])


def golden_scores():
    return 2 * normal(2, 3, 17, 17, seed=13)


def test_eq1_distance_is_the_published_one_in_pixels():
    golden = GOLDENS["9_attn_stats"]
    for patch_size, name in ((16, "plain_factor16_distance_per_head"),
                             (14, "official_mean_distance_per_head")):
        agrees(analysis.attention_distance(golden_scores(), 4, patch_size), golden[name])


def test_eq1_distance_of_uniform_attention_is_the_mean_between_patches():
    places = list(itertools.product(range(6), repeat=2))
    expected = 16 * sum(math.dist(p, q) for p in places for q in places) / len(places) ** 2
    scores = torch.full((5, 3, 37, 37), 1.7, dtype=torch.float64)
    agrees(analysis.attention_distance(scores, 6, 16), [expected] * 3)


def test_eq1_distance_and_eq2_entropy_are_zero_if_patches_see_themselves():
    scores = torch.full((1, 1, 17, 17), -1e4).masked_fill(torch.eye(17, dtype=bool), 1e4)
    assert analysis.attention_distance(scores, 4, 16).item() == pytest.approx(0, abs=1e-4)
    assert analysis.attention_entropy(scores).item() == pytest.approx(0, abs=1e-6)
    neighbors = [q + 1 if q % 2 else q - 1 for q in range(1, 17)]  # the next in the row
    scores = scores[:, :, [0, *neighbors]]
    assert analysis.attention_distance(scores, 4, 16).item() == pytest.approx(16)


def test_eq2_entropy_is_the_published_one_in_nats():
    golden = GOLDENS["9_attn_stats"]["plain_no_eps_entropy_per_head"]
    agrees(analysis.attention_entropy(golden_scores()), golden)


def test_eq2_entropy_of_uniform_attention_is_log_L():
    scores = torch.zeros(5, 3, 26, 26).double()
    agrees(analysis.attention_entropy(scores), [math.log(25)] * 3)


def test_fig5_measure_gives_the_published_distances_and_entropies():
    model, golden = fill(vit.VisionTransformer(**SIZES)), GOLDENS["2_attention"]
    for batches in ([images()], images().split(2)):
        results = analysis.measure({"a": model}, batches, ["attention"])
        found = torch.from_numpy(results["attention"]["a"])
        agrees(found[:, 0] * 14 / 8, golden["analyzer_mean_distance_layer_by_head_factor14"])
        golden_entropy = golden["analyzer_mean_entropy_layer_by_head"]
        agrees(found[:, 1], golden_entropy, 2e-5)  # theirs adds 1e-6 in the log


@pytest.mark.parametrize("name, shape, grid", [
    ("tokens_4x16x48", (4, 16, 48), 4), ("extra_tokens_2x196x192", (2, 196, 192), 14)])
def test_fig3_log_amplitude_is_the_published_one_and_reaches_pi(name, shape, grid):
    """Amplitudes are far from zero: whether 0 or 1e-6 is added before the log is not felt."""
    golden = GOLDENS["10_fourier"][name]
    amplitude = analysis.fourier_log_amplitude(normal(*shape, seed=17), grid)
    assert amplitude.shape == (grid // 2 + 1,)
    expected = golden["relative_log_amplitude_half_diagonal"] + [golden["alt_nyquist_minus_dc"]]
    assert amplitude.tolist() == pytest.approx(expected, abs=1e-5)


def test_fig3_a_wave_is_at_its_own_frequency_and_a_checkerboard_at_pi():
    row, column = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    for k in range(5):
        wave = torch.cos(2 * math.pi * k * (row + column) / 8).reshape(1, 64, 1)
        noise = 0.01 * normal(1, 64, 1)  # all frequencies: no log of zero
        assert analysis.fourier_log_amplitude(wave.double() + noise, 8).argmax() == k
    with pytest.raises(vit.InputError):
        analysis.fourier_log_amplitude(torch.zeros(1, 9, 1), 3)


# ------------------------------------------------------------ the script

@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Networks of 16 px (a, b), of 12 px in 3 x 3 patches, and a classifier that is no ViT."""
    root = tmp_path_factory.mktemp("models")
    for seed, (name, size) in enumerate({"a": 16, "b": 16, "odd": 12}.items()):
        torch.manual_seed(100 + seed)
        model = vit.VisionTransformer(size, 4, embed_dim=24, depth=2, global_pool="token")
        state = {f"encoder.{key}": tensor for key, tensor in model.state_dict().items()}
        torch.save({"model": state}, root / f"{name}.pt")
    torch.save({"model": {"conv.weight": torch.zeros(3)}}, root / "convnet.pt")
    return root


def numbers(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def test_all_writes_each_figure_and_its_numbers(checkpoints, tmp_path, capsys):
    a, b = checkpoints / "a.pt", checkpoints / "b.pt"
    settings = "--images", 40, "--batch-size", 16, "--out", tmp_path
    call(analysis, "all", f"a={a}", f"b:6={b}", "random", *settings)
    said = capsys.readouterr().out
    assert "32 validation images of toy" in said and "b.pt, 6 heads" in said
    figures = {path.name for path in tmp_path.glob("*.png")}
    assert figures == {"cka.png", "fourier.png", "attention.png"}
    cka = numbers(tmp_path, "cka")
    attention = numbers(tmp_path, "attention")["attention"]
    assert cka["about"] == "32 validation images of toy" and cka["models"][2] == "random"
    compared = {a: list(row) for a, row in cka["cka"].items()}
    assert compared == {"a": ["a"], "b": ["b", "a"], "random": ["random", "a"]}
    assert np.diagonal(cka["cka"]["random"]["random"]) == pytest.approx(1)
    assert np.shape(cka["cka"]["b"]["a"]) == (3, 3) and np.diagonal(cka["cka"]["b"]["a"]).max() < 1
    shapes = [np.shape(attention[label]) for label in ("a", "b", "random")]
    assert shapes == [(2, 2, 12), (2, 2, 6), (2, 2, 12)]
    fourier = numbers(tmp_path, "fourier")["fourier"]
    assert np.shape(fourier["a"]) == (3, 3) and not np.array(fourier["a"])[:, 0].any()


def test_random_is_an_untrained_twin_of_the_first_model(checkpoints):
    words = [f"a:6={checkpoints / 'a.pt'}", "random"]
    models, again, other = (analysis.open_models(words, seed) for seed in (0, 0, 1))
    assert list(models) == ["a", "random"] and models["random"].blocks[0].attn.num_heads == 6
    weights = [m["random"].blocks[1].mlp.fc1.weight for m in (models, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    trained = models["a"].blocks[1].mlp.fc1.weight
    assert trained.shape == weights[0].shape and not torch.equal(trained, weights[0])


def test_any_model_can_be_the_reference_of_cka(checkpoints, tmp_path):
    words = [f"a={checkpoints / 'a.pt'}", f"b={checkpoints / 'b.pt'}", "random"]
    settings = "--images", 16, "--batch-size", 8
    call(analysis, "cka", *words, *settings, "--out", tmp_path / "first")
    call(analysis, "--reference", "b", *settings, "--out", tmp_path / "b", "cka", *words)
    first, by_b = [numbers(tmp_path / name, "cka")["cka"] for name in ("first", "b")]
    compared = {a: list(row) for a, row in by_b.items()}
    assert compared == {"a": ["a", "b"], "b": ["b"], "random": ["random", "b"]}
    assert np.transpose(by_b["a"]["b"]) == pytest.approx(np.array(first["b"]["a"]))
    figure = analysis.draw_cka(by_b)
    labels = [(axis.get_ylabel(), axis.get_xlabel()) for axis in figure.axes]
    assert labels[:2] == [("layer of a", "layer of a"), ("layer of a", "layer of b")]


def test_measure_does_what_is_asked_for_only(checkpoints):
    models = analysis.open_models([f"odd={checkpoints / 'odd.pt'}"], seed=0)
    batch = torch.randn(2, 3, 12, 12)  # too few for CKA, an odd grid for Fourier
    results = analysis.measure(models, [batch], ["attention"])
    assert results["attention"]["odd"].shape == (2, 2, 12)
    assert not results["cka"] and "fourier" not in results
    with pytest.raises(vit.InputError, match="at least 4 images"):
        analysis.measure(models, [batch], ["cka"])


def test_fig5_dots_are_heads_and_the_line_is_their_mean():
    statistics = np.arange(12.0).reshape(3, 2, 2) ** 2  # 3 layers; distance, entropy; 2 heads
    figure = analysis.draw_attention({"a": statistics, "b": statistics + 1})
    for k, axis in enumerate(figure.axes):
        mean, *heads = axis.lines[:3]
        assert mean.get_label() == "a"
        assert mean.get_xdata().tolist() == [1, 2, 3]
        assert mean.get_ydata().tolist() == statistics[:, k].mean(axis=1).tolist()
        assert [line.get_ydata().tolist() for line in heads] == statistics[:, k].T.tolist()
        assert {line.get_color() for line in heads} == {mean.get_color()}
    labels = [axis.get_ylabel() for axis in figure.axes]
    assert labels == ["distance in pixels", "entropy in nats"]


def test_photographs_are_seen_at_the_size_of_the_model(checkpoints, image_folder, tmp_path):
    settings = "--data", image_folder, "--batch-size", 6, "--out", tmp_path
    call(analysis, "cka", f"a={checkpoints / 'a.pt'}", "random", *settings)
    assert numbers(tmp_path, "cka")["about"] == f"18 validation images of {image_folder.name}"
    assert np.isfinite(numbers(tmp_path, "cka")["cka"]["random"]["a"]).all()


def write_log(folder, settings, **scalars):
    """A training run of two steps, of a script that has these settings."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings))
    entries = [{"step": step, "loss": 1 / step, **scalars, "lr": 0.1, "epoch": step / 2,
                "images_per_s": 9} for step in (1, 2)]
    (folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return str(folder)


def test_curves_show_every_scalar_of_every_script(tmp_path, capsys):
    first = write_log(tmp_path / "mae", {"mask_ratio": 0.75, "seed": 0})
    second = write_log(tmp_path / "mae-1", {"mask_ratio": 0.5, "seed": 1})
    other = write_log(tmp_path / "distill", {"teacher": "T", "mask_ratio": 0.75}, attention_loss=1)
    figure = analysis.draw_curves([first, other, second])
    panels = [(axis.get_ylabel(), [line.get_label() for line in axis.lines])
              for axis in figure.axes]
    assert sorted(panels) == [("attention_loss", [other]), ("loss", [other]),
                              ("loss", [first, second])]
    lines = [axis for axis in figure.axes if len(axis.lines) == 2][0].lines
    assert [line.get_xydata().tolist() for line in lines] == [[[0.5, 1], [1, 0.5]]] * 2
    assert lines[0].get_color() != lines[1].get_color()
    (tmp_path / "mae" / "config.json").unlink()  # the log is enough
    call(analysis, "curves", first, other, "--out", tmp_path)
    assert (tmp_path / "curves.png").exists()
    assert str(tmp_path / "curves.png") in capsys.readouterr().out


@pytest.mark.parametrize("arguments, complaint", [
    ("cka x=convnet.pt", "convnet.pt: no Vision Transformer"),
    ("cka a=a.pt a=b.pt", "each label once"),
    ("cka random a=a.pt", "random: give label=path (each label once), then maybe random"),
    ("cka a=a.pt odd=odd.pt", "different sizes, in pixels: [12, 16]"),
    ("fourier odd=odd.pt --images 4", "3 x 3 patches, odd: no frequency pi; use cka, attention"),
    ("cka a=a.pt --batch-size 3", "at least 4 images a batch, not 3 (--batch-size, --images)"),
    ("cka a=a.pt --images 0", "--images: invalid count value: '0'"),
    ("cka a=a.pt --reference b", "--reference b: not one of a"),
    ("cka a:x=a.pt", "a:x=a.pt: give label=path"),
    ("maps a=a.pt", "invalid choice: 'maps' (choose from"),
    ("curves absent", "absent/log.jsonl: no such file"),
])
def test_bad_input_gets_one_line(checkpoints, monkeypatch, capsys, arguments, complaint):
    monkeypatch.chdir(checkpoints)
    assert complaint in refused(capsys, analysis, *arguments.split())
