"""What all families of URLs share: how a request is declared, read and answered."""
