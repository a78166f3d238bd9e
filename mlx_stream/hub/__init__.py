"""Where a model comes from: a folder, a GGUF file, the Hub or the package index; knows no tensors.

What is already here is used without touching the network. Only weights, configuration and
tokenizer are ever fetched: never code, never pickles.
"""
