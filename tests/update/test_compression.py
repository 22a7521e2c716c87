"""Packed updates: rounding, what an error costs, and files of strangers."""

import dataclasses
import gc
import itertools
import math
import weakref

import pytest
import torch
from helpers.federation import quiet_trainer
from oracles import merge as oracle
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_fedfisher import (
    BudgetError,
    ClientUpdate,
    FisherMergeModule,
    UpdateError,
    extract_curvature,
)
from lightning_fedfisher.curvature.convolution import ConvolutionKronecker
from lightning_fedfisher.curvature.dense import Dense
from lightning_fedfisher.curvature.diagonal import Diagonal
from lightning_fedfisher.curvature.embedding import EmbeddingEigenKronecker, EmbeddingKronecker
from lightning_fedfisher.curvature.input_gram import InputGram
from lightning_fedfisher.curvature.kronecker import (
    EigenKronecker,
    Kronecker,
    TransposedEigenKronecker,
    TransposedKronecker,
)
from lightning_fedfisher.curvature.registry import KINDS
from lightning_fedfisher.update import compression, decompression
from lightning_fedfisher.update.compression import Compression
from lightning_fedfisher.update.decompression import restore

SHAPE = (3, 4)


def _normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _factor(size, seed=0, samples=None):
    rows = _normal(samples or 2 * size, size, seed=seed)
    return rows.mT @ rows / len(rows)


# What an error costs


def _make(kind):
    rows, columns = SHAPE
    values = _normal(rows, columns, seed=3).abs()
    made = {
        "diagonal": lambda: Diagonal(values),
        "kronecker": lambda: Kronecker(_factor(rows, 1), _factor(columns, 2)),
        "transposed_kronecker": lambda: TransposedKronecker(_factor(rows, 1), _factor(columns, 2)),
        "embedding_kronecker": lambda: EmbeddingKronecker(values[:, 0], _factor(columns, 2)),
        "ekfac": lambda: EigenKronecker(
            torch.linalg.qr(_normal(rows, rows))[0],
            torch.linalg.qr(_normal(columns, columns))[0],
            values,
        ),
        "transposed_ekfac": lambda: TransposedEigenKronecker(
            torch.linalg.qr(_normal(rows, rows))[0],
            torch.linalg.qr(_normal(columns, columns))[0],
            values,
        ),
        "embedding_ekfac": lambda: EmbeddingEigenKronecker(
            torch.linalg.qr(_normal(columns, columns))[0].contiguous(), values
        ),
        "input_gram": lambda: InputGram(_factor(columns, 4), rows),
        "convolution_kronecker": lambda: ConvolutionKronecker(
            _factor(rows, 4), _factor(columns // 2, 4), _factor(2, 4), has_bias=columns % 2 == 1
        ),
        "dense": lambda: Dense(_factor(rows * columns, 4), SHAPE),
    }
    return made[kind]()


def _dense_root(kind, roots):
    """``F^(1/2)`` from the roots of the tensors, written out."""
    eye = torch.eye(SHAPE[0], dtype=torch.float64)
    if kind == "diagonal":
        return torch.diag(roots["values"].flatten())
    if kind == "dense":
        return roots["matrix"]
    if kind == "input_gram":
        return torch.kron(eye, roots["column_factor"])
    if kind in ("kronecker", "transposed_kronecker"):
        return torch.kron(roots["row_factor"], roots["column_factor"])
    if kind == "convolution_kronecker":
        columns = torch.kron(roots["channel_factor"], roots["kernel_factor"])
        bias = torch.ones([SHAPE[1] % 2] * 2, dtype=torch.float64)
        return torch.kron(roots["row_factor"], torch.block_diag(columns, bias))
    if kind == "embedding_kronecker":
        return torch.kron(torch.diag(roots["row_values"]), roots["column_factor"])
    basis = torch.kron(roots.get("row_basis", eye), roots["column_basis"])
    return basis @ torch.diag(roots["spectrum"].flatten()) @ basis.mT


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "identity"])
def test_sensitivities_are_those_of_the_root(kind):
    curvature = _make(kind)
    roots = {
        name: oracle.root(tensor)
        if curvature.tensor_roles[name] == "factor"
        else tensor.sqrt()
        if curvature.tensor_roles[name] == "values"
        else tensor
        for name, tensor in curvature.tensors().items()
    }
    dense = torch.linalg.norm(_dense_root(kind, roots).mT @ _dense_root(kind, roots))
    torch.testing.assert_close(dense, torch.linalg.norm(curvature.dense()))
    found = curvature.sensitivities()
    assert found.keys() == curvature.tensor_roles.keys() == roots.keys()
    for name, root in roots.items():
        moved = torch.func.jacrev(lambda part, n=name: _dense_root(kind, {**roots, n: part}))(root)
        expected = float(moved.square().sum()) / root.numel()
        assert found[name] == pytest.approx(expected, rel=1e-9)


