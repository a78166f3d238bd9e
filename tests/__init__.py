"""Tests: the folders mirror the package; fakes/, fuzz/, long/ and measure/ serve them."""
