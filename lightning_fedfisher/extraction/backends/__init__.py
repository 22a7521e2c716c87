"""Three ways to per-sample gradients: hooks on outputs, `torch.func`, and BackPACK.

May import: tracing, layer_types, layer_report, batches, curvature, layers, errors.
"""
