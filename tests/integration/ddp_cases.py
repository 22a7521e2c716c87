"""What `test_ddp` runs in several processes: every case in turn, and nothing imported twice.

    python ddp_cases.py CASES.json

Most of the time of processes as small as these goes into imports. So they are forked once all is
imported, and start as with torchrun: Lightning finds them launched. The file holds, for each number
of processes and each case's name, a function of this script, the folder in which it works, and its
options.
"""

import json
import os
import socket
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from helpers.federation import (
    NormedClassifier,
    quiet_trainer,
    tiny_data,
    tiny_loader,
    tiny_model,
)
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.multiprocessing import start_processes
from torch.utils.data import DataLoader

from lightning_fedfisher import FedFisherCallback, FisherMergeModule


def extract(folder, devices):
    """Three callbacks on one Trainer; training changes nothing."""
    callbacks = [
        FedFisherCallback(folder / f"{kind}-{fisher}.safetensors", curvature=kind, fisher=fisher)
        for kind, fisher in (("kfac", "normalised"), ("kfac", "mc"), ("diagonal", "exact"))
    ]
    trainer = quiet_trainer(folder, callbacks=callbacks, devices=devices, strategy="ddp")
    trainer.fit(tiny_model(learning_rate=0.0), tiny_loader(samples=21))


def extract_with_buffers(folder, devices):
    """A model whose running statistics differ by process."""
    output = folder / "update.safetensors"
    callback = FedFisherCallback(output, curvature="diagonal", fisher="exact")
    trainer = quiet_trainer(folder, callbacks=[callback], devices=devices, strategy="ddp")
    trainer.fit(NormedClassifier(), tiny_loader(samples=21))


def merge(folder, devices, method="fedfisher", budget=2**30, validates=True, normed=False):
    """A merge of the folder's updates, with a checkpoint; validation is of the tiny classifier."""
    model = NormedClassifier() if normed else tiny_model()
    checkpoint = ModelCheckpoint(folder / "kept", save_last=True)
    module = FisherMergeModule(
        sorted((folder / "updates").glob("*.safetensors")),
        method=method,
        model=model if validates else None,
        statistics_loader=tiny_loader(seed=60, samples=30, shuffle=False) if normed else None,
        memory_budget=budget,
    )
    trainer = quiet_trainer(
        folder,
        max_epochs=-1,
        devices=devices,
        strategy="ddp",
        use_distributed_sampler=False,
        callbacks=[checkpoint],
        enable_checkpointing=True,
    )
    loader = tiny_loader(seed=50, samples=40, shuffle=False) if validates else None
    trainer.fit(module, val_dataloaders=loader)
    if trainer.is_global_zero:
        torch.save(module.merged_state_dict(), folder / "merged.pt")
        torch.save([module.influence, module.distances], folder / "clients.pt")
        (folder / "history.json").write_text(json.dumps(module.history))


class _Torn(torch.utils.data.Dataset):
    """Samples that one process alone cannot read."""

    def __init__(self):
        self.samples = tiny_data(samples=21)

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        if torch.distributed.get_rank() == 1:
            raise OSError(f"sample {index} is torn")
        return self.samples[index]


def fail_to_extract(folder, devices):
    """A rank whose samples cannot be read, at the rehearsal or after the training."""
    for trained in (False, True):
        callback = FedFisherCallback(folder / "update.safetensors", dataloader=DataLoader(_Torn()))
        if trained:
            callback.on_train_start = lambda *_: None
        trainer = quiet_trainer(folder, callbacks=[callback], devices=devices, strategy="ddp")
        _note(folder, lambda: trainer.fit(tiny_model(), tiny_loader()))  # noqa: B023


def fail_to_merge(folder, devices):
    """A rank that cannot solve a layer."""
    module = FisherMergeModule(sorted((folder / "updates").glob("*.safetensors")))
    if torch.distributed.get_rank() == 1:
        module.merger.advance = lambda *_, **__: torch.ones(2) @ torch.ones(3)
    options = {"max_epochs": -1, "use_distributed_sampler": False}
    trainer = quiet_trainer(folder, devices=devices, strategy="ddp", **options)
    tempfile.tempdir = str(folder / "offloaded")
    Path(tempfile.tempdir).mkdir(exist_ok=True)
    _note(folder, lambda: trainer.fit(module))
    tempfile.tempdir = None


def _note(folder, work):
    """Writes down what this process raised."""
    try:
        work()
        told = "nothing"
    except Exception as error:
        told = f"{type(error).__name__}: {error}"
    folder.mkdir(exist_ok=True)
    with (folder / f"rank-{torch.distributed.get_rank()}.txt").open("a") as file:
        file.write(told.splitlines()[0] + "\n")


FUNCTIONS = {
    each.__name__: each
    for each in (extract, extract_with_buffers, merge, fail_to_extract, fail_to_merge)
}


def run(rank, devices, port, cases):
    """What one process does."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0"}
    os.environ |= {"LOCAL_RANK": str(rank), "WORLD_SIZE": str(devices)}
    for case, (function, folder, options) in cases.items():
        print(f"rank {rank}, case {case}", file=sys.stderr, flush=True)  # what a failure is of
        FUNCTIONS[function](Path(folder), devices, **options)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    for number, cases in json.loads(Path(sys.argv[1]).read_text()).items():
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        arguments = (int(number), port, cases)
        start_processes(run, arguments, nprocs=int(number), start_method="fork")
