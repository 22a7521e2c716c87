"""The table of methods: what each row accepts, makes of curvature, and ends in."""

import copy
import pickle
import re
from dataclasses import replace
from functools import partial
from itertools import product

import pytest
import torch
from helpers.merging import OF_NETWORKS, small_classifier, small_data, update_of
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_fedfisher import extract_curvature
from lightning_fedfisher.curvature.base import Identity
from lightning_fedfisher.curvature.dense import Dense
from lightning_fedfisher.curvature.diagonal import Diagonal
from lightning_fedfisher.curvature.embedding import EmbeddingEigenKronecker, EmbeddingKronecker
from lightning_fedfisher.curvature.input_gram import InputGram
from lightning_fedfisher.curvature.kronecker import EigenKronecker, Kronecker
from lightning_fedfisher.extraction.fisher_types import FISHER_TYPES
from lightning_fedfisher.extraction.layer_report import CURVATURE_TYPES
from lightning_fedfisher.merge.layer_loader import LayerLoader
from lightning_fedfisher.merge.methods import METHODS, find_method
from lightning_fedfisher.merge.objective import Quadratic
from lightning_fedfisher.merge.solvers import exact_solver
from lightning_fedfisher.update.header import LeastSquaresFit, UpdateHeader

PUBLISHED = ("fedfisher_diag", "fedfisher_kfac")
ACCEPTED = {
    "fedavg": {
        *(("identity", ""), ("input_gram", "")),
        *product(("diagonal", "kfac", "ekfac", "dense"), FISHER_TYPES),
    },
    "fisher_merge": set(product(("diagonal",), FISHER_TYPES)),
    "regmean": {("input_gram", ""), *product(("kfac",), FISHER_TYPES)},
    "fedfisher_diag": {("diagonal", "exact")},
    "fedfisher_kfac": {("kfac", "exact")},
    "fedfisher": {
        ("input_gram", ""),
        *product(("kfac", "ekfac", "diagonal", "dense"), FISHER_TYPES),
    },
    "closed_form_head": set(),  # of updates without a fit
}
CPU = torch.device("cpu")
UPDATES = [
    *(("identity", ""), ("input_gram", "")),
    *product(("diagonal", "kfac", "ekfac", "dense"), FISHER_TYPES),
]


def _header(curvature, fisher, fit=None):
    kinds = {"w": "input_gram"} if fit else {}
    return UpdateHeader(*(1, curvature, fisher, "categorical", 1, (), kinds), fit=fit)


def _factor(size, seed):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(size, 3 * size, generator=generator, dtype=torch.float64)
    return root @ root.mT / (3 * size)


def _curvatures(seed=0):
    values = _factor(6, seed + 1).diagonal().reshape(2, 3)
    return {
        "diagonal": Diagonal(values),
        "input_gram": InputGram(_factor(3, seed + 3), rows=2),
        "kronecker": Kronecker(_factor(2, seed + 2), _factor(3, seed + 3)),
        "ekfac": EigenKronecker(
            torch.linalg.eigh(_factor(2, seed + 2))[1],
            torch.linalg.eigh(_factor(3, seed + 3))[1],
            values.flip(0),
        ),
        "embedding_kronecker": EmbeddingKronecker(values[:, 0], _factor(3, seed + 3)),
        "embedding_ekfac": EmbeddingEigenKronecker(
            torch.linalg.eigh(_factor(3, seed + 3))[1], values.flip(1)
        ),
        "dense": Dense(_factor(6, seed + 4), (2, 3)),
    }


def _merge(method, kind, shares=(3, 1)):
    """Clients, and what a method makes of them when it runs as the server runs it."""
    generator = torch.Generator().manual_seed(9)
    weights = [torch.randn(2, 3, generator=generator, dtype=torch.float64) for _ in shares]
    curvatures = [_curvatures(seed)[kind] for seed in (10, 20)]
    row = METHODS[method]
    problem = Quadratic(shares, weights, [row.transformed(curvature) for curvature in curvatures])
    solver = row.solver(problem)
    solver.advance(row.max_iterations)
    return weights, curvatures, solver


