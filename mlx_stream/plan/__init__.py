"""What a model will need, before any of it is loaded: bytes (`needs`), and what fits (`choice`)."""
