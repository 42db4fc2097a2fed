"""Engines: named arrays in, named arrays out, whatever runs underneath."""
