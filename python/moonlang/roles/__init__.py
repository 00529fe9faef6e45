"""The processes of a server: what a role is, which roles there are, how they are started, watched and stopped."""
