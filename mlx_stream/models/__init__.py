"""Networks: layers, families, weights and traced steps. Independent of streams and text."""
