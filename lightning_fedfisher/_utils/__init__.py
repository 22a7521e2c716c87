"""Small things that every part of the package needs: text, files, versions, random states.

May import: nothing of this package.
"""
