"""Pages and the prefix tree: who owns which page, and which tokens are already computed. Pure: integers in, integers out."""
