"""Engines: one interface to the libraries that run the networks, with named arrays as inputs and outputs."""
