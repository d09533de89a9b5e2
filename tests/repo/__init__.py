"""The code and the documents as text."""
