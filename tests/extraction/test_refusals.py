"""What curvature cannot be extracted of is refused, and the message says why."""

import pytest
import torch
from helpers.networks import CLASSES, VECTOR, Net, every_extracted_kind, extract, make_data
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_fedfisher.errors import UnsupportedModelError


def test_unknown_options_are_named_in_one_message():
    with pytest.raises(ValueError, match="curvature='hessian'") as caught:
        extract(nn.Linear(4, 3), make_data(VECTOR), "hessian", fisher="fish", likelihood="poisson")
    for words in ("fisher='fish'", "likelihood='poisson'", "ekfac", "normalised", "gaussian"):
        assert words in str(caught.value)


@pytest.mark.parametrize(("option", "value"), [("draws", 0), ("max_samples", 0)])
def test_numbers_below_one(option, value):
    with pytest.raises(ValueError, match=f"{option} must be at least 1"):
        extract(nn.Linear(4, 3), make_data(VECTOR), **{option: value})


@pytest.mark.parametrize("tolerance", [-0.1, 1.0, float("nan")])
def test_tolerances_that_are_no_fraction(tolerance):
    with pytest.raises(ValueError, match="tolerance must lie in"):
        extract(nn.Linear(4, 3), make_data(VECTOR), tolerance=tolerance)


@every_extracted_kind
def test_a_loss_with_class_weights(kind):
    model = nn.Sequential(nn.Linear(4, 3))
    model.loss = nn.CrossEntropyLoss(weight=torch.ones(3))
    with pytest.raises(UnsupportedModelError, match="class weights"):
        extract(model, make_data(VECTOR), kind)


@every_extracted_kind
def test_a_module_never_called(kind):
    model = Net(lambda net, x: net.head(x), spare=nn.Linear(4, 4), head=nn.Linear(4, 3))
    found = extract(model, make_data(VECTOR), kind)
    assert "no gradient reaches it from the logits, so that a merge averages it): 1 layer" in (
        found.report
    )
    _is_told_nothing(found.blocks["spare"], kind)
    alone = extract(Net(lambda net, x: net.head(x), head=model.head), make_data(VECTOR), kind)
    torch.testing.assert_close(found.blocks["head"].diagonal(), alone.blocks["head"].diagonal())
    model.spare.requires_grad_(False)
    assert set(extract(model, make_data(VECTOR), kind).blocks) == {"head"}


def _is_told_nothing(block, kind):
    """Nothing pulls at its weights, so that a merge averages them; inputs have no such block."""
    assert block.kind == {"kfac": "diagonal", "ekfac": "diagonal", "input_gram": "identity"}.get(
        kind, kind
    )
    if kind != "input_gram":
        assert not block.diagonal().any()


def _routed(net, x):
    """Sends samples with a positive first input through an expert, and calls it for these alone."""
    chosen = x[:, 0] > 0
    if not chosen.any():
        return net.head(x)
    return net.head(x.masked_scatter(chosen.unsqueeze(1), torch.tanh(net.expert(x[chosen]))))


@every_extracted_kind
@pytest.mark.parametrize("rare", [True, False])
def test_an_expert_that_only_some_samples_are_sent_to(kind, rare):
    torch.manual_seed(0)
    data = make_data(VECTOR)
    x = data.tensors[0]
    x[:, 0] = x[:, 0].abs() * torch.where(torch.arange(len(x)) % 5 == 4, 1, -1 if rare else 1)
    model = Net(_routed, expert=nn.Linear(4, 4), head=nn.Linear(4, 3)).double()
    found = extract(model, data, kind, fisher="exact", tolerance=0.0)
    if rare:  # no sample of the preview is sent there
        assert "only some batches use it" in found.report
    block = found.blocks["expert"]
    if block.kind not in ("diagonal", "dense"):  # an approximation, or no curvature at all
        assert kind == "input_gram" or not rare
        return
    expected = torch.zeros(4, 5, dtype=torch.float64)
    for sample in x:
        logits = model(sample.unsqueeze(0))[0]
        for p, logit in zip(logits.softmax(0).detach(), logits.log_softmax(0), strict=True):
            parts = torch.autograd.grad(
                logit, list(model.expert.parameters()), retain_graph=True, allow_unused=True
            )
            if parts[0] is not None:
                expected += p * torch.cat([parts[0], parts[1].unsqueeze(1)], 1).square() / len(x)
    torch.testing.assert_close(block.diagonal().view(4, 5), expected, rtol=1e-9, atol=1e-12)


