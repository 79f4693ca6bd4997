"""What all routes share: admission, bodies, queries, pages, streams and responses."""
