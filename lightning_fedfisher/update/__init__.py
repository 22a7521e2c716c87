"""The one file that crosses from client to server: format, header, checks, compression.

May import: curvature, likelihoods, batch_norms, layers, errors, _utils.
"""

from lightning_fedfisher.update.client_update import ClientUpdate
from lightning_fedfisher.update.header import QuantizedTensor, UpdateHeader

__all__ = ["ClientUpdate", "QuantizedTensor", "UpdateHeader"]
