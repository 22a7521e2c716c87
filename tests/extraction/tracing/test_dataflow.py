"""Whose outputs each layer reads, and which layer is the head: followed through forward passes."""

import itertools
import warnings

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_fedfisher import ClientUpdate, extract_curvature
from lightning_fedfisher.curvature.input_map import InputMap
from lightning_fedfisher.extraction.tracing.model_trace import ModelTracer
from lightning_fedfisher.layers import Source, find_layers


def survey(forward, modules, *shape):
    """What a forward pass of some samples shows; the modules are layers 0, 1, ..."""
    torch.manual_seed(0)
    model = nn.ModuleList(modules).eval()
    tracer = ModelTracer(model, find_layers(model))
    x = torch.randn(shape)
    with tracer.watch():
        logits = forward(model, x)
    return tracer.trace(logits)


def sources(*arguments):
    found = survey(*arguments).fed_by
    return {name: (source.layer, source.activation) for name, source in found.items()}


def between(*through):
    """Two linear layers, or convolutions of 4 x 4 maps, with functions in between."""

    def run(model, x):
        x = model[0](x)
        for function in through:
            x = (function.eval() if isinstance(function, nn.Module) else function)(x)
        return model[1](x).flatten(1)

    return run


def dense(inputs=6):
    return [nn.Linear(5, 6), nn.Linear(inputs, 3)]


def maps(*last):
    return [nn.Conv2d(2, 6, 3, padding=1), *(last or [nn.Conv2d(6, 3, 1)])]


RELU = {"1": ("0", "relu")}
SAME = {"1": ("0", "identity")}
POINTS, IMAGES = (4, 5), (4, 2, 4, 4)

# What is followed


@pytest.mark.parametrize(
    "relu",
    [
        nn.ReLU(),
        nn.ReLU(inplace=True),
        functional.relu,
        functional.relu_,
        torch.relu,
        torch.relu_,
        torch.Tensor.relu,
        torch.Tensor.relu_,
        lambda x: functional.relu(x, inplace=True),
        lambda x: functional.relu(input=x),
    ],
)
@pytest.mark.parametrize(("make", "shape"), [(dense, POINTS), (maps, IMAGES)])
def test_rectifiers_are_followed_in_every_form(relu, make, shape):
    assert sources(between(relu), make(), *shape) == RELU


@pytest.mark.parametrize(("make", "shape"), [(dense, POINTS), (maps, IMAGES)])
def test_a_layer_may_read_another_directly(make, shape):
    assert sources(between(), make(), *shape) == SAME


@pytest.mark.parametrize(
    "through",
    [
        [nn.ReLU(), nn.Dropout(0.5)],
        [nn.Dropout(0.5), nn.ReLU()],
        [nn.ReLU(), nn.ReLU()],
        [nn.ReLU(), nn.Dropout(0.5, inplace=True), nn.Identity()],
        [nn.ReLU(), torch.Tensor.contiguous],
        [nn.ReLU(), lambda x: x.view(x.shape), lambda x: x.reshape(x.shape)],
        [nn.ReLU(), lambda x: x.float()],  # returns the tensor it is given
    ],
)
@pytest.mark.parametrize(("make", "shape"), [(dense, POINTS), (maps, IMAGES)])
def test_what_changes_no_sample_is_passed_over(through, make, shape):
    assert sources(between(*through), make(), *shape) == RELU


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    "pool",
    [
        nn.MaxPool2d(2),
        nn.AvgPool2d(2),
        nn.AdaptiveAvgPool2d(2),
        nn.AdaptiveMaxPool2d(2),
        lambda x: functional.max_pool2d(x, 2),
        lambda x: functional.avg_pool2d(x, 2),
        lambda x: torch.max_pool2d(x, 2),
        nn.Dropout2d(),
    ],
)
def test_pools_are_passed_over(pool, first):
    through = [pool, nn.ReLU()] if first else [nn.ReLU(), pool]
    assert sources(between(*through), maps(), *IMAGES) == RELU


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("kind", ["Max", "Avg", "AdaptiveMax", "AdaptiveAvg"])
def test_pools_of_every_dimension_are_passed_over(kind, dimensions):
    pool = getattr(nn, f"{kind}Pool{dimensions}d")(2)
    convolution = getattr(nn, f"Conv{dimensions}d")
    modules = [convolution(2, 6, 1), convolution(6, 3, 1)]
    assert sources(between(pool), modules, 4, 2, *[4] * dimensions) == SAME


