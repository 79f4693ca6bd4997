"""History that leaves a database, comes into one, or is deleted from it."""
