"""Language models of transformers: known layers throughout, and exact."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_fedfisher.extraction.extract import extract_curvature

transformers = pytest.importorskip("transformers")
# With three samples in a trace, the last of four positions may be one of samples in turn.
VOCABULARY, LENGTH, SAMPLES = 11, 4, 7


def _gpt2(tied):
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        **{"n_positions": LENGTH, "n_embd": 8, "n_layer": 2, "n_head": 2},
        **{"bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": tied},
    )
    return transformers.GPT2LMHeadModel(config)


def _llama(tied):
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        **{"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2},
        **{"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": tied},
    )
    return transformers.LlamaForCausalLM(config)


def _next_token(model, batch):
    return model(input_ids=batch[0], use_cache=False).logits[:, -1], batch[1]


def _squares(model, data):
    """Squares of each sample's gradient, by a backward pass for each sample alone."""
    names = dict(model.named_parameters())
    squares = {name: torch.zeros_like(p) for name, p in names.items()}
    for tokens, label in data:
        logits = model(input_ids=tokens.unsqueeze(0), use_cache=False).logits[0, -1]
        residual = F.one_hot(label, VOCABULARY) - torch.softmax(logits.detach(), 0)
        scalar = (logits * residual / residual.norm()).sum()
        for name, g in zip(names, torch.autograd.grad(scalar, list(names.values())), strict=True):
            squares[name] += g**2 / len(data)
    return squares


@pytest.mark.parametrize("curvature", ["diagonal", "kfac"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("build", [_gpt2, _llama])
def test_all_but_a_tied_embedding_has_kronecker_factors(build, tied, curvature):
    torch.manual_seed(0)
    model = build(tied).double().eval()
    tokens = torch.randint(0, VOCABULARY, (SAMPLES, LENGTH))
    data = TensorDataset(tokens, torch.arange(SAMPLES) % VOCABULARY)
    found = extract_curvature(
        model, DataLoader(data, 3), curvature, forward=_next_token, progress=False
    )
    embedding = "transformer.wte" if build is _gpt2 else "model.embed_tokens"
    assert {r.backend for r in found.layer_reports} == {"hooks"}
    unlike = {r.layer.name for r in found.layer_reports if "unlike operations" in r.reason}
    assert unlike == ({embedding} if tied and curvature == "kfac" else set())
    squares = _squares(model, data)
    # With Kronecker factors but for vectors, positions, and what has none.
    matrices = {
        layer.name
        for layer in found.layers
        if len(layer.parameters[0][1]) > 1 and layer.name not in {"transformer.wpe", *unlike}
    }
    for layer in found.layers:
        block = found.blocks[layer.name]
        if curvature == "kfac" and layer.name in matrices:
            assert block.kind != "diagonal", layer.name
            continue
        own = [squares[name].reshape(layer.shape[0], -1) for name in layer.parameter_names]
        assert block.kind == "diagonal"
        torch.testing.assert_close(block.diagonal(), torch.cat(own, 1), rtol=1e-10, atol=1e-16)
