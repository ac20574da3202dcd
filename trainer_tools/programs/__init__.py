"""Program formats: read one, find its lookups, cut them out, write it."""
