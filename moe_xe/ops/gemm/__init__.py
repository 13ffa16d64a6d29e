"""Grouped products and their gradients."""