def test_every_name_has_a_row():
    assert all(row.name == name for name, row in METHODS.items())
    assert METHODS.keys() == ACCEPTED.keys()


def test_the_table_below_covers_every_update():
    assert {curvature for curvature, _ in UPDATES} == set(CURVATURE_TYPES)


@pytest.mark.parametrize(("curvature", "fisher"), UPDATES)
@pytest.mark.parametrize("method", METHODS)
def test_methods_refuse_what_they_are_not_defined_for(method, curvature, fisher):
    refusal = METHODS[method].refusal(_header(curvature, fisher))
    assert (refusal is None) == ((curvature, fisher) in ACCEPTED[method])


@pytest.mark.parametrize(
    ("method", "curvature", "fisher", "refusal"),
    [
        (
            "fisher_merge",
            "identity",
            "",
            "holds identity curvature: extract it with "
            "FedFisherCallback(curvature='diagonal', ...)",
        ),
        (
            "fedfisher",
            "identity",
            "",
            "holds identity curvature: extract it with FedFisherCallback(curvature='kfac', ...)",
        ),
        (
            "fedfisher_kfac",
            "diagonal",
            "normalised",
            "holds diagonal curvature: extract it with FedFisherCallback(curvature='kfac', ...)",
        ),
        (
            "fedfisher_kfac",
            "kfac",
            "normalised",
            "holds the normalised Fisher: extract it with FedFisherCallback(fisher='exact', ...)",
        ),
        (
            "fedfisher_diag",
            "diagonal",
            "mc",
            "holds the mc Fisher: extract it with FedFisherCallback(fisher='exact', ...)",
        ),
    ],
)
def test_a_refusal_says_what_to_extract(method, curvature, fisher, refusal):
    assert METHODS[method].refusal(_header(curvature, fisher)) == refusal


@pytest.mark.parametrize(("curvature", "fisher"), UPDATES)
@pytest.mark.parametrize("method", OF_NETWORKS)
def test_following_the_remedies_leads_to_an_accepted_update(method, curvature, fisher):
    row, options = METHODS[method], {"curvature": curvature, "fisher": fisher or "exact"}
    for _ in range(2):
        if refusal := row.refusal(_header(**options)):
            name, value = re.search(r"\((\w+)='(\w+)', \.\.\.\)", refusal).groups()
            assert options[name] != value
            options[name] = value
    assert row.refusal(_header(**options)) is None


def test_fits_are_merged_as_they_are_or_not_at_all():
    fit = _header("input_gram", "", fit=LeastSquaresFit(0.5, 1.0))
    accepted = {name for name, row in METHODS.items() if row.refusal(fit) is None}
    assert accepted == {"closed_form_head", "regmean", "fedavg"}
    assert "merge it by method='closed_form_head'" in METHODS["fedfisher"].refusal(fit)
    told = METHODS["closed_form_head"].refusal(_header("input_gram", ""))
    assert "FedFisherCallback(closed_form_head=True)" in told


@pytest.mark.parametrize("kind", _curvatures())
def test_fedavg_forgets_the_curvature(kind):
    curvature = _curvatures()[kind]
    forgotten = METHODS["fedavg"].transformed(curvature)
    assert isinstance(forgotten, Identity)
    assert forgotten.shape == curvature.shape
    weights, _, solver = _merge("fedavg", kind)
    assert solver.finished
    torch.testing.assert_close(solver.weights, (3 * weights[0] + weights[1]) / 4)


def _damped(curvature):
    """What the default makes of a curvature before its root, written out."""
    outputs = {"kronecker": "row_factor", "embedding_kronecker": "column_factor"}
    if (name := outputs.get(curvature.kind)) is None:
        return curvature.dense()
    factor = curvature.tensors()[name]
    more = factor + 0.01 * factor.trace() / len(factor) * torch.eye(len(factor)).double()
    return curvature.with_tensors({name: more}).dense()


