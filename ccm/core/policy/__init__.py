"""What the operator's settings allow."""
