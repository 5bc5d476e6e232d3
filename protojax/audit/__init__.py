"""Anybody's prototypes: safe readers of checkpoint files, the search for the prototype layer, and its audit.

Nothing here runs code from a file, needs PyTorch, or touches a device.
"""
