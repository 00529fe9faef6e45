"""How tokens travel to the ranks that hold their experts. A backend is a file named after --moe-a2a-backend."""
