"""A bundle as a service: sequences scheduled over one engine, and an HTTP server in OpenAI's terms."""
