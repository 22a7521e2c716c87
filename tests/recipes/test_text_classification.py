"""The text recipe end to end, on a tiny network and questions that are made up."""

import csv
import json

import pytest
import text_classification

transformers = pytest.importorskip("transformers")

WORDS = ["card", "lost", "pay", "money", "top", "up", "my", "where", "is", "help"]
CATEGORIES = {"card": "card_lost", "pay": "payment", "top": "top_up"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a network with random weights."""
    folder = tmp_path_factory.mktemp("model")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=16,
    )
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("questions")
    for part, repeats in (("train", 20), ("test", 5)):
        with (folder / f"{part}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "category"])
            for number in range(repeats):
                for word, category in CATEGORIES.items():
                    writer.writerow([f"{WORDS[number % 10]} my {word} is", category])
    return folder


def _run(data, model, output, *flags):
    common = ["--clients", "2", "--alpha", "1", "--epochs", "1", "--length", "8"]
    where = ["--data-dir", str(data), "--model", str(model), "--output-dir", str(output)]
    text_classification.main([*common, *where, *flags])
    return json.loads((output / "results.json").read_text())


@pytest.mark.parametrize("classes", [2, 3])
def test_methods_are_compared(data, model, tmp_path, classes):
    methods = ["closed_form_head", "random_features_head", "fedavg", "head_first_fedfisher"]
    results = _run(data, model, tmp_path, "--classes", str(classes), "--methods", *methods)
    assert list(results["methods"]) == methods
    assert sum(client["num_samples"] for client in results["clients"]) == 20 * classes
    # Words tell the category, and an untrained network tells the words.
    assert results["methods"]["closed_form_head"]["accuracy"] > 80
    assert results["methods"]["random_features_head"]["accuracy"] > 80


def test_adapters_are_merged(data, model, tmp_path):
    pytest.importorskip("peft")
    results = _run(data, model, tmp_path, "--lora", "--methods", "closed_form_head", "fedavg")
    assert results["methods"]["closed_form_head"]["accuracy"] > 80


def test_what_is_missing_is_told(tmp_path):
    with pytest.raises(SystemExit, match="--data-dir must name a folder"):
        text_classification.main([])
    with pytest.raises(SystemExit, match="there is no"):
        text_classification.main(["--data-dir", str(tmp_path), "--model", str(tmp_path)])
