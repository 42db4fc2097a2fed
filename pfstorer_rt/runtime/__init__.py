"""The runtime: restore images with a plan or a base, one or many, forecast and time it."""
