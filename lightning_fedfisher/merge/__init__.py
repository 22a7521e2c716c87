"""Client updates become one model, without a Trainer.

May import: update, curvature, likelihoods, layers, distributed, errors, _utils.
"""
