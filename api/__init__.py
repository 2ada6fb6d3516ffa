"""INT8 W8A8 deployment of GLU language models that keeps their accuracy."""
