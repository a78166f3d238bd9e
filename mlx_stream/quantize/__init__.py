"""A model -> a folder of it in fewer bits, in bounded memory; its recipes and what they cost."""