# Rounding and fitting


class _Net(nn.Module):
    def __init__(self, wide=96):
        super().__init__()
        self.embed = nn.Embedding(40, 24)
        self.conv = nn.Conv1d(24, 32, 3)
        self.norm = nn.BatchNorm1d(32)
        self.hidden = nn.Linear(64, wide)
        self.scale = nn.Parameter(torch.ones(wide))
        self.head = nn.Linear(wide, 5)

    def forward(self, x):
        features = self.norm(self.conv(self.embed(x).mT)).relu().flatten(1)
        return self.head(self.hidden(features).relu() * self.scale)


def _update(kind="kfac", seed=0, model=None):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 30, (120, 4), generator=generator)  # some tokens are never seen
    data = TensorDataset(x, torch.randint(0, 5, (120,), generator=generator))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model or _Net()
    extracted = extract_curvature(
        model.eval(), DataLoader(data, batch_size=30), kind, max_samples=None, progress=False
    )
    return ClientUpdate.from_model(model, extracted.header(), extracted.blocks)


@pytest.fixture(scope="module")
def update():
    return _update()


@pytest.fixture
def granted(monkeypatch):
    """Without the bytes that every update may have: the tests' networks are small."""
    monkeypatch.setattr("lightning_fedfisher.update.upload_budget._SMALLEST_BUDGET", 0)


@pytest.mark.parametrize("budget", [0.6, 0.8, 1.0, 1.5, 2.0])
def test_the_file_fits(update, budget, granted, tmp_path):
    path = update.compressed(budget).save(tmp_path / "client.safetensors")
    assert 0.97 * budget < path.stat().st_size / update.fedavg_bytes <= budget
    opened = ClientUpdate.open(path)
    opened.verify()
    assert opened.specs == update.specs
    assert opened.fedavg_bytes == update.fedavg_bytes
    for name, buffer in update.buffers.items():
        assert torch.equal(opened.buffers[name], buffer)


def _distance(update, other):
    """Squared error in the merge's terms: of the weights, and of the curvature's roots."""
    total = 0.0
    for layer in update.layers:
        if math.prod(layer.shape) > 1000:  # to be quick
            continue
        weights = update.weights(layer).double()
        root = oracle.root(oracle.written_out(update.block(layer)))
        moved = oracle.root(oracle.written_out(other.block(layer))) - root
        error = (other.weights(layer).double() - weights).flatten()
        total += float((root @ error).square().sum())
        total += float(moved.square().sum() * weights.square().mean())
    return total


@pytest.mark.parametrize("kind", ["kfac", "ekfac", "diagonal"])
def test_a_larger_budget_comes_closer(kind, granted):
    small = _update(kind, model=_Net(24))
    plain = {"kfac": 2.8, "ekfac": 6.0, "diagonal": 2.0}[kind]
    budgets = [plain * part for part in (0.25, 0.35, 0.5, 0.7)]
    found = [_distance(small, small.compressed(budget)) for budget in budgets]
    assert all(later < 0.7 * earlier for earlier, later in itertools.pairwise(found))


