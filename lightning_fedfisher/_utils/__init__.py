"""Small things every room needs: text, files, versions, progress bars.

May import: nothing of this package.
"""
