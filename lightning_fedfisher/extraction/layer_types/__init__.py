"""How a call of each type of layer becomes a gradient.

Add a layer type here: one file, and a row of the registry. May import: layers, errors.
"""
