"""What the papers prove, against our kernels: closed forms of the population loss and of the expected coarse gradients,
by Monte-Carlo, and coarse gradient descent to a loss of exactly zero.

The model of Yin et al. 2019 (arXiv 1903.05662): y = v' 1{Z w > 0}, rows of Z standard Gaussian, half the squared
difference to the same of (v*, w*). With 1 bit and alpha = 1, qrelu is 1{x > 0}.
"""

from __future__ import annotations

import csv
import json
import math

import pytest
import torch

import coarsegrad as cg
from coarsegrad.__main__ import main
from coarsegrad.experiments import synthetic

SAMPLES, ROWS, DIM = 200_000, 5, 4
ROOT_2PI = math.sqrt(2 * math.pi)


@pytest.fixture(autouse=True)
def one_thread():
    """The tensors are small: more threads would wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def teacher_and_student(seed):
    """(v, w, v*, w*), the ws of length 1, float64."""
    generator = torch.Generator().manual_seed(seed)
    v, v_star = (torch.randn(ROWS, generator=generator, dtype=torch.float64) for _ in range(2))
    w, w_star = (torch.randn(DIM, generator=generator, dtype=torch.float64) for _ in range(2))
    return v, w / w.norm(), v_star, w_star / w_star.norm()


def angle(w, w_star):
    return torch.arccos((w @ w_star / (w.norm() * w_star.norm())).clamp(-1, 1))


def closed_loss(v, w, v_star, w_star):
    """With the 1/2 of the squared difference: E[1{a > 0} 1{b > 0}] is 1/4, or (pi - t) / 2 pi in the same row."""
    ones = torch.ones(ROWS, ROWS, dtype=torch.float64)
    eye, t = torch.eye(ROWS, dtype=torch.float64), angle(w, w_star)
    cross = (1 - 2 * t / math.pi) * eye + ones
    return (v @ (eye + ones) @ v - 2 * v @ cross @ v_star + v_star @ (eye + ones) @ v_star) / 8


def closed_gradient(ste, v, w, v_star, w_star):
    unit = w / w.norm()
    if ste == "identity":
        return (v @ v * unit - v @ v_star * w_star) / ROOT_2PI
    h = v @ v + v.sum() ** 2 - v.sum() * v_star.sum() + v @ v_star
    n = unit + w_star
    turned = n / n.norm() if n.norm() > 1e-9 else torch.zeros_like(n)  # at t = pi, where its factor is 0 too
    return h / (2 * ROOT_2PI) * unit - torch.cos(angle(w, w_star) / 2) * (v @ v_star) / ROOT_2PI * turned


def monte_carlo(ste, v, w, v_star, w_star, seed=0):
    """((mean, its standard error) of the loss, and of the coarse gradient of w), by qrelu and its backward."""
    z = torch.randn(SAMPLES, ROWS, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    target = cg.qrelu(z @ w_star, 1.0, 1) @ v_star
    each = w.expand(SAMPLES, DIM).clone().requires_grad_()  # a gradient for each sample
    losses = (cg.qrelu(torch.einsum("nrd,nd->nr", z, each), 1.0, 1, ste=ste) @ v - target) ** 2 / 2
    (gradients,) = torch.autograd.grad(losses.sum(), each)
    return [(t.mean(0), t.std(0) / math.sqrt(SAMPLES)) for t in (losses.detach(), gradients)]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("ste", ["identity", "relu"])
def test_population_loss_and_expected_coarse_gradient(ste, seed):
    """Within 5 standard errors in every coordinate."""
    model = teacher_and_student(seed)
    (loss, loss_error), (gradient, gradient_error) = monte_carlo(ste, *model, seed=seed)
    assert (loss - closed_loss(*model)).abs() < 5 * loss_error
    assert ((gradient - closed_gradient(ste, *model)).abs() < 5 * gradient_error).all()


def test_the_closed_forms_are_told_apart():
    """The error bars are small enough: the one form is not within them of the other's mean."""
    model = teacher_and_student(0)
    _, (gradient, error) = monte_carlo("relu", *model)
    assert ((gradient - closed_gradient("identity", *model)).abs() > 20 * error).any()


