"""Our merge by its formulas: dense matrices in float64, and none of the package's algebra."""

from __future__ import annotations

import math

import torch

DAMPING, LINEAR_DAMPING, INPUTS_POWER = 0.01, 0.1, 0.7  # of the default method
OVER_OUTPUTS = {
    "kronecker": "row_factor",
    "convolution_kronecker": "row_factor",
    "embedding_kronecker": "column_factor",
}
HOLD_INPUTS = ("input_gram", "kronecker", "convolution_kronecker", "ekfac")


def written_out(block, damping=0.0):
    """The operator by what its tensors mean, on weights row by row; its outputs' factor damped."""
    tensors = {name: tensor.double().clone() for name, tensor in block.tensors().items()}
    if damping and block.kind in OVER_OUTPUTS:
        factor = tensors[OVER_OUTPUTS[block.kind]]
        seen = factor.diagonal() > 0
        factor += damping * factor.diagonal()[seen].mean() * torch.diag(seen.double())
    rows = torch.eye(block.shape[0]).double()
    if block.kind == "identity":
        return torch.eye(math.prod(block.shape)).double()
    if block.kind == "input_gram":
        return torch.kron(rows, tensors["column_factor"])
    if block.kind == "kronecker":
        return torch.kron(tensors["row_factor"], tensors["column_factor"])
    if block.kind == "convolution_kronecker":
        columns = torch.kron(tensors["channel_factor"], tensors["kernel_factor"])
        bias = torch.eye(block.shape[1] - len(columns)).double()
        return torch.kron(tensors["row_factor"], torch.block_diag(columns, bias))
    if block.kind == "embedding_kronecker":
        return torch.kron(torch.diag(tensors["row_values"]), tensors["column_factor"])
    if block.kind in ("ekfac", "embedding_ekfac"):
        outputs = tensors.get("row_basis", rows)
        basis = torch.kron(outputs.contiguous(), tensors["column_basis"].contiguous())
        return (basis * tensors["spectrum"].flatten()) @ basis.mT
    if block.kind == "diagonal":
        return torch.diag(tensors["values"].flatten())
    return tensors["matrix"]


def over_outputs(dense, shape):
    """What is left of an operator if all inputs of an output count the same."""
    rows, columns = shape
    outputs = torch.einsum("iaja->ij", dense.view(rows, columns, rows, columns))
    return torch.kron(outputs / columns, torch.eye(columns).double())


def moments_of(dense, shape):
    """Second moments of the inputs, up to a scale, which nothing depends on."""
    rows, columns = shape
    return torch.einsum("iaib->ab", dense.view(rows, columns, rows, columns))


def raised(dense, block, is_linear):
    """The root of an operator, and of inputs another power."""
    found = root(dense)
    if is_linear and block.kind in ("kronecker", "input_gram"):
        values, basis = torch.linalg.eigh(block.column_factor.double())
        values = torch.where(values > 1e-6 * values.max(), values, 0.0)
        more = (basis * values ** (INPUTS_POWER - 0.5)) @ basis.mT  # zero eigenvalues are gone
        found = found @ torch.kron(torch.eye(block.shape[0]).double(), more)
    return found


def root(dense):
    values, basis = torch.linalg.eigh(dense)
    values = torch.where(values > 1e-6 * values.max(), values, 0.0)
    return (basis * values.sqrt()) @ basis.mT


def rectified(one, two, moments):
    """``E[relu(one z) relu(two z)']`` for a normal ``z`` of such moments, entry by entry."""
    found = torch.zeros(len(one), len(two)).double()
    for i, w in enumerate(one):
        for j, v in enumerate(two):
            a, b = math.sqrt(max(0, w @ moments @ w)), math.sqrt(max(0, v @ moments @ v))
            if a * b > 0:
                angle = math.acos(max(-1.0, min(1.0, float(w @ moments @ v) / (a * b))))
                arc = math.sin(angle) + (math.pi - angle) * math.cos(angle)
                found[i, j] = a * b * arc / (2 * math.pi)
    return found


