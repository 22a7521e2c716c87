"""Networks as people train them, with random weights and random data of the right shapes.

Curvature costs what the shapes cost, whatever the weights. Every network takes one tensor and gives
logits ``(samples, classes, *positions)``, so that other libraries can be measured on it as well.
Networks of other packages need those packages: `pip install timm transformers peft
efficientnet-lite-pytorch`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_fedfisher.likelihoods import IGNORE_INDEX
from simulation.models import build_model

_IMAGE_SIZE, _IMAGE_CLASSES = 64, 10
_SENTENCE_LENGTH, _SENTENCE_CLASSES = 32, 77
_TEXT_LENGTH, _VOCABULARY = 64, 8000
_BERT_VOCABULARY, _LSTM_VOCABULARY = 30522, 5000
_LARGE_IMAGE_SIZE = 224
_GPT2_VOCABULARY, _GPT2_LENGTH = 50257, 128

Draw = Callable[[int, torch.Generator], tuple[Tensor, Tensor]]
"""Draws inputs and labels of so many samples."""


@dataclass(frozen=True)
class RealModel:
    """A network to measure.

    Attributes:
        load: imports the network's package, and gives the function that builds the network.
        draw: draws its data.
        optimizer: SGD with momentum for images, AdamW for text.
    """

    load: Callable[[], Callable[[], nn.Module]]
    draw: Draw
    optimizer: Literal["sgd", "adamw"] = "sgd"

    def make_optimizer(self, weights: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """Makes the optimizer, with steps that move the weights little.

        Args:
            weights: that it trains.
        """
        if self.optimizer == "adamw":
            return torch.optim.AdamW(weights, 1e-5)
        return torch.optim.SGD(weights, 1e-4, momentum=0.9)


class Logits(nn.Module):
    """A language model of Hugging Face that takes tokens and gives logits, classes second."""

    def __init__(self, model: nn.Module) -> None:
        """Keeps the model.

        Args:
            model: of `transformers`, or an adapter of `peft` around one.
        """
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        """Runs the model.

        Args:
            tokens: of shape ``(samples, length)``.

        Returns:
            Logits of shape ``(samples, classes)`` or ``(samples, vocabulary, length)``.
        """
        logits: Tensor = self.model(input_ids=tokens).logits
        return logits if logits.ndim == 2 else logits.movedim(-1, 1)


class UNet(nn.Module):
    """Convolutions and batch norm on four scales, transposed convolutions up, a class a pixel."""

    def __init__(self, widths: tuple[int, ...] = (32, 64, 128, 256)) -> None:
        """Builds the layers.

        Args:
            widths: channels of each level, from the finest to the coarsest.
        """
        super().__init__()
        pairs = list(pairwise(widths))
        self.first = self._double(3, widths[0])
        self.down = nn.ModuleList(self._double(fine, coarse) for fine, coarse in pairs)
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(coarse, fine, 2, stride=2) for fine, coarse in pairs
        )
        self.join = nn.ModuleList(self._double(2 * fine, fine) for fine, _ in pairs)
        self.head = nn.Conv2d(widths[0], _IMAGE_CLASSES, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Classifies pixels.

        Args:
            images: of shape ``(samples, 3, height, width)``.

        Returns:
            Logits of shape ``(samples, classes, height, width)``.
        """
        levels = [self.first(images)]
        for down in self.down:
            levels.append(down(nn.functional.max_pool2d(levels[-1], 2)))
        x = levels.pop()
        for up, join in zip(reversed(self.up), reversed(self.join), strict=True):
            x = join(torch.cat((up(x), levels.pop()), dim=1))
        logits: Tensor = self.head(x)
        return logits

    @staticmethod
    def _double(channels: int, width: int) -> nn.Sequential:
        """Two 3x3 convolutions, each with batch norm and ReLU."""
        return nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1, bias=False),
            *(nn.BatchNorm2d(width), nn.ReLU()),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            *(nn.BatchNorm2d(width), nn.ReLU()),
        )