@pytest.mark.parametrize("ste", ["identity", "relu"])
def test_the_expected_coarse_gradient_points_uphill(ste):
    """Its inner product with the gradient of the population loss is positive: a small step against it descends."""
    for seed in range(200):
        v, w, v_star, w_star = teacher_and_student(seed)
        w.requires_grad_()
        (true,) = torch.autograd.grad(closed_loss(v, w, v_star, w_star), w)
        assert closed_gradient(ste, v, w.detach(), v_star, w_star) @ true > 0


def test_relu_rests_at_the_spurious_minimum_and_identity_does_not():
    """At w = -w*, v = (I + 11')^-1 (11' - I) v*, a local minimum of the loss, relu's expected coarse gradient is
    zero. Identity's is not: descent by it does not stay at a minimum."""
    _, _, v_star, w_star = teacher_and_student(1)
    ones, eye = torch.ones(ROWS, ROWS, dtype=torch.float64), torch.eye(ROWS, dtype=torch.float64)
    v = torch.linalg.solve(eye + ones, (ones - eye) @ v_star)
    minimum = (v, -w_star, v_star, w_star)
    assert closed_gradient("relu", *minimum).norm() < 1e-9
    assert closed_gradient("identity", *minimum).norm() > 1e-2
    for ste, still in (("relu", True), ("identity", False)):
        _, (gradient, error) = monte_carlo(ste, *minimum)
        assert bool((gradient.abs() < 5 * error).all()) == still


# ---------------------------------------------------------------------------------- subspace data


def test_subspaces_have_the_angle_asked_for():
    for classes, dim, degrees in ((2, 2, 90.0), (2, 3, 30.0), (4, 2, 60.0)):
        bases = synthetic.subspaces(classes, dim, degrees)
        for i in range(classes):
            assert torch.allclose(bases[i] @ bases[i].T, torch.eye(dim, dtype=torch.float64), atol=1e-12)
            for j in range(i):
                cosines = torch.linalg.svdvals(bases[i] @ bases[j].T)
                assert torch.allclose(cosines, torch.full((dim,), math.cos(math.radians(degrees)), dtype=torch.float64))
        assert torch.linalg.matrix_rank(bases.flatten(0, 1)) == classes * dim


def test_samples_lie_in_their_subspace_with_the_norms_asked_for():
    data = synthetic.Data(classes=3, dim=2, samples=20, angle=50.0, norms=(0.5, 1.0))
    x, y = synthetic.sample(data, 0)
    again, _ = synthetic.sample(data, 0)
    other, _ = synthetic.sample(data, 1)
    assert torch.equal(x, again) and not torch.equal(x, other)
    assert y.tolist() == [0] * 20 + [1] * 20 + [2] * 20
    half, _ = synthetic.sample(synthetic.Data(samples=500, half=True), 0)
    first = torch.stack([half[:500] @ synthetic.subspaces(2, 2, 90.0)[0, 0].float(),
                         half[500:] @ synthetic.subspaces(2, 2, 90.0)[1, 0].float()])  # fmt: skip
    assert (first >= 0.28 * half.norm(dim=-1).view(2, 500)).all()
    norms = x.norm(dim=-1)
    assert (norms > 0.499).all() and (norms < 1.001).all()
    for i, basis in enumerate(synthetic.subspaces(3, 2, 50.0).float()):
        mine = x[y == i]
        assert torch.allclose(mine @ basis.T @ basis, mine, atol=1e-6)


