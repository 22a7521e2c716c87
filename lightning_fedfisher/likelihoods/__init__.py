"""What a model's logits say of the labels.

Add a likelihood here: one file, and a row of the registry. May import: nothing of this package.
"""