@pytest.mark.parametrize("kind", _curvatures())
def test_fedfisher_takes_the_square_root_with_a_damped_factor_over_the_outputs(kind):
    curvature = _curvatures()[kind]
    root = METHODS["fedfisher"].transformed(curvature)
    assert type(root) is type(curvature)
    torch.testing.assert_close(root.dense() @ root.dense(), _damped(curvature))
    assert float((root.dense() - curvature.dense()).norm()) > 0.1
    assert torch.linalg.eigvalsh(root.dense()).min() > 0


@pytest.mark.parametrize("kind", _curvatures())
def test_inputs_of_linear_layers_have_a_power_of_their_own(kind):
    row = replace(METHODS["fedfisher"], name="own", damping=0)
    curvature = _curvatures()[kind]
    plain, found = row.transformed(curvature), row.transformed(curvature, is_linear=True)
    if kind not in ("kronecker", "input_gram"):
        torch.testing.assert_close(found.dense(), plain.dense(), rtol=0, atol=0)
        return
    values, basis = torch.linalg.eigh(curvature.column_factor)
    more = torch.kron(torch.eye(2).double(), (basis * values**0.2) @ basis.mT)
    torch.testing.assert_close(found.dense(), plain.dense() @ more)
    assert float((found.dense() - plain.dense()).norm()) > 0.01


def test_linear_layers_are_damped_ten_times_as_much():
    method = METHODS["fedfisher"]
    assert method.powers(damps=True, is_linear=False) == (0.5, 0.01, None)
    assert method.powers(damps=True, is_linear=True) == pytest.approx((0.5, 0.1, 0.7))
    assert method.powers(damps=False, is_linear=True) == (0.5, 0.0, 0.7)
    curvature = _curvatures()["kronecker"]
    row = replace(method, name="own", linear_damping=1.0, damping=0.1)
    there, here = (m.transformed(curvature, is_linear=True) for m in (method, row))
    torch.testing.assert_close(there.dense(), here.dense())
    less = replace(method, name="own", linear_damping=1.0).transformed(curvature, is_linear=True)
    assert float((there.dense() - less.dense()).norm()) > 0.01


@pytest.mark.parametrize("change", [{"power": 0.5}, {"inputs_power": 0.5}])
def test_a_fit_is_merged_by_its_own_curvature_alone(change):
    header = _header("input_gram", "", LeastSquaresFit(0.5, 1.0))
    assert METHODS["closed_form_head"].refusal(header) is None
    changed = replace(METHODS["closed_form_head"], name="own", **change)
    assert "no power of its curvature" in changed.refusal(header)


@pytest.mark.parametrize("power", [0, -1.0, float("nan")])
def test_a_power_of_the_inputs_that_is_none_is_refused(power):
    with pytest.raises(ValueError, match="must be greater than 0"):
        replace(METHODS["fedfisher"], name="own", inputs_power=power)


@pytest.mark.parametrize("kind", _curvatures())
@pytest.mark.parametrize("method", ["fisher_merge", *PUBLISHED])
def test_published_methods_leave_the_curvature_as_it_is(method, kind):
    curvature = _curvatures()[kind]
    assert METHODS[method].transformed(curvature) is curvature


@pytest.mark.parametrize("kind", _curvatures())
def test_fedfisher_ends_in_the_minimum_of_the_square_roots(kind):
    weights, curvatures, solver = _merge("fedfisher", kind)
    assert solver.finished
    roots = []
    for curvature in curvatures:
        values, basis = torch.linalg.eigh(_damped(curvature))
        roots.append((basis * values.sqrt()) @ basis.mT)
    right = 3 * roots[0] @ weights[0].flatten() + roots[1] @ weights[1].flatten()
    expected = torch.linalg.solve(3 * roots[0] + roots[1], right).view(2, 3)
    torch.testing.assert_close(solver.weights, expected, rtol=0, atol=1e-3)
    assert float((solver.weights - solver.problem.average).norm()) > 0.05


