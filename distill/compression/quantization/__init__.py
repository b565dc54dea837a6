"""Models with weights in 8 and 4 bit: formats, layers, and how weights are rounded."""
