"""Networks: layers, families, weights and traced steps. Knows no stream and no text."""
