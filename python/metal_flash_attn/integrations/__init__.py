"""Adapters for libraries that can be told which attention to use: one module for each library.

Nothing is imported before it is asked for, so that a missing library hurts nobody.
"""
