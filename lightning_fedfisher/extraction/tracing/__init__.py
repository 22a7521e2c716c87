"""One watched forward pass: which calls use which layers, and what feeds what.

May import: layer_types, layers, errors.
"""
