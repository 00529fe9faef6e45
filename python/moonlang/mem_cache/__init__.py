"""Pages and the prefix tree: who owns which page, and which tokens are computed. Pure: integers in, integers out."""
