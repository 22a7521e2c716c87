"""The one file that crosses from client to server: format, header, checks, compression.

May import: curvature, likelihoods, layers, errors, _utils.
"""