@pytest.mark.parametrize(
    "flatten",
    [
        nn.Flatten(),
        lambda x: x.flatten(1),
        lambda x: torch.flatten(x, 1),
        lambda x: x.view(len(x), -1),
        lambda x: x.view(-1, 96),
        lambda x: x.reshape(len(x), -1),
        lambda x: torch.reshape(x, (len(x), 96)),
    ],
)
def test_feature_maps_are_followed_through_flattening(flatten):
    modules = maps(nn.Linear(96, 3))
    assert sources(between(nn.ReLU(), flatten), modules, *IMAGES) == RELU
    assert sources(between(flatten, nn.ReLU(inplace=True)), modules, *IMAGES) == RELU


def test_linear_layers_over_positions_are_followed():
    assert sources(between(nn.ReLU()), dense(), 4, 7, 5) == RELU


def test_a_chain_is_followed_link_by_link():
    network = nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(),
        nn.Linear(54, 8),
        nn.Linear(8, 3),
    )
    seen = survey(lambda model, x: model[0](x), [network], 4, 2, 8, 8)
    assert seen.fed_by == {
        "0.3": Source("0.0", "relu"),
        "0.7": Source("0.3", "relu"),
        "0.8": Source("0.7", "identity"),
    }
    assert seen.output_layer == "0.8"


def test_two_layers_may_read_the_same_one():
    def forward(model, x):
        hidden = model[0](x)
        before = model[1](hidden)
        return before + model[2](hidden.relu())

    modules = [nn.Linear(5, 6), nn.Linear(6, 3), nn.Linear(6, 3)]
    assert sources(forward, modules, *POINTS) == {"1": ("0", "identity"), "2": ("0", "relu")}


def test_a_frozen_weight_between_layers_is_none_of_them():
    modules = [nn.Linear(5, 6), nn.Linear(6, 6).requires_grad_(False), nn.Linear(6, 3)]
    assert sources(lambda m, x: m[2](m[1](m[0](x))), modules, *POINTS) == {}


# What is not


@pytest.mark.parametrize(
    "function",
    [
        torch.tanh,
        functional.gelu,
        functional.leaky_relu,
        functional.relu6,
        functional.log_softmax,
        lambda x: 2 * x,
        lambda x: x - x.mean(),
        lambda x: torch.cat([x[:, :3], x[:, 3:]], 1),
        lambda x: x.flip(1),
        lambda x: x + x,
        lambda x: functional.layer_norm(x, (6,)),
        lambda x: x.t().t(),
        lambda x: functional.adaptive_avg_pool1d(x, 6),  # over the units
        lambda x: functional.max_pool1d(x, 3, 1, 1),
        lambda x: torch.stack([x, x], 1).flatten(1)[:, :6],
    ],
)
def test_what_mixes_or_bends_units_ends_the_chain(function):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*Implicit dimension choice")
        assert sources(between(function), dense(), *POINTS) == {}
        assert sources(between(nn.ReLU(), function), dense(), *POINTS) == {}


@pytest.mark.parametrize("change", ["mul_", "clamp_", "sub_"])
def test_a_change_in_place_ends_the_chain(change):
    assert sources(between(lambda x: getattr(x, change)(2)), dense(), *POINTS) == {}

    def forward(model, x):
        hidden = model[0](x)
        getattr(hidden, change)(2)  # what it returns is not what is read
        return model[1](hidden)

    assert sources(forward, dense(), *POINTS) == {}


@pytest.mark.parametrize(
    "function",
    [
        lambda x: functional.max_pool1d(x, 2),
        lambda x: functional.avg_pool2d(x, (1, 2)),
        lambda x: functional.adaptive_max_pool1d(x, 3),
    ],
)
def test_pools_over_units_end_the_chain(function):
    assert sources(between(function), dense(3), 4, 7, 5) == {}