def regression(across, among):
    """From what is known to what is asked for, with a tenth of the eigenvalues' sum as a ridge."""
    same = torch.eye(len(among)).double()
    ridge = torch.linalg.eigvalsh(among).sum() / 10 * same
    return (across + ridge) @ torch.linalg.inv(among + ridge)


def maps(client, merged, moments, activation):
    """``T`` from the merged model's units to the client's, and ``S`` back."""

    def second(one, two):
        return rectified(one, two, moments) if activation == "relu" else one @ moments @ two.mT

    across = second(client, merged)
    return (
        regression(across, second(merged, merged)),
        regression(across.mT, second(client, client)),
    )


def wide(units, layer):
    """A map between units as one of a layer's columns: of their blocks, and not of the bias."""
    columns = layer.shape[1]
    has_bias = len(layer.parameters) == 2
    positions = (columns - has_bias) // len(units)
    blocks = torch.kron(units.contiguous(), torch.eye(positions).double())
    return torch.block_diag(blocks, torch.eye(int(has_bias)).double())


def _is_aligned(header, name):
    """Whether a layer reads another and both hold their inputs' moments."""
    source = header.fed_by.get(name)
    return bool(source) and {header.kinds[name], header.kinds[source.layer]} <= set(HOLD_INPUTS)


def _carried(clients, name, merged):
    """What each client's inputs have become: the layer's maps ``T`` and ``S``, written out."""
    header = clients[0].header
    layers = {layer.name: layer for layer in header.layers}
    layer, source = layers[name], header.fed_by.get(name)
    same = torch.eye(layer.shape[1]).double()
    if not _is_aligned(header, name):
        return [(same, same)] * len(clients)
    before, found = layers[source.layer], []
    earlier = _carried(clients, source.layer, merged)
    for client, (there, back) in zip(clients, earlier, strict=True):
        moments = moments_of(written_out(client.block(before)), before.shape)
        weights, solved = client.weights(before).double() @ there, merged[source.layer].double()
        units = maps(weights, solved, back @ moments @ back.mT, source.activation)
        found.append(tuple(wide(each, layer) for each in units))
    return found


def quadratic(clients, name, merged, aligns=True):
    """Shares, weights and dense curvature of one layer, given the merged ones it depends on."""
    header = clients[0].header
    layer = next(layer for layer in header.layers if layer.name == name)
    shares = [client.num_samples**0.5 for client in clients]
    weights, curvatures = [], []
    same = torch.eye(layer.shape[1]).double()
    carried = _carried(clients, name, merged) if aligns else [(same, same)] * len(clients)
    for client, (there, back) in zip(clients, carried, strict=True):
        is_head, aligned = name == header.output_layer, aligns and _is_aligned(header, name)
        block = client.block(layer)
        is_linear = len(layer.parameters[0][1]) == 2 and not (is_head or aligned)
        damping = LINEAR_DAMPING if is_linear else DAMPING
        dense = written_out(block, 0.0 if is_head else damping)
        if is_head and aligned:
            dense = over_outputs(dense, layer.shape)
        change = torch.kron(torch.eye(layer.shape[0]).double(), back)
        weights.append(client.weights(layer).double() @ there)
        curvatures.append(change @ raised(dense, block, is_linear) @ change.mT)
    return [share / sum(shares) for share in shares], weights, curvatures


def minimiser(shares, weights, curvatures):
    """Of the minimisers, the one nearest to the average, and the average."""
    start = sum(p * w for p, w in zip(shares, weights, strict=True))
    system = sum(p * f for p, f in zip(shares, curvatures, strict=True))
    right = sum(
        p * f @ (w - start).flatten() for p, w, f in zip(shares, weights, curvatures, strict=True)
    )
    move = torch.linalg.pinv(system, rtol=1e-3, hermitian=True) @ right
    return start + move.view(start.shape), start


def fedfisher(clients, aligns=True):
    """The merged matrix of every layer, and where each started."""
    sources = clients[0].header.fed_by
    merged, starts = {}, {}

    def solve(name):
        if name not in merged:
            if aligns and name in sources:
                solve(sources[name].layer)
            problem = quadratic(clients, name, merged, aligns)
            merged[name], starts[name] = minimiser(*problem)

    for layer in clients[0].layers:
        solve(layer.name)
    return merged, starts
