"""The first command: trains a very small model and shows what it learned."""