def test_the_coarse_gradient_is_the_papers():
    """-(v[y, j] - v[m, j]) g'(<w_j, x>) x, and zero where there is no loss; written out sample by sample."""
    data = synthetic.Data(classes=3, dim=2, samples=6)
    x, y = synthetic.sample(data, 0)
    weight = torch.randn(9, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    o = synthetic.outputs(x, weight, 3, 0.5, 2, "reverse_exponential")
    losses = torch.relu(1 - synthetic.margins(o, y))
    (got,) = torch.autograd.grad(losses.sum(), weight)
    want = torch.zeros_like(got)
    for n in range(len(y)):
        others = [o[n, i].item() if i != y[n] else -math.inf for i in range(3)]
        m = others.index(max(others))
        if o[n, y[n]] - o[n, m] >= 1:
            continue
        for j in range(9):
            u = (weight[j] @ x[n] / 0.5).item()
            slope = math.exp(-u / 3) if u > 0 else 0.0
            want[j] -= ((j % 3 == y[n]).item() - (j % 3 == m)) * slope * x[n]
    assert 0 < (losses > 0).sum() < len(losses), "samples with and without loss"
    assert torch.allclose(got, want.detach(), atol=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("ste", [ste.name for ste in cg.stes().values() if ste.in_class])
def test_descent_reaches_exactly_zero_loss(ste, bits):
    runs, curve = synthetic.train(synthetic.Setting(ste, bits, 32, 90.0), synthetic.Data(), 20, 5000, 0.1, 1.5)
    assert all(run.iterations is not None and run.loss == 0.0 and run.accuracy == 1.0 for run in runs), runs
    assert curve[0] > 0.1 and curve[-1] == 0.0


def test_identity_does_not():
    runs, _ = synthetic.train(synthetic.Setting("identity", 2, 32, 90.0), synthetic.Data(), 20, 1000, 0.1, 1.5)
    assert all(run.iterations is None and run.loss > 0.1 for run in runs)


def test_one_bit_fails_on_symmetric_data_and_not_on_half_of_it():
    """A neuron fires on exactly one of x and -x: over both, a class's neurons count the same whatever the class."""
    setting, data = synthetic.Setting("relu", 1, 64, 90.0), synthetic.Data()
    x, y = synthetic.sample(data, 0)
    weight = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    both = synthetic.outputs(x, weight, 2, 1.5, 1, "relu") + synthetic.outputs(-x, weight, 2, 1.5, 1, "relu")
    assert torch.equal(both, torch.full_like(both, 32 * 1.5))
    symmetric = torch.cat([x, -x]), torch.cat([y, y])
    margin = synthetic.margins(synthetic.outputs(symmetric[0], weight, 2, 1.5, 1, "relu"), symmetric[1])
    assert (margin > 0).double().mean() <= 0.5, "of x and -x at most one is right"
    runs, _ = synthetic.train(setting, synthetic.Data(half=True), 20, 5000, 0.1, 1.5)
    assert all(run.loss == 0.0 and run.accuracy == 1.0 for run in runs)


# ----------------------------------------------------------------------------------------- the command


@pytest.fixture
def command(capsys):
    """command(folder, arguments...): (what it printed, its error's message or None)."""

    def run(folder, *arguments):
        failed = None
        try:
            main(["synthetic", "--out", str(folder), *arguments])
        except SystemExit as error:
            failed = str(error.code)
        printed = capsys.readouterr()
        return printed.out, failed and failed + printed.err

    return run


SMALL = ("--stes", "relu", "identity", "--bits", "2", "--hidden", "16", "--angles", "90", "60", "--seeds", "3",
         "--iterations", "800", "--samples", "10")  # fmt: skip


def test_the_command_writes_its_results_and_goes_on_from_them(command, tmp_path):
    printed, failed = command(tmp_path, *SMALL)
    assert not failed and "3/3" in printed and "0/3" in printed
    for name in ("neurons.png", "angles.png", "loss.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader((tmp_path / "runs.csv").open()))
    assert len(rows) == 2 * 2 * 3
    assert {row["iterations"] == "" for row in rows if row["ste"] == "identity"} == {True}
    assert all(float(row["loss"]) == 0 and float(row["accuracy"]) == 1 for row in rows if row["ste"] == "relu")
    # What is there is not computed again, and what is missing is.
    kept = json.loads((tmp_path / "results.json").read_text())
    kept["results"] = kept["results"][:-1]
    kept["results"][0]["runs"][0]["iterations"] = 12345
    (tmp_path / "results.json").write_text(json.dumps(kept))
    assert command(tmp_path, *SMALL)[1] is None
    again = list(csv.DictReader((tmp_path / "runs.csv").open()))
    assert again[0]["iterations"] == "12345" and again[1:] == rows[1:]


def test_the_command_refuses_what_it_cannot_do(command, tmp_path):
    for arguments, message in (
        (("--angles", "0"), "must be in (0, 90] degrees"),
        (("--classes", "1"), "--classes must be at least 2"),
        (("--classes", "20"), "--hidden must be at least the number of classes, 20, got 8"),
        (("--seeds", "0"), "positive int"),
        (("--stes", "none"), "invalid choice"),
    ):
        assert message in command(tmp_path, *arguments)[1]
    assert command(tmp_path, *SMALL)[1] is None
    assert "has lr 0.1, wanted 0.2; choose another --out" in command(tmp_path, *SMALL, "--lr", "0.2")[1]
    (tmp_path / "results.json").write_text("{")
    assert "is not a results file of this command" in command(tmp_path, *SMALL)[1]
