"""The bundled starter set."""
