"""The part that runs inside the jail, and the codec both sides share. Standard library only, relative imports only.

The folder is bound into the jail as a package of its own, so that nothing else of this project is visible there.
"""
