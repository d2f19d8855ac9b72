"""What the package knows of a transformer: its modules, weights, hooks, tokens. Nothing here knows of
editing.
"""
