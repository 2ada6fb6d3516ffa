"""Which help topics figures in tests belong to: each Python release words them differently."""

FIGURES_CORPUS = "71f2ff5d99bdc1f9c48c5c2353ad138201c5ca1c377e0226857ef8fa89b8bcee"
"""SHA-256 of the default corpus that the figures were taken on."""
