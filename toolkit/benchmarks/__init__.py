"""What parts of this toolkit cost or save, measured side by side."""