def test_pools_over_channels_end_the_chain():
    pool = nn.MaxPool3d((2, 1, 1))
    assert sources(between(pool), maps(nn.Conv2d(3, 3, 1)), *IMAGES) == {}
    assert sources(between(nn.AvgPool3d((3, 1, 1), 1, (1, 0, 0))), maps(), *IMAGES) == {}


@pytest.mark.parametrize(
    "join",
    [
        lambda out, x: out + x,
        lambda out, x: out.add(x),
        lambda out, x: out.add_(x),
        lambda out, x: torch.cat([out, x], 1)[:, :6],
        lambda out, x: torch.maximum(out, x),
    ],
)
@pytest.mark.parametrize("relu", [False, True])
def test_residual_sums_end_the_chain(join, relu):
    def forward(model, x):
        skipped = model[0](x).tanh()
        out = join(model[1](skipped), skipped)
        return model[2](out.relu() if relu else out)

    modules = [nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)]
    assert sources(forward, modules, *POINTS) == {}


@pytest.mark.parametrize("relu", [False, True])
def test_a_residual_sum_in_place_ends_the_chain(relu):
    def forward(model, x):
        skipped = model[0](x).tanh()
        out = model[1](skipped)
        out += skipped
        return model[2](out.relu() if relu else out)

    modules = [nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)]
    assert sources(forward, modules, *POINTS) == {}


def test_a_tensor_changed_through_a_view_of_it_ends_the_chain():
    def forward(model, x):
        hidden = model[0](x)
        hidden.view(-1)[::2] *= 2
        return model[1](hidden)

    assert sources(forward, dense(), *POINTS) == {}


@pytest.mark.parametrize("relu", [False, True])
def test_normalisation_ends_the_chain(relu):
    modules = [nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)]
    after = torch.relu if relu else nn.Identity()
    assert sources(lambda m, x: m[2](after(m[1](m[0](x)))), modules, *POINTS) == {}


@pytest.mark.parametrize("again", [0, 1])
def test_layers_used_twice_are_neither_read_nor_readers(again):
    def forward(model, x):
        for index in (0, 1, 2):
            for _ in range(1 + (index == again)):
                x = model[index](x).relu()
        return model[3](x)

    modules = [nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)]
    expected = {"1": ("0", "relu"), "2": ("1", "relu"), "3": ("2", "relu")}
    spared = {k: v for k, v in expected.items() if str(again) not in (k, v[0])}
    assert sources(forward, modules, 4, 6) == spared


@pytest.mark.parametrize("odd", [nn.Conv2d(6, 6, 1, groups=2), nn.ConvTranspose2d(6, 6, 1)])
def test_grouped_and_transposed_convolutions_are_neither(odd):
    modules = [*maps(odd), nn.Conv2d(6, 3, 1)]
    forward = lambda m, x: m[2](m[1](m[0](x).relu()).relu()).flatten(1)  # noqa: E731
    assert sources(forward, modules, *IMAGES) == {}


def test_a_linear_layer_over_the_last_dimension_of_a_map_does_not_read_channels():
    modules = [nn.Conv2d(2, 4, 1), nn.Linear(4, 3)]  # as many positions as channels
    assert sources(between(nn.ReLU()), modules, *IMAGES) == {}


def test_a_convolution_does_not_read_a_linear_layers_positions():
    modules = [nn.Linear(5, 6), nn.Conv1d(6, 3, 1)]
    assert sources(between(nn.ReLU()), modules, 4, 6, 5) == {}
    assert sources(between(nn.ReLU(), lambda x: x.flatten(1)), dense(36), 4, 6, 5) == {}


@pytest.mark.parametrize("reshape", [lambda x: x.mT.flatten(1), lambda x: x.movedim(1, 2)])
def test_units_that_are_moved_end_the_chain(reshape):
    modules = [nn.Conv1d(2, 4, 1), nn.Linear(reshape(torch.ones(1, 4, 4)).shape[-1], 3)]
    assert sources(between(reshape), modules, 4, 2, 4) == {}


def test_frames_folded_into_units_end_the_chain():
    def forward(model, x):
        return model[1](model[0](x.flatten(0, 1)).relu().view(len(x), -1))

    assert sources(forward, dense(12), 4, 2, 5) == {}