def _under_no_grad(net, x):
    with torch.no_grad():
        x = net.body(x)
    return net.head(x)


@every_extracted_kind
@pytest.mark.parametrize(
    "forward",
    [
        lambda net, x: net.head(net.body(x).detach()),
        lambda net, x: (net.body(x), net.head(x))[1],
        _under_no_grad,
    ],
    ids=["detached", "unused", "no_grad"],
)
def test_a_layer_that_no_gradient_reaches(kind, forward):
    model = Net(forward, body=nn.Linear(4, 4), head=nn.Linear(4, 3))
    if forward is _under_no_grad:
        with pytest.raises(UnsupportedModelError, match="body: it runs without gradients") as told:
            extract(model, make_data(VECTOR), kind)
        assert "head" not in str(told.value)
    else:
        _is_told_nothing(extract(model, make_data(VECTOR), kind).blocks["body"], kind)


@every_extracted_kind
def test_samples_that_depend_on_each_other(kind):
    def forward(net, x):
        return net.head(net.gain * (x - x.mean(0)))

    model = Net(forward, head=nn.Linear(4, 3)).double()
    model.gain = nn.Parameter(torch.ones(4, dtype=torch.float64))
    for fisher in ("exact", "empirical"):
        with pytest.raises(UnsupportedModelError, match="depend on the other samples"):
            extract(model, make_data(VECTOR), kind, fisher=fisher)


def _checkpointed(net, x):
    return net.head(checkpoint(lambda x: torch.tanh(net.body(x)), x, use_reentrant=False))


@pytest.mark.parametrize("kind", ["kfac", "ekfac", "dense"])
def test_checkpointed_activations_from_the_input(kind):
    model = Net(_checkpointed, body=nn.Linear(4, 4), head=nn.Linear(4, 3))
    with pytest.raises(UnsupportedModelError, match="switch gradient checkpointing off"):
        extract(model.double(), make_data(VECTOR), kind)


@every_extracted_kind
def test_an_output_that_is_no_tensor_with_a_gradient(kind):
    for forward in (
        lambda net, x: (net.head(x), "auxiliary"),
        lambda net, x: net.head(x).detach(),
        torch.no_grad()(lambda net, x: net.head(x)),
    ):
        with pytest.raises(ValueError, match=r"output is (no|tuple, no) tensor.*pass forward="):
            extract(Net(forward, head=nn.Linear(4, 3)), make_data(VECTOR), kind)


@pytest.mark.parametrize(
    "batch",
    [torch.zeros(2, 4), (torch.zeros(2, 4),), (torch.zeros(2, 4),) * 3, {"x": torch.zeros(2, 4)}],
    ids=["tensor", "single", "triple", "mapping"],
)
def test_a_batch_that_is_no_pair(batch):
    with pytest.raises(ValueError, match=r"not a pair \(x, y\): pass forward="):
        extract(nn.Linear(4, 3), [batch])


def test_labels_that_are_missing():
    with pytest.raises(ValueError, match="needs labels"):
        extract(
            nn.Linear(4, 3),
            [{"x": torch.zeros(2, 4)}],
            forward=lambda net, batch: net(batch["x"]),
        )


@every_extracted_kind
def test_a_diverged_model(kind):
    model = nn.Linear(4, 3)
    nn.init.constant_(model.bias, float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        extract(model, make_data(VECTOR), kind)


def test_outputs_of_several_parts_need_forward():
    model = Net(lambda net, x: (net.head(x), x, x), head=nn.Linear(4, CLASSES))
    with pytest.raises(ValueError, match="pass forward="):
        extract(model, make_data(VECTOR), forward=lambda module, batch: module(batch[0].float()))
