"""The result tables: written, packed, read and queried."""
