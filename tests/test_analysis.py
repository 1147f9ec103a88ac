"""analysis.py against the published numbers, closed forms, and what a reader may type."""
import csv
import itertools
import math

import numpy as np
import pytest
import torch
from conftest import GOLDENS, SIZES, agrees, call, fill, images, refused

import analysis
import vit


def normal(*shape, seed=0):
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape))


def cka_of(batches, n1, n2):
    cka = analysis.CKA(n1, n2)
    for features1, features2 in batches:
        cka.update(features1, features2)
    return cka


# ------------------------------------------------------------------------------------------------ layer similarity

def golden_features():
    """Per mini-batch the features of 3 and of 4 layers, drawn as the golden file says."""
    rng = np.random.RandomState(11)
    features1 = [[rng.standard_normal((16, 5, 8)) for _ in range(2)] for _ in range(3)]
    features2 = []
    for j in range(4):
        W = rng.standard_normal((8, 6))
        features2.append([features1[min(j, 2)][b] @ W + 0.5 * rng.standard_normal((16, 5, 6)) for b in range(2)])
    return [[[torch.from_numpy(layer[b]) for layer in model] for model in (features1, features2)] for b in range(2)]


def test_fig1_cka_is_the_published_one():
    golden = GOLDENS["8_cka"]
    cka = cka_of(golden_features(), 3, 4)
    agrees(cka.compute(), golden["mae_lite_cka_3x4"])
    agrees(cka.mean()[..., 0], golden["mean_hsic_KL"])
    agrees(cka.mean()[:, 0, 1], golden["mean_hsic_KK"])
    agrees(cka.mean()[0, :, 2], golden["mean_hsic_LL"])


def test_fig1_hsic_of_each_mini_batch_is_the_published_one():
    for b, batch in enumerate(golden_features()):
        agrees(cka_of([batch], 3, 4).mean()[..., 0], GOLDENS["8_cka"]["antixk"]["antixk_hsic_KL_batch_i_j"][b])


