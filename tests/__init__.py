"""Tests. The folders mirror the package; fakes/, fuzz/, long/ and measure/ support them."""
