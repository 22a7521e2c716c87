"""Small things that every part of the package needs: text, files, versions, progress bars.

May import: nothing of this package.
"""