def test_outputs_with_a_bias_that_is_not_trained_are_no_source():
    modules = dense()
    modules[0].bias.requires_grad_(False)
    assert sources(between(nn.ReLU()), modules, *POINTS) == {}
    modules = dense()
    modules[1].bias.requires_grad_(False)  # that of the reader does not matter
    assert sources(between(nn.ReLU()), modules, *POINTS) == RELU


def test_outputs_with_a_bias_of_another_layer_are_no_source():
    def forward(model, x):
        hidden = functional.linear(x, model[0].weight, model[2].bias)
        return model[1](hidden) + model[2](x)[:, :3]

    modules = [nn.Linear(5, 6, bias=False), nn.Linear(6, 3), nn.Linear(5, 6)]
    assert sources(forward, modules, *POINTS) == {}
    forward = lambda m, x: m[1](functional.linear(x, m[0].weight))  # noqa: E731
    assert sources(forward, modules[:2], *POINTS) == SAME


def test_what_happens_without_gradients_ends_the_chain():
    def forward(model, x):
        hidden = model[0](x)
        with torch.no_grad():
            hidden.mul_(2)
        return model[1](hidden)

    assert sources(forward, dense(), *POINTS) == {}


# The head


HEADS = {
    "nothing": lambda x: x,
    "log_softmax": lambda x: functional.log_softmax(x, 1),
    "method": lambda x: x.log_softmax(-1),
    "module": nn.LogSoftmax(dim=1),
    "flatten": lambda x: x.flatten(1),
    "dropout": nn.Dropout(),
    "both": lambda x: functional.log_softmax(x.flatten(1), 1),
}


@pytest.mark.parametrize("ending", HEADS.values(), ids=HEADS)
def test_the_head_is_followed_to_the_logits(ending):
    seen = survey(lambda m, x: ending(m[1](m[0](x).relu())), dense(), *POINTS)
    assert (seen.output_layer, seen.fed_by) == ("1", {"1": Source("0", "relu")})


def test_a_convolution_may_be_the_head():
    pool = nn.AdaptiveAvgPool2d(1)
    seen = survey(lambda m, x: pool(m[1](m[0](x).relu())).flatten(1), maps(), *IMAGES)
    assert seen.output_layer == "1"


NO_HEADS = {
    "scale": lambda x: x / 2,
    "shift": lambda x: x + 1,
    "relu": torch.relu,
    "relu before log_softmax": lambda x: functional.log_softmax(x.relu(), 1),
    "tanh": torch.tanh,
    "softmax": lambda x: x.softmax(1),
    "three dimensions": lambda x: x.unsqueeze(2),
    "one after the other": lambda x: functional.log_softmax(2 * x, 1),
    "pool over classes": lambda x: functional.avg_pool1d(x, 3, 1, 1),
    "in place": lambda x: x.clamp_(-1),
}


@pytest.mark.parametrize("ending", NO_HEADS.values(), ids=NO_HEADS)
def test_logits_that_are_made_of_more_have_no_head(ending):
    assert survey(lambda m, x: ending(m[1](m[0](x))), dense(), *POINTS).output_layer == ""


def test_logits_over_positions_have_a_head_where_classes_come_second():
    assert survey(lambda m, x: m[1](m[0](x)), dense(), 4, 7, 5).output_layer == ""
    assert survey(lambda m, x: m[1](m[0](x)), maps(), *IMAGES).output_layer == "1"


def test_a_frozen_normalisation_behind_it_leaves_no_head():
    modules = [*dense(), nn.LayerNorm(3).requires_grad_(False)]
    assert survey(lambda m, x: m[2](m[1](m[0](x))), modules, *POINTS).output_layer == ""


def test_a_layer_with_other_uses_is_no_head():
    modules = [nn.Linear(5, 5), nn.Linear(5, 3)]
    assert survey(lambda m, x: m[0](m[0](x)), modules[:1], *POINTS).output_layer == ""
    both = survey(lambda m, x: m[0](x) + m[0](x.flip(1)), modules[1:], *POINTS)
    assert both.output_layer == ""


