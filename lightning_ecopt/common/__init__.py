"""What every room of the package may use; it knows nothing of scaling groups."""
