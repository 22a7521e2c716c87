"""The Markdown tables of the READMEs, made from recorded results.

Imports nothing of this folder's scripts.
"""
