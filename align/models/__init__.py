"""Models: what a folder is, how it is opened, adapted, quantized, merged and saved. `source` needs no torch."""
