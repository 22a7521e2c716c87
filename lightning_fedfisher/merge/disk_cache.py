"""Tensors of many clients that are offloaded to disk, and read anew at every use."""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typing_extensions import override

from lightning_fedfisher._utils.files import disk_errors
from lightning_fedfisher.curvature.base import Curvature
from lightning_fedfisher.merge.objective import LazyCurvatures


class OnDiskTensors(Sequence[Mapping[str, Tensor]]):
    """Named tensors of each client, in a temporary folder that is deleted with the object.

    Example:
        >>> stored = OnDiskTensors([{"a": torch.ones(2)}], torch.device("cpu"))
        >>> stored[0]["a"]
        tensor([1., 1.])
    """

    def __init__(self, clients: Iterable[Mapping[str, Tensor]], device: torch.device) -> None:
        """Writes one client's tensors after the other.

        Args:
            clients: The tensors of each client, by name.
            device: Where to put the tensors when they are read.

        Raises:
            OSError: If they cannot be written, saying where, why and what to do; nothing of them
                stays on the disk.
        """
        with _refusing("cannot be offloaded to a temporary folder"):
            self._folder = Path(mkdtemp(prefix="fedfisher-"))
        self._delete = weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._device, self._clients = device, 0
        try:
            for tensors in clients:
                stored = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
                with _refusing(f"cannot be offloaded to {self._folder}"):
                    save_file(stored, self._file(self._clients))
                self._clients += 1
        except BaseException:
            self._delete()  # now, and not when nobody looks at the error any more
            raise

    @override
    def __len__(self) -> int:
        return self._clients

    @override
    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < self._clients:
            raise IndexError(index)
        with _refusing(f"cannot be read from {self._folder} again"):
            tensors = load_file(self._file(index))
        # Copied, since products round otherwise where a tensor starts anywhere in memory.
        return {name: tensor.to(self._device, copy=True) for name, tensor in tensors.items()}

    def _file(self, index: int) -> Path:
        return self._folder / f"{index}.safetensors"


class OnDiskCurvatures(LazyCurvatures):
    """The curvatures of one layer, one for each client, for a layer that does not fit in memory."""

    def __init__(self, curvatures: Iterable[Curvature], device: torch.device) -> None:
        """Writes one curvature after the other.

        Args:
            curvatures: The curvature of each client.
            device: Where to put the curvatures when they are read.
        """
        self._device = device
        self.kinds: list[type[Curvature]] = []
        self._templates: list[tuple[Curvature, torch.dtype]] = []
        self._tensors = OnDiskTensors(self._noted(curvatures), device)

    def _noted(self, curvatures: Iterable[Curvature]) -> Iterator[Mapping[str, Tensor]]:
        for curvature in curvatures:
            tensors = curvature.tensors()
            dtype = next((tensor.dtype for tensor in tensors.values()), torch.float32)
            self.kinds.append(type(curvature))
            # What it is beside its tensors, without their memory.
            self._templates.append((curvature.to(torch.device("meta"), dtype), dtype))
            yield tensors

    @override
    def __getitem__(self, index: Any) -> Any:
        tensors = self._tensors[index]
        template, dtype = self._templates[index]
        return template.with_tensors(tensors).to(self._device, dtype)


def _refusing(what: str) -> AbstractContextManager[None]:
    told = f"weights and curvature {what}"
    remedy = (
        "set TMPDIR to a folder with room that nobody empties, or raise memory_budget, so that "
        "less is offloaded"
    )
    return disk_errors(told, {}, remedy)
