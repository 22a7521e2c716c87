"""Ways to per-sample gradients: hooks on outputs, `torch.func`, BackPACK.

May import: layer_types, tracing, layers, errors.
"""