def test_the_first_layer_that_is_defined_may_be_the_head():
    modules = [nn.Linear(6, 3), nn.Linear(5, 6)]
    seen = survey(lambda m, x: m[0](m[1](x)), modules, *POINTS)
    assert (seen.output_layer, seen.fed_by) == ("0", {"0": Source("1", "identity")})


# Blocks


@pytest.mark.parametrize("pooled", [False, True])
def test_a_block_is_what_one_unit_gives(pooled):
    """To scale units before a flattening is to scale their blocks of columns behind it."""
    torch.manual_seed(0)
    convolution, linear = nn.Conv2d(2, 3, 1).double(), nn.Linear(3 * 4 * 4, 5).double()
    second = nn.Conv2d(3, 5, 3).double()
    x, scale = torch.randn(4, 2, 4, 4).double(), torch.tensor([2.0, 3.0, 5.0]).double()
    hidden = functional.avg_pool2d(convolution(x), 3, 1, 1) if pooled else convolution(x)
    scaled = hidden * scale.view(1, 3, 1, 1)
    for reader, flatten in ((linear, True), (second, False)):
        (layer,) = find_layers(nn.ModuleDict({"reader": reader}))
        parameters = {f"reader.{n}": p for n, p in reader.named_parameters()}
        mapped = InputMap(scale.diag(), layer.inputs).on_columns(layer.join(parameters))
        changed = layer.split(mapped)
        weight, bias = changed["reader.weight"], changed["reader.bias"]
        if flatten:
            found, expected = hidden.flatten(1) @ weight.mT + bias, reader(scaled.flatten(1))
        else:
            found, expected = functional.conv2d(hidden, weight, bias), reader(scaled)
        torch.testing.assert_close(found, expected)


# Whole models, and what is sent


def _images(size, samples=3):
    return torch.randn(samples, 3, size, size)


@pytest.mark.parametrize(
    ("make", "size", "chain"),
    [
        (torchvision.models.alexnet, 64, "features.0 3 6 8 10 classifier.1 4 6"),
        (torchvision.models.vgg11, 32, "features.0 3 6 8 11 13 16 18 classifier.0 3 6"),
    ],
)
def test_plain_torchvision_models_are_chains(make, size, chain):
    model = make(num_classes=4)
    features, _, classifier = chain.partition(" classifier.")
    names = ["features." + n for n in features.removeprefix("features.").split()]
    names += ["classifier." + n for n in classifier.split()]
    layers = find_layers(model)
    assert [layer.name for layer in layers] == names
    tracer = ModelTracer(model.eval(), layers)
    with tracer.watch():
        logits = model(_images(size, 2))
    seen = tracer.trace(logits)
    assert seen.fed_by == {
        reader: Source(read, "relu") for read, reader in itertools.pairwise(names)
    }
    assert seen.output_layer == names[-1]
    sizes = {layer.name: (layer.shape[0], layer.inputs) for layer in layers}
    for reader, source in seen.fed_by.items():
        assert sizes[reader][1] % sizes[source.layer][0] == 0


def test_a_residual_model_has_no_sources_but_a_head():
    model = torchvision.models.resnet18(num_classes=4).eval()
    tracer = ModelTracer(model, find_layers(model))
    with tracer.watch():
        logits = model(_images(32))
    seen = tracer.trace(logits)
    assert (dict(seen.fed_by), seen.output_layer) == ({}, "fc")


@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli", "gaussian"])
@pytest.mark.parametrize("kind", ["identity", "diagonal", "kfac", "ekfac", "dense"])
def test_sources_and_head_are_sent(kind, likelihood, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))
    labels = torch.arange(12) % 3
    if likelihood != "categorical":
        labels = functional.one_hot(labels, 3).float()
    loader = DataLoader(TensorDataset(torch.randn(12, 5), labels), batch_size=4)
    found = extract_curvature(model, loader, kind, likelihood=likelihood, progress=False)
    update = ClientUpdate.from_model(model, found.header(12), found.blocks)
    header = ClientUpdate.open(update.save(tmp_path / "client.safetensors")).header
    assert header == update.header
    assert header.fed_by == ({} if kind == "identity" else {"2": Source("0", "relu")})
    seen = kind != "identity" and likelihood == "categorical"
    assert header.output_layer == ("2" if seen else "")
