"""The model in torch: forwarded layer by layer, observed, transformed, and quantized in simulation."""
