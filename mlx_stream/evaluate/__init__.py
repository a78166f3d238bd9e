"""Measures models on streams; the README's figures come from here."""
