"""The code and the commands in the Markdown files: snippets compile and run, flags exist."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
import torch
import wandb
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_fedfisher
from lightning_fedfisher import ClientUpdate, FedFisherCallback, extract_curvature
from lightning_fedfisher.secure_aggregation import client_sums, divisors, to_fixed

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "recipes").rglob("*.md"))]
_FENCE = re.compile(r"^```(?P<language>[^\n]*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)


def page_name(path):
    return str(path.relative_to(ROOT))


def fenced(path):
    """The language and the text of each fenced block of a page."""
    return [(m["language"].strip(), m["text"]) for m in _FENCE.finditer(path.read_text())]


def snippets(path):
    return [text for language, text in fenced(path) if language.startswith("python")]


def commands(path):
    """The lines that start a recipe, with continued lines joined and without comments."""
    for _, text in fenced(path):
        for line in text.replace("\\\n", " ").splitlines():
            if line.strip().startswith("python recipes/"):
                yield shlex.split(line, comments=True)


def test_pages_are_found():
    names = {page_name(path) for path in PAGES}
    assert {"README.md", "recipes/README.md", "recipes/studies/README.md"} <= names
    assert len(list(commands(ROOT / "recipes" / "studies" / "README.md"))) > 5
    assert snippets(ROOT / "README.md")


@pytest.mark.parametrize("path", PAGES, ids=page_name)
def test_python_snippets_compile(path):
    for text in snippets(path):
        compile(text, page_name(path), "exec")


@pytest.mark.parametrize("path", PAGES, ids=page_name)
def test_commands_name_existing_scripts_and_known_flags(path):
    for _, script, *arguments in commands(path):
        file = ROOT / script
        assert file.is_file(), script
        name = ".".join(file.relative_to(ROOT / "recipes").with_suffix("").parts)
        parser = importlib.import_module(name).make_parser()
        if "--help" not in arguments:
            parser.parse_args(arguments)  # which leaves with an error that names an unknown flag


def test_flags_of_recorded_runs_are_known():
    """The table of results/README.md leaves the script's name out."""
    text = (ROOT / "recipes" / "results" / "README.md").read_text()
    parser = importlib.import_module("cifar_resnet").make_parser()
    found = re.findall(r"`(--[^`]+)`", text)
    assert len(found) >= 8
    for flags in found:
        parser.parse_args(shlex.split(flags))


@pytest.mark.parametrize("path", PAGES, ids=page_name)
def test_links_to_files_lead_somewhere(path):
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", path.read_text()):
        assert (path.parent / target).exists(), target


class Tiny(LightningModule):
    """A classifier of 6x6 images, with a layer of the name that the README uses."""

    def __init__(self):
        super().__init__()
        self.conv1, self.head = nn.Conv2d(1, 2, 3), nn.Linear(32, 3)

    def forward(self, x):
        return self.head(self.conv1(x).relu().flatten(1))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def validation_step(self, batch, batch_index):
        return self.training_step(batch, batch_index)


def tiny_loader(seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(12, 1, 6, 6, generator=generator)
    return DataLoader(TensorDataset(x, torch.randint(0, 3, (12,), generator=generator)), 6)


def diagonal_update(module, seed):
    found = extract_curvature(module, tiny_loader(seed), "diagonal", progress=False)
    return ClientUpdate.from_model(module, found.header(), found.blocks)


def wants_sums(text):
    return "client_sums(" in text


@pytest.fixture
def namespace(tmp_path, monkeypatch):
    """What the README's reader has: a module, loaders, the other client's file, no network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_SILENT", "true")
    open_logger = lightning_fedfisher.federation_logger

    def offline(*arguments, **options):
        wandb.finish()  # the README's clients and server are processes of their own
        return open_logger(*arguments, **{**options, "mode": "offline"})

    monkeypatch.setattr(lightning_fedfisher, "federation_logger", offline)
    torch.manual_seed(0)
    module = Tiny()
    quiet = {"enable_progress_bar": False, "logger": False, "enable_checkpointing": False}
    initial = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    callback = FedFisherCallback("client-1.safetensors")
    Trainer(max_epochs=1, callbacks=[callback], **quiet).fit(module, tiny_loader(1))
    module.load_state_dict(initial)
    names = {"torch": torch, "nn": nn, "Trainer": Trainer, "module": module, "model": module}
    names |= {"loader": tiny_loader(), "plain_loader": tiny_loader()}
    names |= {name: getattr(lightning_fedfisher, name) for name in lightning_fedfisher.__all__}
    yield names
    wandb.finish()


@pytest.mark.filterwarnings("ignore")
def test_the_snippets_of_the_readme_run_one_after_the_other(namespace):
    for number, text in enumerate(snippets(ROOT / "README.md"), start=1):
        if wants_sums(text):
            updates = [diagonal_update(namespace["module"], seed) for seed in range(2)]
            alone = [client_sums(one, "fisher_merge", sample_unit=10_000) for one in updates]
            sums = [to_fixed(own, clients=100, divisors=divisors(own)) for own in alone]
            total = {name: sums[0][name] + sums[1][name] for name in sums[0]}
            namespace |= {"update": updates[0], "any_update": updates[0], "total": total}
        try:
            exec(compile(text, f"README.md, snippet {number}", "exec"), namespace)
        except Exception as error:
            pytest.fail(f"snippet {number} of README.md: {error!r}\n{text}")
    assert Path("merged.pt").is_file()