def test_fisher_merge_is_weighted_by_the_diagonal():
    weights, curvatures, solver = _merge("fisher_merge", "diagonal")
    first, second = 3 * curvatures[0].values, curvatures[1].values
    expected = (first * weights[0] + second * weights[1]) / (first + second)
    torch.testing.assert_close(solver.weights, expected)


@pytest.mark.parametrize(
    ("method", "kind", "damped"),
    [
        ("fedfisher_diag", "diagonal", lambda g: g.abs() + 0.01),
        ("fedfisher_kfac", "kronecker", lambda g: (g * g + 0.01).sqrt()),
    ],
)
def test_published_methods_take_the_authors_first_step(method, kind, damped):
    _, _, done = _merge(method, kind)
    assert done.iterations == METHODS[method].max_iterations == 2000
    assert METHODS[method].steps_per_epoch == 100
    solver = METHODS[method].solver(done.problem)
    gradient = done.problem.gradient(done.problem.average)
    solver.advance(1)
    step = done.problem.average - 0.01 * gradient / damped(gradient)
    torch.testing.assert_close(solver.weights, step, rtol=1e-12, atol=1e-12)


def test_only_ours_aligns():
    assert {name for name, row in METHODS.items() if row.aligns} == {"fedfisher"}


def test_only_the_published_methods_keep_their_best_iterate():
    assert {name for name, row in METHODS.items() if row.keeps_best} == set(PUBLISHED)


@pytest.mark.parametrize("method", METHODS)
def test_an_epoch_is_a_part_of_the_steps(method):
    row = METHODS[method]
    assert 1 <= row.steps_per_epoch <= row.max_iterations
    assert row.max_iterations % row.steps_per_epoch == 0


# Of clients that were extracted: the output layer, and RegMean


def _blocks(model, data, kind, fisher="normalised", **options):
    """Hidden and output layer, by the extraction."""
    loader = DataLoader(data, batch_size=10)
    options = {"fisher": fisher, "max_samples": None, "progress": False} | options
    return extract_curvature(model, loader, kind, **options).blocks


def _written_out(curvature):
    """The operator by what its tensors mean, in float64."""
    tensors = {name: tensor.double() for name, tensor in curvature.tensors().items()}
    if isinstance(curvature, Kronecker):
        return torch.kron(tensors["row_factor"], tensors["column_factor"])
    if isinstance(curvature, EigenKronecker):
        basis = torch.kron(tensors["row_basis"].contiguous(), tensors["column_basis"].contiguous())
        return (basis * tensors["spectrum"].flatten()) @ basis.mT
    if isinstance(curvature, Diagonal):
        return torch.diag(tensors["values"].flatten())
    return tensors["matrix"]


@pytest.mark.parametrize("kind", ["kfac", "ekfac", "dense"])
def test_fedfisher_weighs_the_output_layer_by_its_outputs_alone(kind):
    head = _blocks(small_classifier(), small_data(), kind)["2"]
    found = METHODS["fedfisher"].transformed(head, True, damps=False)
    assert type(found) is type(head)
    dense = _written_out(head)
    outputs = torch.einsum("iaja->ij", dense.view(3, 5, 3, 5)) / 5
    values, basis = torch.linalg.eigh(outputs)
    assert float(values[0] / values[-1]) < 1e-5
    root = (basis * values.clamp_min(0).sqrt()) @ basis.mT
    expected = torch.kron(root, torch.eye(5).double())
    # The root of what rounding leaves of a zero.
    assert float((_written_out(found) - expected).abs().max()) < 2e-3 * float(expected.max())
    undamped = replace(METHODS["fedfisher"], name="own", damping=0.0)
    plain = _written_out(undamped.transformed(head))
    assert float((plain - expected).norm() / expected.norm()) > 0.05


