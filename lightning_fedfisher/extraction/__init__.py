"""A trained model and its samples become curvature, without a Trainer.

May import: curvature, likelihoods, layers, distributed, errors, _utils and `update.header`.
"""
