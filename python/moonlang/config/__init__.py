"""Configuration: the flags of the server, what they resolve to, and the model they name. Imports no torch."""
