"""The ways in: HTTP server and Python engine. Users' input is parsed and checked here."""
