"""Model files: where they are found, their headers, and the measurements of their loads."""
