"""Other libraries' own seams, filled with this library's operators; each imported by itself."""