def test_fig1_hsic_is_the_estimator_of_song_et_al_written_out():
    K, L = (x @ x.T for x in (normal(9, 5), normal(9, 7, seed=1)))
    K, L, one, n = K.fill_diagonal_(0), L.fill_diagonal_(0), torch.ones(9, dtype=torch.float64), 9
    hsic = ((K @ L).trace() + (one @ K @ one) * (one @ L @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (one @ K @ L @ one)) / (n * (n - 3))
    agrees(cka_of([([normal(9, 5)], [normal(9, 7, seed=1)])], 1, 1).mean()[0, 0, 0], hsic.item(), 1e-12)


def test_fig1_cka_of_a_layer_with_itself_is_one():
    batches = [[normal(8, 3, 5, seed=b), normal(8, 4, seed=b + 9)] for b in range(3)]
    cka = cka_of([(batch, None) for batch in batches], 2, 2)
    agrees(cka.compute().diagonal(), [1.0, 1.0], 1e-12)
    assert cka.standard_error().diagonal().max() < 1e-6 < cka.standard_error()[0, 1]
    assert torch.equal(cka.compute(), cka_of(zip(batches, batches), 2, 2).compute())


def test_fig1_cka_does_not_see_rotation_scale_or_shift():
    x, y = normal(32, 10), normal(32, 10, seed=1)
    y = x[:, :6] @ y[:6] + y  # related to x
    orthogonal = torch.linalg.qr(normal(10, 10, seed=2))[0]
    other = normal(10, 10, seed=3)
    before, after, changed = (cka_of([([x], [z])], 1, 1).compute() for z in (y, 7 * y @ orthogonal + 3, y @ other))
    agrees(after, before.tolist(), 1e-10)
    assert (changed - before).abs() > 1e-3  # an arbitrary linear map it does see


def test_fig1_cka_of_unrelated_features_is_zero_on_average():
    batches = [([normal(8, 40, seed=b)], [normal(8, 30, seed=1000 + b)]) for b in range(200)]
    cka = cka_of(batches, 1, 1)
    assert abs(cka.compute()) < 2 * cka.standard_error() < 0.1
    biased = []  # the estimator without correction: far from 0 in mini-batches of 8
    for x, y in batches:
        K, L = ((z[0] - z[0].mean(0)) @ (z[0] - z[0].mean(0)).T for z in (x, y))
        biased.append((K * L).sum() / ((K * K).sum() * (L * L).sum()).sqrt())
    assert torch.stack(biased).mean() > 0.5


def test_fig1_small_mini_batches_estimate_what_one_full_batch_does():
    x = normal(512, 20)
    y = x @ normal(20, 20, seed=1) + 4 * normal(512, 20, seed=2)
    whole = cka_of([([x], [y])], 1, 1).compute().item()
    for size in (8, 32):
        cka = cka_of([([a], [b]) for a, b in zip(x.split(size), y.split(size))], 1, 1)
        assert abs(cka.compute().item() - whole) < 3 * cka.standard_error().item() < 0.1


def test_the_standard_error_is_the_spread_over_repetitions():
    W, estimates, errors = normal(6, 6, seed=1), [], []
    for trial in range(60):
        x = normal(12 * 16, 6, seed=2 + trial)
        y = x @ W + 2 * normal(12 * 16, 6, seed=500 + trial)
        cka = cka_of([([a], [b]) for a, b in zip(x.split(16), y.split(16))], 1, 1)
        estimates.append(cka.compute())
        errors.append(cka.standard_error())
    assert 0.7 < torch.stack(errors).mean() / torch.stack(estimates).std() < 1.3


def test_cka_keeps_sums_whatever_the_number_of_images():
    cka = analysis.CKA(2, 3)
    for b in range(5):
        cka.update((normal(6, 4, seed=b + i) for i in range(2)), (normal(6, 4, 2, seed=b + i) for i in range(3)))
    held = sum(v.numel() for v in vars(cka).values() if isinstance(v, torch.Tensor))
    assert held == 2 * 3 * (3 + 9) and all(v.dtype == torch.float64 for v in vars(cka).values() if isinstance(v, torch.Tensor))


def test_cka_refuses_what_the_estimator_is_not_defined_for():
    cka = analysis.CKA(1, 1)
    with pytest.raises(ValueError, match="at least 4 images, not 3"):
        cka.update([normal(3, 5)], [normal(3, 5)])
    with pytest.raises(ValueError, match="same images"):
        cka.update([normal(5, 5)], [normal(6, 5)])
    with pytest.raises(ValueError, match="got 2 and 1"):
        cka.update([normal(5, 5)] * 2, [normal(5, 5)])
    with pytest.raises(ValueError, match="no mini-batch"):
        cka.compute()


# ------------------------------------------------------------------------------------------------ features of a network

@pytest.fixture(scope="module")
def network():
    return fill(vit.VisionTransformer(**SIZES, num_classes=10, global_pool="avg")).eval()


@torch.no_grad()
def test_layer_by_layer_gives_the_published_hidden_states_scores_and_cka_features(network):
    golden = GOLDENS["2_attention"]
    states, scores = zip(*analysis.layer_by_layer(network, images(), return_scores=True))
    assert len(states) == len(golden["hidden_states"]) == 4 and scores[0] is None
    for layer, state in enumerate(states):
        agrees(state, golden["hidden_states"][layer])
        agrees(analysis.cka_features(network, layer, state), golden["rep_catcher_features"][layer])
    agrees(scores[1], golden["scores_first_block"])
    agrees(scores[3], golden["scores_last_block"])


@torch.no_grad()
def test_layer_by_layer_is_encode_and_leaves_the_fast_path_alone_unless_asked(network):
    _, extras = network.encode(network.embed(images()), hidden=True)
    walked = list(analysis.layer_by_layer(network, images()))
    assert all(scores is None for _, scores in walked)
    for (state, _), expected in zip(walked, extras.hidden, strict=True):
        assert torch.equal(state, expected)


def test_fig5_distance_and_entropy_of_a_network_are_the_published_ones(network):
    measured = analysis.measure({"a": network}, [images()], ("attention",))
    golden = GOLDENS["2_attention"]
    agrees(measured["distance"]["a"] * 14 / SIZES["patch_size"], golden["analyzer_mean_distance_layer_by_head_factor14"])
    agrees(measured["entropy"]["a"], golden["analyzer_mean_entropy_layer_by_head"], 2e-5)  # theirs adds 1e-6 in the log


def test_one_pass_measures_what_the_pieces_do(network):
    other = fill(vit.VisionTransformer(**{**SIZES, "depth": 2}, global_pool="token"), prefix="other.").eval()
    batches = list(images(12).split(4))
    measured = analysis.measure({"a": network, "b": other}, batches, ("cka", "fourier", "attention"))
    features = [[[analysis.cka_features(model, i, x) for i, (x, _) in enumerate(analysis.layer_by_layer(model, batch))]
                 for model in (network, other)] for batch in batches]
    with torch.no_grad():
        expected = cka_of(features, 4, 3)
        _, extras = other.encode(other.embed(torch.cat(batches)), hidden=True)
    agrees(measured["cka"].compute()[:4, 4:], expected.compute().tolist(), 1e-9)
    agrees(measured["cka"].standard_error()[:4, 4:], expected.standard_error().tolist(), 1e-6)
    agrees(measured["fourier"]["b"][1], analysis.fourier_log_amplitude(extras.hidden[1][:, 1:], 4).tolist(), 1e-9)
    assert measured["fourier"]["b"].shape == (3, 3) and measured["entropy"]["a"].shape == (3, 6)


# ------------------------------------------------------------------------------------------------ attention

def golden_scores():
    return 2 * normal(2, 3, 17, 17, seed=13)


def test_eq1_attention_distance_is_the_published_one():
    golden = GOLDENS["9_attn_stats"]
    agrees(golden_scores(), golden["input"])
    agrees(analysis.attention_distance(golden_scores(), 4, 16), golden["plain_factor16_distance_per_head"])
    agrees(analysis.attention_distance(golden_scores(), 4, 14), golden["official_mean_distance_per_head"])
    agrees(analysis.patch_distances(4, 14), golden["dist_matrix_official"])
    with pytest.raises(AssertionError):  # the class token dropped after the softmax is another number
        agrees(analysis.attention_distance(golden_scores(), 4, 16),
               golden["alt_softmax_with_cls_then_drop_not_renormalised"]["distance_factor16_per_head"])


def test_eq2_attention_entropy_is_the_published_one():
    agrees(analysis.attention_entropy(golden_scores()), GOLDENS["9_attn_stats"]["plain_no_eps_entropy_per_head"])


def test_eq1_distance_of_a_uniform_map_is_the_mean_distance_between_patches():
    distances = [math.dist(p, q) for p, q in itertools.product(itertools.product(range(6), repeat=2), repeat=2)]
    scores = torch.full((6, 3, 37, 37), 1.7, dtype=torch.float64)
    agrees(analysis.attention_distance(scores, 6, 16), [16 * sum(distances) / len(distances)] * 3, 1e-12)


def test_eq1_distance_of_an_identity_map_is_zero_and_of_a_shift_one_patch():
    identity = torch.full((1, 1, 17, 17), -1e4).masked_fill(torch.eye(17, dtype=bool), 1e4)
    assert analysis.attention_distance(identity, 4, 16).item() == 0
    swap = torch.arange(1, 17).view(4, 2, 2).flip(-1).flatten()  # each patch looks at its neighbour in the row
    scores = torch.full((1, 1, 17, 17), -1e4)
    scores[0, 0, torch.arange(1, 17), swap] = 1e4
    assert analysis.attention_distance(scores, 4, 16).item() == 16


def test_eq2_entropy_of_a_uniform_map_is_log_L_and_of_a_certain_one_zero():
    agrees(analysis.attention_entropy(torch.zeros(6, 3, 26, 26, dtype=torch.float64)), [math.log(25)] * 3, 1e-12)
    certain = torch.full((1, 2, 17, 17), -1e4).masked_fill(torch.eye(17, dtype=bool), 1e4)
    assert analysis.attention_entropy(certain).tolist() == [0, 0]


def test_distance_and_entropy_of_half_precision_scores_are_worked_out_in_float32():
    scores = golden_scores()
    for dtype in (torch.float16, torch.bfloat16):
        assert analysis.attention_entropy(scores.to(dtype)).dtype == torch.float32
        agrees(analysis.attention_entropy(scores.to(dtype)), analysis.attention_entropy(scores.to(dtype).double()).tolist(), 1e-4)
        agrees(analysis.attention_distance(scores.to(dtype), 4, 16),
               analysis.attention_distance(scores.to(dtype).double(), 4, 16).tolist(), 1e-4)


def test_attention_distance_refuses_another_grid():
    with pytest.raises(ValueError, match="17 tokens, but a grid of 5 x 5"):
        analysis.attention_distance(golden_scores(), 5, 16)


def test_rollout_of_uniform_attention_is_known_and_rows_sum_to_one(network):
    maps = torch.full((3, 1, 2, 5, 5), 1 / 5, dtype=torch.float64)
    expected = torch.eye(5, dtype=torch.float64) / 8 + 7 / 8 / 5  # after three blocks an eighth is still at home
    agrees(analysis.attention_rollout(maps)[0], expected.tolist(), 1e-12)
    agrees(analysis.attention_rollout(vit.attention_maps(network, images())).sum(-1), [[1.0] * 17] * 4, 1e-12)


def test_rollout_applies_the_first_block_first():
    first, second = (normal(1, 1, 4, 4, seed=s).softmax(-1) for s in (0, 1))
    mixed = [0.5 * block[0, 0] + 0.5 * torch.eye(4) for block in (first, second)]
    agrees(analysis.attention_rollout(torch.stack([first, second]))[0], (mixed[1] @ mixed[0]).tolist(), 1e-12)


# ------------------------------------------------------------------------------------------------ frequencies

@pytest.mark.parametrize("name, shape, grid", [("tokens_4x16x48", (4, 16, 48), 4), ("extra_tokens_2x196x192", (2, 196, 192), 14)])
def test_fig3_log_amplitude_is_the_published_one_and_reaches_pi(name, shape, grid):
    golden = GOLDENS["10_fourier"][name]
    tokens = normal(*shape, seed=17)
    agrees(tokens, golden["input"])
    amplitude = analysis.fourier_log_amplitude(tokens, grid)
    assert amplitude.shape == (grid // 2 + 1,)
    agrees(amplitude[:-1], golden["relative_log_amplitude_half_diagonal"])
    agrees(amplitude[-1], golden["alt_nyquist_minus_dc"])


def waves(grid, frequency):
    """A feature map that is one diagonal cosine, `(1, L, 2)`; frequency in steps of 2 pi / grid."""
    row, column = torch.meshgrid(*[torch.arange(grid, dtype=torch.float64)] * 2, indexing="ij")
    return torch.cos(2 * math.pi * frequency * (row + column) / grid).reshape(1, -1, 1).expand(-1, -1, 2)


def test_fig3_a_constant_map_is_all_at_zero_and_a_checkerboard_all_at_pi():
    constant = analysis.fourier_log_amplitude(torch.full((1, 64, 2), 3.0, dtype=torch.float64), 8)
    agrees(constant, [0] + [math.log(1e-6 / 192)] * 4, 1e-6)  # 192 = 3 * 64 at frequency 0, else the 1e-6 in the log
    board = analysis.fourier_log_amplitude(waves(8, 4), 8)
    assert board.argmax() == 4 and board[4] > 15 and board[1:4].abs().max() < 1e-6


def test_fig3_a_wave_is_at_its_own_frequency():
    for k in (1, 2, 3):
        assert analysis.fourier_log_amplitude(waves(8, k), 8).argmax() == k


def test_fig3_white_noise_is_flat():
    amplitude = analysis.fourier_log_amplitude(normal(500, 64, 20), 8)
    # 0 and pi are real, those between complex: the mean log modulus of a complex normal number is log(2) / 2 larger
    assert abs(amplitude[4]) < 0.03 and (amplitude[1:4] - math.log(2) / 2).abs().max() < 0.03


def test_fig3_refuses_an_odd_grid_that_has_no_pi():
    with pytest.raises(ValueError, match="even side, not 49 patches on a side of 7"):
        analysis.fourier_log_amplitude(normal(1, 49, 3), 7)


# ------------------------------------------------------------------------------------------------ the script

@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Three small networks of two sizes, as training leaves them."""
    root = tmp_path_factory.mktemp("models")
    for i, (name, size) in enumerate({"one": 16, "two": 16, "large": 32}.items()):
        torch.manual_seed(i)
        model = vit.VisionTransformer(size, 4, embed_dim=24, depth=2, num_heads=12, num_classes=10)
        (root / "runs" / name).mkdir(parents=True)
        torch.save({"model": model.state_dict(), "step": 1}, root / "runs" / name / "last.pt")
    torch.save({"model": {"conv.weight": torch.zeros(3)}}, root / "convnet.pt")
    return root


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_without_arguments_it_compares_what_is_in_runs_and_says_so(checkpoints, monkeypatch, capsys):
    monkeypatch.chdir(checkpoints)
    call(analysis, "--images", 24, "--batch-size", 8)
    said = capsys.readouterr().out
    assert "no models named: comparing what is in runs/: runs/large/last.pt, runs/one/last.pt, runs/two/last.pt" in said
    assert "left out (other sizes, or no room): one, two" in said
    assert {path.name for path in (checkpoints / "runs" / "analysis").iterdir()} == {
        *(f"{name}.{kind}" for name in ("cka", "fourier", "attention") for kind in ("png", "npz", "csv")), "maps.png", "all.png"}


def test_where_there_are_no_runs_an_untrained_network_meets_itself(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    call(analysis, "fourier", "--images", 16)
    assert "an untrained ViT is compared with itself" in capsys.readouterr().out
    assert np.load("runs/analysis/fourier.npz")["random amplitude"].shape == (7, 5)


def test_all_writes_figures_and_the_same_numbers_as_npz_and_csv(checkpoints, tmp_path, monkeypatch):
    monkeypatch.chdir(checkpoints)
    call(analysis, "all", "--images", 24, "--batch-size", 8, "--format", "pdf", "--shown", 1, "--out", tmp_path,
         "first=runs/one/last.pt", "runs/two/last.pt", "random")
    assert all((tmp_path / f"{name}.pdf").read_bytes().startswith(b"%PDF") for name in ("cka", "fourier", "attention", "maps", "all"))
    numbers, rows = np.load(tmp_path / "cka.npz"), rows_of(tmp_path / "cka.csv")
    assert numbers["cka"].shape == (9, 9) and list(numbers["model"]) == ["first"] * 3 + ["two"] * 3 + ["random"] * 3
    assert len(rows) == 9 * 10 / 2
    row = next(r for r in rows if (r["model"], r["layer"], r["other model"], r["other layer"]) == ("first", "1", "two", "2"))
    assert float(row["cka"]) == pytest.approx(numbers["cka"][1, 5], abs=1e-6)
    assert 0 < float(row["standard error"]) == pytest.approx(numbers["standard_error"][1, 5], abs=1e-6)
    attention, rows = np.load(tmp_path / "attention.npz"), rows_of(tmp_path / "attention.csv")
    assert attention["two distance"].shape == (2, 12) and len(rows) == 3 * 2 * 12
    assert float(rows[-1]["entropy (nats)"]) == pytest.approx(attention["random entropy"][-1, -1], abs=1e-6)
    fourier, rows = np.load(tmp_path / "fourier.npz"), rows_of(tmp_path / "fourier.csv")
    assert fourier["random amplitude"].shape == (3, 3) and [float(r["0 pi"]) for r in rows] == [0] * 9
    assert float(rows[-1]["1 pi"]) == pytest.approx(fourier["random amplitude"][2, 2], abs=1e-6)


def test_networks_of_other_sizes_are_compared_by_cka_alone(checkpoints, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(checkpoints)
    models = "runs/one/last.pt", "runs/large/last.pt"
    call(analysis, "cka", *models, "--images", 8, "--batch-size", 8, "--out", tmp_path)
    assert np.isfinite(np.load(tmp_path / "cka.npz")["cka"]).all()
    assert "one has 4 x 4 patches of 4 pixels, large has 8 x 8" in refused(capsys, analysis, "attention", *models)


@pytest.mark.parametrize("arguments, complaint", [
    ("cka convnet.pt", "model convnet: convnet.pt: holds no Vision Transformer"),
    ("cka absent.pt", "cannot be opened"),
    ("cka runs/one/last.pt --images 3", "3 images in mini-batches of --batch-size 32: the unbiased estimator needs at least 4"),
    ("cka runs/one/last.pt --images 9 --batch-size 4", "at least 4"),
    ("cka random --data absent", "--data absent: no such folder"),
    ("cka random random", "two models are called random"),
    ("cka random --heads 12 3", "2 numbers for 1 models"),
    ("cka runs/one/last.pt --heads 5", "model one: width 24 is not divisible by 5 heads"),
    ("maps random --layers 7", "the blocks of random are 1 to 6"),
    ("cka a=random b=random c=random d=random e=random f=random g=random h=random", "at most 7"),
])
def test_bad_input_gets_one_line(checkpoints, monkeypatch, capsys, arguments, complaint):
    monkeypatch.chdir(checkpoints)
    assert complaint in refused(capsys, analysis, *arguments.split())


def test_an_odd_grid_is_refused_at_the_door(tmp_path, capsys):
    torch.save({"model": vit.VisionTransformer(12, 4, embed_dim=24, depth=1).state_dict()}, tmp_path / "odd.pt")
    assert "odd has 3 x 3 patches of 4 pixels, and an odd grid has no frequency pi" in refused(
        capsys, analysis, "fourier", tmp_path / "odd.pt")


def test_a_folder_of_photographs_is_seen_at_the_size_of_the_model(checkpoints, image_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(checkpoints)
    call(analysis, "cka", "--data", image_folder, "runs/one/last.pt", "random", "--batch-size", 6, "--out", tmp_path)
    assert "18 held-out images" in capsys.readouterr().out
    assert np.isfinite(np.load(tmp_path / "cka.npz")["cka"]).all()


def test_a_damaged_checkpoint_is_named():
    model = vit.VisionTransformer(16, 4, embed_dim=24, depth=1)
    model.blocks[0].mlp.fc1.weight.data[0, 0] = math.nan
    with pytest.raises(analysis.BadInput, match="broken: its features are not finite"):
        analysis.measure({"broken": model}, [images(4, 16, torch.float32)], ("cka",))
