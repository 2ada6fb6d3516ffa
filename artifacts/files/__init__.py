"""How any file is written whole or not at all and read only as far as is safe, and where files may lie."""
