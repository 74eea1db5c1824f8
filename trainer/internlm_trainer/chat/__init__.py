"""Talking to a model: in the terminal, in a browser, over HTTP, with tools."""