def test_bits_go_where_errors_cost(granted, monkeypatch):
    """At one size, the allotment beats equal steps relative to each tensor's own spread."""
    small = _update(model=_Net(24))
    chosen = _distance(small, small.compressed(1.5))
    original = Compression.__init__

    def equal(self, *arguments):
        original(self, *arguments)
        self._parts = [
            dataclasses.replace(part, cost=1 / max(float(part.entries.square().mean()), 1e-30))
            for part in self._parts
        ]
        self._useless = 1.0

    monkeypatch.setattr(Compression, "__init__", equal)
    assert chosen < 0.5 * _distance(small, small.compressed(1.5))


def test_bytes_are_deterministic_and_packed_files_are_kept(update, granted, tmp_path):
    paths = [update.compressed(0.8).save(tmp_path / f"{n}.safetensors") for n in range(2)]
    again = ClientUpdate.open(paths[0]).save(tmp_path / "again.safetensors")
    assert paths[0].read_bytes() == paths[1].read_bytes() == again.read_bytes()


def test_what_fits_is_left_alone(update):
    assert update.compressed(100.0) is update
    tiny = ClientUpdate(*_alone(_factor(6).float()))
    assert tiny.compressed(0.01) is tiny  # within the bytes granted


@pytest.mark.parametrize("budget", [0.0, -1.0, math.nan, math.inf])
def test_senseless_budgets_are_refused(update, budget):
    with pytest.raises(ValueError, match="upload_budget must be greater than 0"):
        update.compressed(budget)


def test_too_small_a_budget_is_refused_with_what_it_takes(update, granted):
    with pytest.raises(BudgetError, match=r"upload_budget=0\.2.*at least \d+ bytes.*Raise it"):
        update.compressed(0.2)


def test_indefinite_factors_are_all_refused_by_name(update):
    blocks = update.blocks
    for name in ("hidden", "head"):
        block = blocks[name]
        blocks[name] = dataclasses.replace(block, row_factor=-block.row_factor)
    bad = ClientUpdate(
        update.header,
        {
            **{f"parameters/{n}": t for n, t in update.parameters.items()},
            **{f"buffers/{n}": t for n, t in update.buffers.items()},
            **{f"curvature/{n}/{p}": t for n, b in blocks.items() for p, t in b.tensors().items()},
        },
    )
    with pytest.raises(UpdateError, match="curvature/head/row_factor is not positive") as refused:
        bad.compressed(1.0)
    assert refused.value.offenders == tuple(
        f"curvature/{name}/row_factor is not positive semi-definite" for name in ("hidden", "head")
    )


def test_factors_stay_symmetric_positive_semidefinite_and_zero_where_they_were(update, granted):
    packed = update.compressed(0.6)
    for name, block in packed.blocks.items():
        for part, tensor in block.tensors().items():
            if block.tensor_roles[part] != "factor":
                continue
            assert torch.equal(tensor, tensor.mT)
            values = torch.linalg.eigvalsh(tensor.double())
            assert values[0] >= -1e-6 * values[-1]
            before = update.blocks[name].tensors()[part]
            dead = before.diagonal() == 0
            assert not tensor[dead].any()
            assert float(tensor.trace()) == pytest.approx(float(before.trace()), rel=0.2)
    tokens = update.blocks["embed"].row_values == 0
    assert tokens.any()
    assert not packed.blocks["embed"].row_values[tokens].any()


def test_a_singular_factor_keeps_its_zeros():
    factor = torch.zeros(6, 6)
    factor[1:4, 1:4] = _factor(3).float()
    root = Compression(*_alone(factor), 10**6)
    packed, payloads = root.fit(10**6)
    name = "curvature/layer/column_factor"
    found = restore(payloads[name], packed[name], (6, 6), "factor")
    torch.testing.assert_close(found, factor, rtol=1e-4, atol=1e-6)
    assert not found[0].any()
    assert not found[4:].any()


