"""Hydra configs of the commands that take a file of records; their groups would hide settings of the
others.
"""
