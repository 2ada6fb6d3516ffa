"""What the embedded engine and the server take, beside other engines."""