class LSTMClassifier(nn.Module):
    """An embedding, one LSTM layer, and a linear layer on its last hidden state."""

    def __init__(self) -> None:
        """Builds the layers."""
        super().__init__()
        self.embedding = nn.Embedding(_LSTM_VOCABULARY, 128)
        self.lstm = nn.LSTM(128, 256, batch_first=True)
        self.head = nn.Linear(256, _IMAGE_CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        """Classifies texts.

        Args:
            tokens: of shape ``(samples, length)``.

        Returns:
            Logits of shape ``(samples, classes)``.
        """
        states, _ = self.lstm(self.embedding(tokens))
        logits: Tensor = self.head(states[:, -1])
        return logits


def _images(channels: int = 3, size: int = _IMAGE_SIZE, classes: int = _IMAGE_CLASSES) -> Draw:
    """Images with a class each."""

    def draw(samples: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        images = torch.randn(samples, channels, size, size, generator=generator)
        return images, torch.randint(classes, (samples,), generator=generator)

    return draw


def _pixels(samples: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images with a class for each pixel."""
    images = torch.randn(samples, 3, _IMAGE_SIZE, _IMAGE_SIZE, generator=generator)
    return images, torch.randint(_IMAGE_CLASSES, images[:, 0].shape, generator=generator)


def _texts(vocabulary: int, length: int, classes: int) -> Draw:
    """Token sequences with a class each."""

    def draw(samples: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        tokens = torch.randint(vocabulary, (samples, length), generator=generator)
        return tokens, torch.randint(classes, (samples,), generator=generator)

    return draw


def _next_tokens(vocabulary: int = _VOCABULARY, length: int = _TEXT_LENGTH) -> Draw:
    """Token sequences, each position labelled with the next token, the last one unobserved."""

    def draw(samples: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        tokens = torch.randint(vocabulary, (samples, length), generator=generator)
        unobserved = torch.full((samples, 1), IGNORE_INDEX)
        return tokens, torch.cat((tokens[:, 1:], unobserved), dim=1)

    return draw


def _torchvision(name: str) -> Callable[[], Callable[[], nn.Module]]:
    def load() -> Callable[[], nn.Module]:
        import torchvision

        return lambda: torchvision.models.get_model(name, num_classes=_IMAGE_CLASSES)

    return load


def _vit_b_16() -> Callable[[], nn.Module]:
    import torchvision

    def build() -> nn.Module:
        model = torchvision.models.vit_b_16(num_classes=_IMAGE_CLASSES)
        head: Any = model.heads.head
        head.reset_parameters()  # which is zero at first, and hides all layers before it
        return model

    return build


def _timm(name: str, **options: Any) -> Callable[[], Callable[[], nn.Module]]:
    def load() -> Callable[[], nn.Module]:
        import timm

        return lambda: timm.create_model(name, num_classes=_IMAGE_CLASSES, **options)

    return load


def _efficientnet_lite() -> Callable[[], nn.Module]:
    from efficientnet_lite_pytorch import EfficientNet

    return lambda: EfficientNet.from_name("efficientnet-lite0", num_classes=_IMAGE_CLASSES)


def _minilm() -> Callable[[], nn.Module]:
    from transformers import BertConfig, BertForSequenceClassification

    # As sentence-transformers/all-MiniLM-L6-v2.
    config = BertConfig(
        vocab_size=_BERT_VOCABULARY,
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        num_labels=_SENTENCE_CLASSES,
    )
    return lambda: Logits(BertForSequenceClassification(config))


def _minilm_lora() -> Callable[[], nn.Module]:
    from peft import LoraConfig, get_peft_model

    whole = _minilm()

    def build() -> nn.Module:
        config = LoraConfig(
            task_type="SEQ_CLS",
            r=8,
            target_modules=["query", "value"],
            init_lora_weights=False,  # as after some training: at first, B is zero
        )
        inner: Any = whole().model
        return Logits(get_peft_model(inner, config))

    return build


def _distilbert() -> Callable[[], nn.Module]:
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    config = DistilBertConfig(vocab_size=_BERT_VOCABULARY, num_labels=_SENTENCE_CLASSES)
    return lambda: Logits(DistilBertForSequenceClassification(config))


def _gpt2(**options: Any) -> Callable[[], Callable[[], nn.Module]]:
    def load() -> Callable[[], nn.Module]:
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(use_cache=False, **options)
        return lambda: Logits(GPT2LMHeadModel(config))

    return load


def _llama() -> Callable[[], nn.Module]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=_TEXT_LENGTH,
        use_cache=False,
    )
    return lambda: Logits(LlamaForCausalLM(config))


_SENTENCES = _texts(_BERT_VOCABULARY, _SENTENCE_LENGTH, _SENTENCE_CLASSES)

REAL_MODELS: dict[str, RealModel] = {
    # Smallest first, to see soon whether a run goes well.
    "lenet": RealModel(lambda: lambda: build_model("lenet", 1, 28, 10), _images(1, 28)),
    "mobilenet_v3_small": RealModel(_torchvision("mobilenet_v3_small"), _images()),
    "efficientnet_lite0": RealModel(_efficientnet_lite, _images()),
    "vit_tiny": RealModel(_timm("vit_tiny_patch16_224", img_size=_IMAGE_SIZE), _images()),
    "minilm_lora": RealModel(_minilm_lora, _SENTENCES, "adamw"),
    "minilm": RealModel(_minilm, _SENTENCES, "adamw"),
    "convnext_atto": RealModel(_timm("convnext_atto"), _images()),
    "resnet18": RealModel(_torchvision("resnet18"), _images()),
    "unet": RealModel(lambda: UNet, _pixels),
    "vit_small": RealModel(_timm("vit_small_patch16_224", img_size=_IMAGE_SIZE), _images()),
    "gpt2_small": RealModel(
        _gpt2(vocab_size=_VOCABULARY, n_positions=_TEXT_LENGTH, n_embd=256, n_layer=4, n_head=4),
        _next_tokens(),
        "adamw",
    ),
    "llama_small": RealModel(_llama, _next_tokens(), "adamw"),
    "distilbert": RealModel(_distilbert, _SENTENCES, "adamw"),
    "resnet50": RealModel(_torchvision("resnet50"), _images()),
    "lstm": RealModel(
        lambda: LSTMClassifier,
        _texts(_LSTM_VOCABULARY, _TEXT_LENGTH, _IMAGE_CLASSES),
        "adamw",
    ),
}
"""The networks by name."""

LARGE_MODELS: dict[str, RealModel] = {
    "resnet50": RealModel(_torchvision("resnet50"), _images(size=_LARGE_IMAGE_SIZE)),
    "vit_b_16": RealModel(_vit_b_16, _images(size=_LARGE_IMAGE_SIZE)),
    # As openai-community/gpt2, which is what the package's defaults describe.
    "gpt2": RealModel(_gpt2(), _next_tokens(_GPT2_VOCABULARY, _GPT2_LENGTH), "adamw"),
}
"""Networks and data of the sizes that take a GPU, by name."""