@pytest.mark.parametrize("method", [name for name in METHODS if name != "fedfisher"])
def test_other_methods_know_no_output_layer(method):
    for curvature in _curvatures().values():
        here, there = (METHODS[method].transformed(curvature, head) for head in (True, False))
        assert type(here) is type(there)
        torch.testing.assert_close(here.dense(), there.dense(), rtol=0, atol=0)


class _Mixed(nn.Module):
    """A convolution, weights without inputs, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(2, 3, 3, stride=2, padding=1)
        self.norm = nn.GroupNorm(1, 3)
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        hidden = self.norm(self.convolution(x)).tanh()
        return self.head(hidden.flatten(1))


def test_regmean_is_its_closed_form_over_unfolded_inputs():
    row, updates, grams = METHODS["regmean"], [], []
    samples = (60, 20)
    for client, size in enumerate(samples):
        generator = torch.Generator().manual_seed(client)
        data = TensorDataset(
            torch.randn(size, 2, 4, 4, generator=generator) + client,
            torch.randint(0, 3, (size,), generator=generator),
        )
        with torch.random.fork_rng():
            torch.manual_seed(client)
            model = _Mixed()
        updates.append(update_of(model, data, "kfac"))
        assert updates[-1].num_samples == size
        x = data.tensors[0].double()
        model = model.double()
        patches = functional.unfold(x, 3, padding=1, stride=2).mT.flatten(0, 1)
        hidden = model.norm(model.convolution(x)).tanh().flatten(1).detach()
        inputs = {"convolution": patches, "head": hidden}
        with_ones = {n: torch.cat([i, torch.ones(len(i), 1)], dim=1) for n, i in inputs.items()}
        grams.append({name: i.mT @ i for name, i in with_ones.items()})
    problems = LayerLoader(updates, row, 2**30)
    for index, layer in enumerate(updates[0].layers):
        solver = row.solver(problems.read(index, CPU, []).problem)
        solver.advance(row.max_iterations)
        assert solver.finished
        weights = [update.weights(layer).double() for update in updates]
        average = (60 * weights[0] + 20 * weights[1]) / 80
        if layer.name == "norm":
            expected = average
        else:
            # (sum_k X_k' X_k)^-1 sum_k X_k' X_k W_k', theorem 1 of Jin et al., 2023.
            gram = [client[layer.name] for client in grams]
            right = sum(g @ w.mT for g, w in zip(gram, weights, strict=True))
            expected = torch.linalg.solve(sum(gram), right).mT
            assert float((expected - average).norm()) > 0.1
        error = float((solver.weights.double() - expected).norm())
        assert error < (1e-6 if layer.name == "norm" else 1e-2) * float(expected.norm())


def test_regmean_weighs_the_rows_of_an_embedding_by_how_often_they_are_read():
    row, updates, counts = METHODS["regmean"], [], []
    for client, size in enumerate((40, 20)):
        generator = torch.Generator().manual_seed(client)
        tokens = torch.randint(0, 5 - client, (size, 3), generator=generator)
        with torch.random.fork_rng():
            torch.manual_seed(client)
            model = nn.Sequential(nn.Embedding(6, 4), nn.Flatten(), nn.Linear(12, 3))
        data = TensorDataset(tokens, torch.randint(0, 3, (size,), generator=generator))
        updates.append(update_of(model, data, "kfac"))
        counts.append(torch.bincount(tokens.flatten(), minlength=6).double().unsqueeze(1))
    problem = LayerLoader(updates, row).read(0, CPU).problem
    solver = row.solver(problem)
    solver.advance(row.max_iterations)
    weights = [update.weights(update.layers[0]).double() for update in updates]
    above = counts[0] * weights[0] + counts[1] * weights[1]
    read = (counts[0] + counts[1] > 0).expand_as(above)
    assert not read[5].any()  # a token that nobody reads stays at the average
    expected = torch.where(
        read, above / (counts[0] + counts[1]), (40 * weights[0] + 20 * weights[1]) / 60
    )
    torch.testing.assert_close(solver.weights.double(), expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("curvature", ["kfac", "ekfac"])
def test_regmean_of_a_transposed_convolution_weighs_its_rows_by_their_inputs(curvature):
    row = replace(METHODS["regmean"], curvatures=("kfac", "ekfac"))
    updates, grams = [], []
    for client, size in enumerate((40, 20)):
        generator = torch.Generator().manual_seed(client)
        x = torch.randn(size, 2, 3, 3, generator=generator, dtype=torch.float64) + client
        with torch.random.fork_rng():
            torch.manual_seed(client)
            transposed = nn.ConvTranspose2d(2, 3, 1, bias=False)
            model = nn.Sequential(transposed, nn.Flatten(), nn.Linear(27, 3)).double()
        data = TensorDataset(x, torch.randint(0, 3, (size,), generator=generator))
        updates.append(update_of(model, data, curvature))
        pixels = x.movedim(1, 0).flatten(1)
        grams.append(pixels @ pixels.mT)
    problem = LayerLoader(updates, row).read(0, CPU).problem
    solver = row.solver(problem)
    solver.advance(row.max_iterations)
    weights = [update.weights(update.layers[0]) for update in updates]
    # A transposed convolution of one pixel is y = W' x, so the inputs multiply from the left.
    right = sum(g @ w for g, w in zip(grams, weights, strict=True))
    expected = torch.linalg.solve(sum(grams), right)
    close = 1e-3 if curvature == "kfac" else 0.5  # EKFAC's spectrum weighs inputs by gradients
    assert float((solver.weights - expected).norm()) < close * float(expected.norm())
    # Between the clients, not far beyond both.
    largest = max(float(w.abs().max()) for w in weights)
    assert float(solver.weights.abs().max()) < 3 * largest


@pytest.mark.parametrize("name", METHODS)
def test_a_row_from_another_process_is_the_same_method(name):
    again = pickle.loads(pickle.dumps(METHODS[name]))
    assert find_method(again).name == name
    assert find_method(copy.deepcopy(METHODS[name])).name == name


@pytest.mark.parametrize(
    "changes",
    [
        {"transform": lambda f: f},
        {"output_transform": None},
        {"power": 1.0},
        {"damping": 0.0},
        {"linear_damping": 1.0},
        {"solver": partial(exact_solver, rcond=1e-2)},
        {"client_weight_power": 1.0},
        {"aligns": False},
        {"curvatures": ("kfac",)},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_changes_the_result_takes_a_name_of_its_own(changes):
    (field,) = changes
    with pytest.raises(ValueError, match=f"another {field} than 'fedfisher' needs a name"):
        find_method(replace(METHODS["fedfisher"], **changes))
    assert find_method(replace(METHODS["fedfisher"], name="own", **changes)).name == "own"


@pytest.mark.parametrize("power", [0.0, -0.5, float("nan")])
def test_a_power_that_is_not_positive_is_refused(power):
    with pytest.raises(ValueError, match="greater than 0"):
        replace(METHODS["fedfisher"], name="own", power=power)


@pytest.mark.parametrize("times", [-0.1, float("nan"), float("inf")])
def test_a_linear_damping_that_is_negative_is_refused(times):
    with pytest.raises(ValueError, match="linear_damping must not be negative"):
        replace(METHODS["fedfisher"], name="own", linear_damping=times)


@pytest.mark.parametrize("damping", [-0.1, float("nan"), float("inf")])
def test_a_damping_that_is_negative_is_refused(damping):
    with pytest.raises(ValueError, match="damping must not be negative"):
        replace(METHODS["fedfisher"], name="own", damping=damping)


def test_options_of_a_merge_leave_the_name():
    adjusted = {"max_iterations": 3, "steps_per_epoch": 1, "keeps_best": True, "max_influence": 2.0}
    assert find_method(replace(METHODS["fedfisher"], **adjusted)).name == "fedfisher"