def _alone(factor):
    """Header and tensors of one layer with the given input factor."""
    size = len(factor)
    model = nn.Sequential()
    model.layer = nn.Linear(size, 2, bias=False)
    data = TensorDataset(torch.rand(8, size), torch.randint(0, 2, (8,)))
    extracted = extract_curvature(model, DataLoader(data), max_samples=None, progress=False)
    tensors = {
        "parameters/layer.weight": _normal(2, size).float(),
        "curvature/layer/row_factor": _factor(2).float(),
        "curvature/layer/column_factor": factor,
    }
    return extracted.header(), tensors


# Fewer entries where bits are few


def _wide_update(size=400):
    header, tensors = _alone(_factor(size, samples=size // 2).float())
    return ClientUpdate(header, tensors)


def test_a_wide_layer_of_few_outputs_sends_a_narrow_root_of_the_same_trace(granted):
    wide = _wide_update()
    packed = wide.compressed(4.0)
    how = packed.header.quantized["curvature/layer/column_factor"]
    assert 0 < how.rank < 100
    assert how.tail > 0
    before, after = (u.block(u.layers[0]).column_factor for u in (wide, packed))
    assert float(after.trace()) == pytest.approx(float(before.trace()), rel=0.05)
    values = torch.linalg.eigvalsh(before.double())
    found = torch.linalg.eigvalsh(after.double())
    torch.testing.assert_close(found[-5:], values[-5:], rtol=0.1, atol=0)


# In a merge


def _merged(updates, root, method="fedfisher"):
    module = FisherMergeModule(updates, method=method)
    quiet_trainer(root, max_epochs=-1).fit(module)
    return module.merged_state_dict()


METHODS_OF_KINDS = [
    ("identity", "fedavg", 1.5),
    ("diagonal", "fedfisher", 1.8),
    ("kfac", "fedfisher", 3.0),
    ("kfac", "regmean", 3.0),
    ("input_gram", "regmean", 2.5),
    ("ekfac", "fedfisher", 4.0),
]


@pytest.mark.parametrize(("kind", "method", "budget"), METHODS_OF_KINDS)
def test_packed_updates_merge_as_plain_ones(kind, method, budget, granted, tmp_path):
    plain = [_update(kind, seed, _Net(24)) for seed in range(2)]
    expected = _merged(plain, tmp_path, method)
    packed = [update.compressed(budget) for update in plain]
    if kind != "identity":
        assert all(update.header.quantized for update in packed)
    files = [update.save(tmp_path / f"{n}.safetensors") for n, update in enumerate(packed)]
    in_memory, from_files = _merged(packed, tmp_path, method), _merged(files, tmp_path, method)
    mixed = _merged([plain[0], files[1]], tmp_path, method)
    for name, tensor in expected.items():
        assert torch.equal(in_memory[name], from_files[name])
        if tensor.is_floating_point():
            for found in (in_memory, mixed):
                torch.testing.assert_close(found[name], tensor, rtol=0.02, atol=2e-3)


# What it costs


def _counted(monkeypatch, module, name):
    """Counts the calls of a function."""
    calls, original = [], getattr(module, name)

    def counting(*arguments, **options):
        calls.append(arguments)
        return original(*arguments, **options)

    monkeypatch.setattr(module, name, counting)
    return calls


@pytest.mark.parametrize("budget", [0.6, 1.0, 1.5])
def test_tensors_are_rooted_once_and_coded_twice_at_most(budget, update, granted, monkeypatch):
    rooted = _counted(monkeypatch, compression, "factor_root")
    coded = _counted(monkeypatch, compression, "encode")
    sized = _counted(monkeypatch, compression, "encoded_size")
    decomposed = _counted(monkeypatch, torch.linalg, "cholesky_ex")
    packed = update.compressed(budget)
    parts, factors = packed.header.quantized, [arguments[0] for arguments in rooted]
    assert len(factors) == sum(name.endswith("factor") for name in parts)
    assert len(factors) <= len(decomposed) <= 3 * len(factors)
    assert len(parts) <= len(coded) <= 2 * len(parts)
    assert len(sized) <= 6 * len(parts)


def test_tensors_are_decoded_once_for_each_use(update, granted, monkeypatch, tmp_path):
    opened = ClientUpdate.open(update.compressed(0.8).save(tmp_path / "client.safetensors"))
    decoded = _counted(monkeypatch, decompression, "decode")
    restored = _counted(monkeypatch, decompression, "matrix_of_root")
    opened.verify()
    assert len(decoded) == len(opened.header.quantized)
    assert not restored  # to check a root takes no matrix
    decoded.clear()
    for layer in opened.layers:
        opened.weights(layer), opened.block(layer)
    assert len(decoded) == len(opened.header.quantized)
    decoded.clear()
    assert len(opened.parameters) == len(decoded)


def test_the_memory_of_what_is_consumed_is_free(monkeypatch):
    header, tensors = _alone(_factor(40, samples=100).float())
    expected = ClientUpdate(header, dict(tensors)).compressed(0.9)
    consumed = ClientUpdate(header, dict(tensors))
    factors = [weakref.ref(t) for n, t in tensors.items() if n.endswith("factor")]
    alive, encoded = [], compression.encode

    def noting(numbers):
        alive.extend(factor() for factor in factors if factor() is not None)
        return encoded(numbers)

    monkeypatch.setattr(compression, "encode", noting)
    del tensors
    gc.collect()
    packed = consumed.compressed(0.9, consume=True)
    assert len(factors) == 2
    assert not alive  # when the first tensor is coded
    assert packed.digest == expected.digest


def test_weights_are_not_copied_and_roots_are_no_larger_than_they_are_sent(update, granted):
    tensors = update._tensors
    held = Compression(update.header, dict(tensors), 10**6)._parts
    assert {part.name for part in held} == {n for n in tensors if not n.startswith("buffers/")}
    for part in held:
        tensor = tensors[part.name]
        assert part.entries.dtype == tensor.dtype == torch.float32
        if part.name.startswith("parameters/"):
            assert part.entries.data_ptr() == tensor.data_ptr()
        elif part.name.endswith("factor"):
            assert part.entries.untyped_storage().nbytes() <= 2 * tensor.shape[0] * (
                tensor.shape[0] + 1
            )


def test_threads_change_no_byte(update, granted, monkeypatch):
    alone = update.compressed(0.8)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    together = update.compressed(0.8)
    assert together.header == alone.header
    assert together.digests == alone.digests


# Files of strangers


def test_a_forged_payload_is_refused_with_file_and_tensor(update, granted, tmp_path):
    packed = update.compressed(0.8)
    tensors = dict(packed._tensors)
    name = "curvature/head/column_factor"
    tensors[name] = tensors[name][:-3].clone()
    path = ClientUpdate(packed.header, tensors).save(tmp_path / "client.safetensors")
    opened = ClientUpdate.open(path)
    head = next(layer for layer in opened.layers if layer.name == "head")
    for look in (opened.verify, lambda: opened.block(head)):
        with pytest.raises(UpdateError, match=f"{path}(.|\n)*{name} cannot be unpacked"):
            look()


HEADERS = [
    (lambda p: {**p, "parameters/nothing": p["parameters/head.bias"]}, "packed and unknown"),
    (lambda p: {n: how for n, how in p.items() if n != "parameters/head.bias"}, "should be"),
]


@pytest.mark.parametrize(("change", "reason"), HEADERS)
def test_a_header_must_tell_exactly_what_is_packed(change, reason, update, granted):
    packed = update.compressed(0.8)
    header = dataclasses.replace(packed.header, quantized=change(packed.header.quantized))
    with pytest.raises(UpdateError, match=reason):
        ClientUpdate(header, packed._tensors)
