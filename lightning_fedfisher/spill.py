"""Curvature of many clients on disk, for layers that do not fit into memory."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from typing_extensions import override

from lightning_fedfisher.curvature import Curvature
from lightning_fedfisher.quadratic import Unread


class Spilled(Unread):
    """Curvatures in a temporary folder, read anew at every use; the folder goes with the object."""

    def __init__(self, curvatures: Iterable[Curvature], device: torch.device) -> None:
        """Writes them, one at a time.

        Args:
            curvatures: of one layer, one for each client.
            device: where they are wanted.
        """
        self._folder = TemporaryDirectory(prefix="fedfisher-")
        self._device = device
        self.kinds: list[type[Curvature]] = []
        self._forms: list[tuple[tuple[int, int], torch.dtype]] = []
        for index, curvature in enumerate(curvatures):
            tensors = {n: t.cpu().contiguous() for n, t in curvature.tensors().items()}
            dtype = next((t.dtype for t in tensors.values()), torch.float32)
            self.kinds.append(type(curvature))
            self._forms.append((curvature.shape, dtype))
            save_file(tensors, self._file(index))

    @override
    def __getitem__(self, index: Any) -> Any:
        kind, (shape, dtype) = self.kinds[index], self._forms[index]
        return kind.from_tensors(load_file(self._file(index)), shape).to(self._device, dtype)

    def _file(self, index: int) -> Path:
        return Path(self._folder.name) / f"{index}.safetensors"
