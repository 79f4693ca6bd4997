"""The commands beside `flask run`."""
